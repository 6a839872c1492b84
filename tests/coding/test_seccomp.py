"""The seccomp filter, decided by an interpreter of ours: what ends a process, what fails, what is allowed."""

import os
import struct

import pytest

from dllm.coding import seccomp

AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
KILL, ALLOW, ENOSYS, EROFS = 0x80000000, 0x7FFF0000, 0x00050026, 0x0005001E
NOW_HERE = -100 % 2**64  # AT_FDCWD

# Numbers out of the kernel's headers (asm/unistd_64.h, asm-generic/unistd.h), apart from the table of the package:
# what must end a process,
ENDS = {
    "x86_64": """
        29 30 31 41 42 43 46 49 50 57 58 59 62 64 65 66 68 69 70 71 76 90 91 92 93 94 101 103 109 112 129 132
        133 135 141 154 155 160 161 163 164 165 166 167 168 169 170 171 172 173 175 176 179 188 189 190 197 198
        199 200 220 223 226 227 234 235 240 241 246 248 249 250 251 256 259 260 261 268 272 279 280 288 297 298
        300 303 304 305 307 308 310 311 312 313 319 320 321 322 323 424 425 428 429 430 431 432 433 434 438 440
        442 452 448 463 466 467 469
    """,
    "aarch64": """
        5 6 7 14 15 16 30 33 39 40 41 45 51 52 53 54 55 60 88 89 92 97 104 105 106 110 111 112 116 117 129 130
        131 138 140 142 154 157 161 162 164 170 180 181 186 187 188 189 190 191 192 193 194 195 196 198 200 201
        202 203 211 217 218 219 221 224 225 238 239 240 241 242 262 264 265 266 268 269 270 271 272 273 279 280
        281 282 294 424 425 428 429 430 431 432 433 434 438 440 442 452 448 463 466 467 469
    """,
}
# and what changes paths.
CHANGES_PATHS = {
    "x86_64": """
        82 83 84 85 86 87 88 258 263 264 265 266 316
    """,
    "aarch64": """
        34 35 36 37 38 276
    """,
}


def _verdict(program: bytes, audit: int, number: int, *arguments: int) -> int:
    """What a classic BPF program returns for one system call: an interpreter of the few instructions that it uses."""
    data = struct.pack("<IIQ", number, audit, 0) + struct.pack("<6Q", *arguments, *[0] * (6 - len(arguments)))
    lines = [struct.unpack("=HBBI", program[start : start + 8]) for start in range(0, len(program), 8)]
    at, loaded = 0, 0
    while True:
        code, if_true, if_false, value = lines[at]
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            (loaded,) = struct.unpack("<I", data[value : value + 4])
            continue
        holds = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[code]
        at += if_true if holds else if_false


@pytest.fixture(params=[True, False], ids=["writes", "reads"])
def may_write(request) -> bool:
    return request.param


@pytest.fixture(params=list(AUDIT))
def machine(request) -> str:
    return request.param


@pytest.fixture
def verdict(machine, may_write):
    """verdict(number on x86_64, number on aarch64, *arguments) on either machine."""
    program = seccomp.filter_program(machine, may_write)
    assert len(program) // 8 < 4096  # the kernel's limit

    def decided(number: int, other: int, *arguments: int, audit: int = AUDIT[machine]) -> int:
        return _verdict(program, audit, number if machine == "x86_64" else other, *arguments)

    return decided


def test_listed_calls_end_the_process_and_others_do_not(machine, may_write, verdict) -> None:
    ends, paths = ({int(word) for word in table[machine].split()} for table in (ENDS, CHANGES_PATHS))
    looked_at = {"x86_64": {2, 16, 44, 56, 72, 142, 144, 157, 203, 257, 302, 314, 435, 437}}
    looked_at["aarch64"] = {25, 29, 56, 118, 119, 122, 167, 206, 220, 261, 274, 435, 437}
    for number in range(500):
        if number not in looked_at[machine]:
            others = ALLOW if may_write or number not in paths else EROFS
            assert verdict(number, number) == (KILL if number in ends else others), number
    assert verdict(0, 0, audit=0x40000003) == KILL  # 32-bit calls
    assert machine != "x86_64" or verdict(0x40000001, 0) == KILL


def test_calls_are_decided_by_their_arguments(may_write, verdict) -> None:
    assert [verdict(56, 220, flags) for flags in (17, 0x3D0F00)] == [KILL, ALLOW]  # clone: a process, a thread
    assert (verdict(435, 435), verdict(437, 437)) == (ENOSYS, ENOSYS)  # clone3, openat2
    for numbers, at in (((302, 261), 2), ((44, 206), 4)):  # prlimit with a new limit, sendto with an address
        found = [verdict(*numbers, *[7] * at, value) for value in (0, 1, 1 << 32)]
        assert found == [ALLOW, KILL, KILL]
    for command, wanted in ((0, ALLOW), (4, ALLOW), (8, KILL), (10, KILL), (15, KILL), (1024, KILL), (1030, ALLOW)):
        assert verdict(72, 25, 3, command) == wanted, command  # fcntl
    for command, wanted in ((0x5401, ALLOW), (0x541B, ALLOW), (0x8901, KILL), (0x8902, KILL), (0x40086602, KILL)):
        assert verdict(16, 29, 3, command) == wanted, command  # ioctl
    assert verdict(16, 29, 3, 0x40049409) == ALLOW and verdict(16, 29, 3, 0x5412) == KILL
    assert [verdict(157, 167, option) for option in (1, 2, 15)] == [KILL, ALLOW, ALLOW]  # prctl
    for numbers in ((203, 122), (144, 119), (142, 118), (314, 274)):  # scheduling of itself, of another
        assert (verdict(*numbers, 0), verdict(*numbers, 1)) == (ALLOW, KILL)


def test_files_are_opened_for_writing_where_the_guard_sees_it(machine, may_write, verdict) -> None:
    writing = ALLOW if may_write else EROFS
    for flags, wanted in ((os.O_RDONLY, ALLOW), (os.O_RDWR, writing), (os.O_CREAT, writing), (os.O_TRUNC, writing)):
        assert verdict(257, 56, NOW_HERE, 0, flags) == wanted
        assert verdict(257, 56, 5, 0, flags) == (ALLOW if wanted == ALLOW and flags == os.O_RDONLY else KILL)
        assert machine != "x86_64" or verdict(2, 0, 0, flags) == wanted


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(seccomp.ConfinementError, match="no system call table for vax"):
        seccomp.filter_program("vax", True)
