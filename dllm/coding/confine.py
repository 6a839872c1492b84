"""What the kernel is asked to keep a process from: a seccomp filter and Landlock rules, both for the rest of its life.

Standard library only: the sandboxed process imports it before it confines itself. The filter: `dllm.coding.seccomp`.
Sources: the manual pages seccomp(2), prctl(2), capset(2), timer_create(2) and landlock(7).
"""

import ctypes
import os
import platform
import struct
from collections.abc import Sequence

from dllm.coding.seccomp import ConfinementError, filter_program

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_TIMER_CREATE, _TIMER_SETTIME = {"x86_64": 222, "aarch64": 107}, {"x86_64": 223, "aarch64": 110}
_CLOCK_MONOTONIC, _SIGEV_SIGNAL, _SIGKILL = 1, 0, 9
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT, _CAPSET = 444, 445, 446, {"x86_64": 126, "aarch64": 91}
# Landlock's rights: bits of one number.
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_EXECUTE, _MAKE_SPECIAL = 1 << 0, (1 << 6) | (1 << 9) | (1 << 10) | (1 << 11)


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
    _call("prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    nothing = struct.pack("=Ii6I", 0x20080522, 0, *[0] * 6)
    _call("syscall", _CAPSET[platform.machine()], ctypes.c_char_p(nothing[:8]), ctypes.c_char_p(nothing[8:]))


def set_alarm(seconds: float) -> None:
    """The kernel ends the process after so many seconds on the clock, whatever it does and whoever watches it.

    A timer and not alarm(2): SIGKILL cannot be handled, and the filter keeps timers as they are.

    Raises:
        ConfinementError: the kernel has no such timer.
    """
    machine, timer = platform.machine(), ctypes.c_int()
    if machine not in _TIMER_CREATE:
        raise ConfinementError(f"no system call table for {machine}; known: {', '.join(_TIMER_CREATE)}")
    event = ctypes.c_char_p(struct.pack("=Qii48x", 0, _SIGKILL, _SIGEV_SIGNAL))
    _call("syscall", _TIMER_CREATE[machine], _CLOCK_MONOTONIC, event, ctypes.byref(timer))
    value = ctypes.c_char_p(struct.pack("=4q", 0, 0, int(seconds), int(seconds % 1 * 1e9)))
    _call("syscall", _TIMER_SETTIME[machine], timer, 0, value, None)


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
