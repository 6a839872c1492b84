"""What a program cannot do in the sandbox, by the kernel and by the guard, and that it has then failed."""

import os
import pathlib
import struct

import pytest

from dllm.coding import confine
from dllm.coding.sandbox import Limits, check_sandbox, run_program, run_programs
from dllm.utils import InputError

QUICK = Limits(seconds=1.0, memory_mb=512)
PATIENT = Limits(seconds=30.0, memory_mb=512)  # for what ends by itself: machines may be busy
SIGSYS = "killed by SIGSYS"
NATIVE = "import ctypes\nlibrary = ctypes.CDLL(None, use_errno=True)\n"


@pytest.fixture(scope="module", autouse=True)
def _sandbox() -> None:
    try:
        check_sandbox()
    except InputError as error:
        pytest.skip(str(error))


def test_right_programs_pass_and_wrong_ones_say_why() -> None:
    passed = run_program("def double(x):\n    return 2 * x\n", "assert double(4) == 8\n")
    assert passed.passed and passed.reason is None and passed.seconds > 0
    wrong = run_program("def double(x):\n    return x\n", "assert double(0) == 0\nassert double(4) == 8\n")
    assert (wrong.passed, wrong.reason) == (False, "AssertionError: assert double(4) == 8")
    assert run_program("def double(x:", "").reason.startswith("SyntaxError")
    assert run_program("", "double(1)").reason == "NameError: name 'double' is not defined"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("while True:\n    pass", "timed out after 1 s"),
        ("import time\ntime.sleep(60)", "timed out after 1 s"),
        ("kept = bytearray(1 << 30)", "MemoryError"),
        ("def again():\n    return again()\nagain()", "RecursionError: maximum recursion depth exceeded"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import sys\nsys.exit(0)", "ended with status 0 before its tests were done"),
        ("import os\nos._exit(0)", "ended with status 0 before its tests were done"),
        ("while True:\n    print('x' * 1_000_000)", "OSError: [Errno 27] File too large"),
        (
            "try:\n    while True:\n        print('x' * 1_000_000)\nexcept OSError:\n    pass",
            "prints more than 1024 KiB",
        ),
        ("import ctypes\nctypes.string_at(0)", "killed by SIGSEGV"),
        ("for index in range(1000):\n    open(str(index), 'w')", "forbidden: writes more than 64 files"),
    ],
)
def test_endless_greedy_and_silent_programs_fail(program: str, reason: str) -> None:
    outcome = run_program(program, "", QUICK if reason.startswith("timed out") else PATIENT)
    assert not outcome.passed and outcome.reason == reason


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("import os\nos.fork()", "starts a process"),
        ("import subprocess\nsubprocess.run(['true'])", "starts a process"),
        ("import os\nos.system('true')", "starts a process"),
        ("import os\nos.kill(os.getppid(), 9)", "sends a signal"),
        ("import os\nos.killpg(0, 9)", "sends a signal"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "uses the network"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "changes its limits"),
        ("import os\nos.chmod('.', 0o777)", "changes file properties"),
    ],
)
def test_what_is_forbidden_cannot_be_caught(call: str, reason: str) -> None:
    indented = call.replace("\n", "\n    ")
    outcome = run_program(f"try:\n    {indented}\nexcept BaseException:\n    pass\n", "", PATIENT)
    assert (outcome.passed, outcome.reason) == (False, f"forbidden: {reason}")


@pytest.mark.parametrize("landlock", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        "library.fork()",
        "library.vfork()",
        "library.kill(PARENT, 9)",
        "library.setsid()",
        "library.execve(b'/bin/true', None, None)",
        "library.socket(2, 1, 0)",
        "library.unshare(0x10000000)",
        "library.chmod(b'.', 0o777)",
        "library.ptrace(16, PARENT, 0, 0)",
        "library.memfd_create(b'x', 0)",
        "library.prlimit(PARENT, 7, (ctypes.c_uint64 * 2)(1, 1), None)",
    ],
)
def test_the_kernel_holds_where_the_guard_sees_nothing(call: str, landlock: bool) -> None:
    program = f"{NATIVE}import os\nPARENT = os.getppid()\nprint({call})\n"
    outcome = run_program(program, "", PATIENT, landlock=landlock)
    assert not outcome.passed and outcome.reason.startswith(SIGSYS)


def test_a_fork_bomb_leaves_nothing_behind(tmp_path) -> None:
    # Each process would leave a file, if there were any and if it could.
    program = f"{NATIVE}while True:\n    library.fork()\n    library.creat(b'{tmp_path}/mark', 0o600)\n"
    guarded = "import os\nwhile True:\n    if os.fork() == 0:\n        os.setsid()\n"
    for source in (program, guarded):
        assert not run_program(source, "", PATIENT).passed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("landlock", [True, False])
