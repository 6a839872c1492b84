"""What the kernel is asked to keep a process from: a seccomp filter and Landlock rules, both for the rest of its life.

Standard library only, and no package of ours: the sandboxed process imports it before it confines itself.
Sources: the manual pages seccomp(2), prctl(2), capset(2) and landlock(7), and the kernel's system call tables.
"""

import ctypes
import os
import platform
import struct
from collections.abc import Sequence

# Columns of SYSCALLS, and the kernel's name (AUDIT_ARCH) of each machine.
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# What no generated program needs, by name: number on x86_64, on aarch64 (None: not there). A call ends the process.
SYSCALLS: dict[str, tuple[int | None, int | None]] = {
    # other programs and processes
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "setpriority": (141, 140),
    "setrlimit": (160, 164),
    # the network, and what outlives a process
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # properties of files, which Landlock does not guard
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "truncate": (76, 45),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # the machine
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "fanotify_init": (300, 262),
    "personality": (135, 92),
    "iopl": (172, None),
    "ioperm": (173, None),
}
# Refused with "read-only file system" where there is no Landlock to tell one folder from another.
PATH_CHANGES: dict[str, tuple[int | None, int | None]] = {
    "creat": (85, None),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "mknod": (133, None),
    "mknodat": (259, 33),
}
# Looked at more closely.
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_OPEN, _OPENAT, _OPENAT2 = (2, None), (257, 56), (437, 437)

_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_ENOSYS, _EROFS = 38, 30
_LOAD, _JUMP_EQUAL, _JUMP_ABOVE, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CLONE_THREAD = 0x10000
_OPENS_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FIRST_X32_CALL = 0x40000000

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT, _CAPSET = 444, 445, 446, {"x86_64": 126, "aarch64": 91}
# Landlock's rights: bits of one number.
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_EXECUTE, _MAKE_SPECIAL = 1 << 0, (1 << 6) | (1 << 9) | (1 << 10) | (1 << 11)


class ConfinementError(OSError):
    """The kernel does not confine this process as asked."""


def _call(function: str, *arguments) -> int:
    """A function of the C library that returns a negative number on failure.

    Raises:
        ConfinementError: it failed.
    """
    library = ctypes.CDLL(None, use_errno=True)
    result = library[function](*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise ConfinementError(number, f"{function}: {os.strerror(number)}")
    return result


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _argument(index: int, high: bool = False) -> bytes:
    """Loads half of a system call's argument (both machines are little-endian)."""
    return _instruction(_LOAD, 16 + 8 * index + 4 * high)


def _on_call(number: int | None, *then: bytes) -> list[bytes]:
    """`then` for one system call; what follows for the others, and behind `then`."""
    if number is None:
        return []
    return [_instruction(_JUMP_EQUAL, number, 0, len(then)), *then]


def filter_program(machine: str, may_write: bool) -> bytes:
    """The seccomp filter: SYSCALLS end the process, threads are allowed and processes are not, limits stay as they are.

    Args:
        machine: as platform.machine() names it.
        may_write: False: files are opened for reading only and no path changes.

    Raises:
        ConfinementError: the numbers of this machine's system calls are not known.
    """
    if machine not in _MACHINES:
        raise ConfinementError(f"no system call table for {machine}; known: {', '.join(_MACHINES)}")
    column, audit_name = _MACHINES[machine]
    kill, allow = _instruction(_RETURN, _KILL), _instruction(_RETURN, _ALLOW)
    read_only, unknown = _instruction(_RETURN, _ERRNO | _EROFS), _instruction(_RETURN, _ERRNO | _ENOSYS)
    lines = [_instruction(_LOAD, 4), _instruction(_JUMP_EQUAL, audit_name, 1, 0), kill, _instruction(_LOAD, 0)]
    if machine == "x86_64":  # the same calls once more, for programs with 32-bit pointers
        lines += [_instruction(_JUMP_ABOVE, _FIRST_X32_CALL, 0, 1), kill]
    for numbers in SYSCALLS.values():
        lines += _on_call(numbers[column], kill)
    lines += _on_call(_CLONE3[column], unknown)  # its flags are behind a pointer; the C library then calls clone
    lines += _on_call(_CLONE[column], _argument(0), _instruction(_JUMP_BITS, _CLONE_THREAD, 1, 0), kill, allow)
    new_limit = [_argument(2), _instruction(_JUMP_EQUAL, 0, 1, 0), kill]
    new_limit += [_argument(2, high=True), _instruction(_JUMP_EQUAL, 0, 1, 0), kill, allow]
    lines += _on_call(_PRLIMIT[column], *new_limit)
    if not may_write:
        for numbers in PATH_CHANGES.values():
            lines += _on_call(numbers[column], read_only)
        lines += _on_call(_OPENAT2[column], unknown)
        for numbers, flags in ((_OPEN, 1), (_OPENAT, 2)):
            test = [_argument(flags), _instruction(_JUMP_BITS, _OPENS_TO_WRITE, 0, 1), read_only, allow]
            lines += _on_call(numbers[column], *test)
    return b"".join([*lines, allow])


def apply_filter(may_write: bool) -> None:
    """Puts the filter of this machine in place.

    Raises:
        ConfinementError: this kernel has no seccomp filters, or the machine is not known.
    """
    program = filter_program(platform.machine(), may_write)
    lines = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(lines))
    _call("prctl", _PR_SET_SECCOMP, 2, ctypes.c_char_p(header), 0, 0)


def drop_privileges() -> None:
    """No capability from now on, also as root, none through programs with a set-user-id bit, and no life without the
    parent."""
    _call("prctl", _PR_SET_PDEATHSIG, 9, 0, 0, 0)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    nothing = struct.pack("=Ii6I", 0x20080522, 0, *[0] * 6)
    _call("syscall", _CAPSET[platform.machine()], ctypes.c_char_p(nothing[:8]), ctypes.c_char_p(nothing[8:]))


def landlock_version() -> int:
    """Version of the kernel's Landlock interface; 0 where it has none or may not be used."""
    try:
        return _call("syscall", _LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    except ConfinementError:
        return 0


def restrict_files(folder: str, readable: Sequence[str]) -> int:
    """Files: everything in `folder`, reading below `readable`, nothing else; also no TCP and no signals to others.

    Args:
        folder: the one to write in.
        readable: folders and files; those that do not exist are passed over.

    Returns:
        Version of Landlock; 0: there is none and nothing was done.

    Raises:
        ConfinementError: Landlock is there and refuses.
    """
    version = landlock_version()
    if version == 0:
        return 0
    every = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
    network, scopes = (3, 3) if version >= 6 else (3, 0) if version >= 4 else (0, 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    handled = ctypes.c_char_p(struct.pack("=QQQ", every, network, scopes))
    rules = _call("syscall", _LANDLOCK_CREATE, handled, ctypes.c_size_t(size), 0)
    reading = _READ_FILE | _READ_DIR
    wanted = [(folder, every & ~(_EXECUTE | _MAKE_SPECIAL)), ("/dev/null", _READ_FILE | _WRITE_FILE | _TRUNCATE)]
    for path, rights in [*wanted, *((path, reading) for path in readable)]:
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.c_char_p(struct.pack("=Qi", rights & every, place))
        _call("syscall", _LANDLOCK_ADD, rules, 1, rule, 0)
        os.close(place)
    _call("syscall", _LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)
    return version
