"""The seccomp filter of a sandboxed process: which system calls end it, which fail, which are looked at more closely.

Standard library only: the sandboxed process imports it before it confines itself.
Sources: the manual pages seccomp(2), bpf(4) and those of the calls, and the kernel's system call tables.
"""

import os
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
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "process_mrelease": (448, 448),
    "setrlimit": (160, 164),
    # the clock that ends the process: see `confine.set_alarm`
    "timer_settime": (223, 110),
    "timer_delete": (226, 111),
    # the network, and what outlives a process
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
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
    "file_setattr": (469, 469),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # the machine
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
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
    "syslog": (103, 116),
    "modify_ldt": (154, None),
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
}
# Looked at more closely.
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_OPEN, _OPENAT, _OPENAT2 = (2, None), (257, 56), (437, 437)
_SENDTO, _FCNTL, _IOCTL, _PRCTL = (44, 206), (72, 25), (16, 29), (157, 167)
# Allowed for the process itself (0) alone: affinity, policy and attributes of scheduling.
_SCHEDULING = ((203, 122), (144, 119), (142, 118), (314, 274))
# Who is sent which signal when a descriptor has news (F_SETOWN, F_SETSIG, F_SETOWN_EX); leases, for which others wait.
_FORBIDDEN_FCNTL = (8, 10, 15, 1024)
# What terminals and pipes are asked (TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX), and FICLONE.
# Not among them: owners of descriptors and attributes of files.
_ALLOWED_IOCTL = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5451, 0x5450, 0x40049409)

_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_ENOSYS, _EROFS = 38, 30
_LOAD, _JUMP_EQUAL, _JUMP_ABOVE, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CLONE_THREAD = 0x10000
_OPENS_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FIRST_X32_CALL = 0x40000000
_AT_FDCWD = 0xFFFFFF9C  # -100 in 32 bits
_PR_SET_PDEATHSIG = 1


class ConfinementError(OSError):
    """The kernel does not confine this process as asked."""


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


def _allow_if(index: int, values: Sequence[int], among: bool) -> list[bytes]:
    """Allows the call if the low half of its argument is `among` the values, or is not; else ends the process."""
    kill, allow = _instruction(_RETURN, _KILL), _instruction(_RETURN, _ALLOW)
    tests = [_instruction(_JUMP_EQUAL, value, len(values) - at) for at, value in enumerate(values)]
    return [_argument(index), *tests, *((kill, allow) if among else (allow, kill))]


def _allow_if_zero(index: int) -> list[bytes]:
    """Allows the call if both halves of its argument are 0; else ends the process."""
    kill, allow = _instruction(_RETURN, _KILL), _instruction(_RETURN, _ALLOW)
    test = _instruction(_JUMP_EQUAL, 0, 1)
    return [_argument(index), test, kill, _argument(index, high=True), test, kill, allow]


def _looked_at(column: int) -> list[bytes]:
    """The calls that are allowed or not by what they are given."""
    kill, allow = _instruction(_RETURN, _KILL), _instruction(_RETURN, _ALLOW)
    unknown = _instruction(_RETURN, _ERRNO | _ENOSYS)
    lines = _on_call(_CLONE3[column], unknown)  # its flags are behind a pointer; the C library then calls clone
    lines += _on_call(_CLONE[column], _argument(0), _instruction(_JUMP_BITS, _CLONE_THREAD, 1, 0), kill, allow)
    lines += _on_call(_OPENAT2[column], unknown)  # the same
    lines += _on_call(_PRLIMIT[column], *_allow_if_zero(2))
    lines += _on_call(_SENDTO[column], *_allow_if_zero(4))
    lines += _on_call(_FCNTL[column], *_allow_if(1, _FORBIDDEN_FCNTL, among=False))
    lines += _on_call(_IOCTL[column], *_allow_if(1, _ALLOWED_IOCTL, among=True))
    lines += _on_call(_PRCTL[column], *_allow_if(0, (_PR_SET_PDEATHSIG,), among=False))
    for numbers in _SCHEDULING:
        lines += _on_call(numbers[column], *_allow_if(0, (0,), among=True))
    return lines


def _opening(column: int, may_write: bool) -> list[bytes]:
    """Opening for writing: never below another descriptor, whose folder the guard does not see; else if `may_write`."""
    kill, allow = _instruction(_RETURN, _KILL), _instruction(_RETURN, _ALLOW)
    then = allow if may_write else _instruction(_RETURN, _ERRNO | _EROFS)
    writes = _instruction(_JUMP_BITS, _OPENS_TO_WRITE, 1, 0)
    lines = _on_call(_OPEN[column], _argument(1), writes, allow, then)
    place = [_argument(0), _instruction(_JUMP_EQUAL, _AT_FDCWD, 1, 0), kill, then]
    return lines + _on_call(_OPENAT[column], _argument(2), writes, allow, *place)


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
    lines = [_instruction(_LOAD, 4), _instruction(_JUMP_EQUAL, audit_name, 1, 0), kill, _instruction(_LOAD, 0)]
    if machine == "x86_64":  # the same calls once more, for programs with 32-bit pointers
        lines += [_instruction(_JUMP_ABOVE, _FIRST_X32_CALL, 0, 1), kill]
    for numbers in SYSCALLS.values():
        lines += _on_call(numbers[column], kill)
    lines += _looked_at(column) + _opening(column, may_write)
    for numbers in () if may_write else PATH_CHANGES.values():
        lines += _on_call(numbers[column], _instruction(_RETURN, _ERRNO | _EROFS))
    return b"".join([*lines, allow])