def test_nothing_is_written_outside_the_folder(tmp_path, landlock: bool) -> None:
    there = tmp_path / "there"
    there.write_text("untouched")
    for call in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(there)!r}, 'r+')",
        f"os.remove({str(there)!r})",
        f"os.rename({str(there)!r}, 'here')",
        f"os.mkdir({str(tmp_path / 'folder')!r})",
        f"os.truncate({str(there)!r}, 0)",
        f"os.symlink({str(there)!r}, {str(tmp_path / 'link')!r})",
    ):
        outcome = run_program(
            f"import os\ntry:\n    {call}\nexcept OSError:\n    pass\n", "", PATIENT, landlock=landlock
        )
        assert not outcome.passed and "outside its folder" in outcome.reason, call
    for call in (f"creat(b'{tmp_path}/new', 0o600)", f"unlink(b'{there}')", f"rename(b'{there}', b'here')"):
        outcome = run_program(f"{NATIVE}assert library.{call} == 0, 'errno'", "", PATIENT, landlock=landlock)
        assert outcome.reason == "AssertionError: errno", call
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and there.read_text() == "untouched"


def test_the_own_folder_can_be_written_and_is_gone_afterwards() -> None:
    if confine.landlock_version() == 0:
        pytest.skip("without Landlock no file can be written")
    program = (
        "import os, tempfile\nopen('a', 'w').write('text')\nos.rename('a', 'b')\nos.mkdir('folder')\n"
        "with tempfile.TemporaryFile() as file:\n    file.write(b'x')\nopen('/dev/null', 'w').write('x')\n"
    )
    said = run_program(program, "raise ValueError(open('b').read() + ' in ' + os.getcwd())").reason
    assert said.startswith("ValueError: text in /")
    assert not pathlib.Path(said.split(" in ")[1]).exists()


def test_files_of_the_user_cannot_be_read(tmp_path) -> None:
    if confine.landlock_version() == 0:
        pytest.skip("without Landlock everything can be read")
    (tmp_path / "secret").write_text("secret")
    reason = run_program(f"print(open({str(tmp_path / 'secret')!r}).read())", "").reason
    assert reason.startswith("PermissionError")


def test_what_programs_need_is_there() -> None:
    program = (
        "import asyncio, math, random, re, threading\nseen = []\n"
        "thread = threading.Thread(target=seen.append, args=(1,))\nthread.start()\nthread.join()\n"
        "async def three():\n    return 3\n"
    )
    assert run_program(program, "assert seen == [1] and asyncio.run(three()) == 3").reason is None
    demonstration = "if __name__ == '__main__':\n    raise ValueError\nprint({'b', 'a', 'c'})\n"
    assert run_program(demonstration, "").passed
    orders = {run_program("", "raise ValueError(str({'b', 'a', 'c'}))").reason for _ in range(3)}
    assert len(orders) == 1


def test_a_lie_about_the_result_is_not_believed() -> None:
    program = (
        'import os, sys\nfor number in range(3, 10):\n    try:\n        os.write(number, b\'{"nonce": "x"}\\n\')\n'
    )
    program += "    except OSError:\n        pass\nos._exit(0)\n"
    outcome = run_program(program, "assert False")
    assert not outcome.passed and outcome.reason == "ended with status 0 before its tests were done"


def test_several_at_a_time_keep_their_order() -> None:
    outcomes = run_programs([(f"x = {index}", f"assert x % 2 == 0, {index}") for index in range(5)], num_workers=3)
    assert [outcome.reason for outcome in outcomes] == [None, "AssertionError: 1", None, "AssertionError: 3", None]


def test_limits_are_checked() -> None:
    for name, value in (("seconds", 0), ("memory_mb", 1), ("file_kb", 0), ("open_files", 3)):
        with pytest.raises(InputError, match=f"must be .*got {value}"):
            Limits(**{name: value})


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


@pytest.mark.parametrize(("machine", "audit"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_decides_as_listed(machine: str, audit: int) -> None:
    kill, allow, enosys, erofs = 0x80000000, 0x7FFF0000, 0x00050026, 0x0005001E
    column = ("x86_64", "aarch64").index(machine)
    clone, clone3, prlimit, openat = (56, 220)[column], 435, (302, 261)[column], (257, 56)[column]
    for may_write in (True, False):
        program = confine.filter_program(machine, may_write)
        assert len(program) // 8 < 4096  # the kernel's limit

        def verdict(number: int, *arguments: int, audit: int = audit, program: bytes = program) -> int:
            return _verdict(program, audit, number, *arguments)

        for name, numbers in confine.SYSCALLS.items():
            assert numbers[column] is None or verdict(numbers[column]) == kill, name
        for name, numbers in confine.PATH_CHANGES.items():
            assert numbers[column] is None or verdict(numbers[column]) == (allow if may_write else erofs), name
        assert verdict(0, audit=0x40000003) == kill  # 32-bit calls
        assert machine != "x86_64" or verdict(0x40000000 + 1) == kill
        assert (verdict(clone, 17), verdict(clone, 0x3D0F00), verdict(clone3)) == (kill, allow, enosys)
        assert (verdict(prlimit, 0, 7, 0), verdict(prlimit, 0, 7, 1), verdict(prlimit, 0, 7, 1 << 32)) == (
            allow,
            kill,
            kill,
        )
        writing = allow if may_write else erofs
        assert (verdict(openat, 0, 0, os.O_RDONLY), verdict(openat, 0, 0, os.O_RDWR)) == (allow, writing)
        for harmless in ((0, 1, 9), (63, 64, 222))[column]:  # read, write, mmap
            assert verdict(harmless) == allow


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(confine.ConfinementError, match="no system call table for vax"):
        confine.filter_program("vax", True)
