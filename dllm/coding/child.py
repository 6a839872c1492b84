"""The sandboxed process: it confines itself, runs a program and its tests, and reports how that went.

`dllm.coding.sandbox` starts it. Standard input is a JSON request, standard output takes one JSON line: {"nonce": ...}
after the last test, {"reason": ...} where something failed, {"setup": ..., "nonce": ...} where it is not confined.
"""

import json
import os
import resource
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from dllm.coding import confine

SETUP_FAILED, FORBIDDEN = 70, 77  # exit statuses
MOST_WRITES = 64  # files that a program may open for writing, make or rename, so that the disk stays free
_TESTS = "<tests>"
_GRACE_SECONDS = 5  # after which the kernel ends a process that nobody stopped

# Audit events that end the process, by what they mean.
_STARTS = "starts a process"
_SIGNALS = "sends a signal"
_NETWORK = "uses the network"
_FORBIDDEN_EVENTS = {
    **dict.fromkeys(("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system"), _STARTS),
    **dict.fromkeys(("subprocess.Popen", "pty.spawn"), _STARTS),
    **dict.fromkeys(("os.kill", "os.killpg", "signal.pthread_kill"), _SIGNALS),
    **dict.fromkeys(("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"), _NETWORK),
    **dict.fromkeys(("socket.sendmsg",), _NETWORK),
    **dict.fromkeys(("resource.setrlimit", "resource.prlimit"), "changes its limits"),
    **dict.fromkeys(("os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr"), "changes file properties"),
}
# Audit events about paths: where among the arguments each path is, and the descriptor that it starts from (None: none).
_PATH_EVENTS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),  # what the link says is text, and is looked at where it is opened
    "os.truncate": ((0, None),),
    "sqlite3.connect": ((0, None),),
    "open": ((0, None),),
}
_FOLLOWED = ("open", "os.truncate", "sqlite3.connect")  # these go where a link leads, the others act on the link
_OPENS_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Bound here, so that a program that replaces them in `os` does not replace them for us.
_exit, _write, _encode = os._exit, os.write, json.JSONEncoder().encode
_real, _join, _split, _common = os.path.realpath, os.path.join, os.path.split, os.path.commonpath


def _place(event: str, path: Any, descriptor: int) -> str:
    """Where a path of an event leads, without links."""
    name = os.fsdecode(path)
    if event == "sqlite3.connect":
        name = name.removeprefix("file:").partition("?")[0]
    if descriptor >= 0:
        name = _join(_real(f"/proc/self/fd/{descriptor}"), name)
    if event in _FOLLOWED:
        return _real(name)
    folder, last = _split(name.rstrip("/"))
    return _real(name) if last in ("", ".", "..") else _join(_real(folder), last)


class Guard:
    """An audit hook that ends the process at what it must not do, and says why.

    The kernel holds without it; but a program could catch the kernel's errors and go on to pass its tests.

    Args:
        folder: the only one to write in.
        report: descriptor for the reason.
    """

    def __init__(self, folder: str, report: int) -> None:
        self.folder, self.report = folder, report
        self.written: set[str] = set()

    def __call__(self, event: str, arguments: Sequence[Any]) -> None:
        if event in _FORBIDDEN_EVENTS:
            self.refuse(_FORBIDDEN_EVENTS[event])
        if event not in _PATH_EVENTS or (event == "open" and not arguments[2] & _OPENS_TO_WRITE):
            return
        for at, start in _PATH_EVENTS[event]:
            if isinstance(arguments[at], (str, bytes, os.PathLike)):  # else an open descriptor
                self.check(event, arguments[at], -1 if start is None else arguments[start])

    def check(self, event: str, path: Any, descriptor: int) -> None:
        """Refuses a path outside the folder, and too many of them inside."""
        if event == "sqlite3.connect" and path in ("", b"", ":memory:", b":memory:"):
            return
        place = _place(event, path, descriptor)
        if place == os.devnull:
            return
        if _common([place, self.folder]) != self.folder:
            what = "opens {} for writing" if event == "open" else f"{event.removeprefix('os.')} of {{}}"
            self.refuse(f"{what.format(repr(place))}, outside its folder")
        self.written.add(place)
        if len(self.written) > MOST_WRITES:
            self.refuse(f"writes more than {MOST_WRITES} files")

    def refuse(self, reason: str) -> NoReturn:
        """Ends the process."""
        send(self.report, reason=f"forbidden: {reason}"[:300])
        _exit(FORBIDDEN)


def send(report: int, **entries: str) -> None:
    """Writes the report, in one short line."""
    _write(report, _encode(entries).encode() + b"\n")


def redirect(folder: str) -> int:
    """Standard input at its end and output into a file without a name; the descriptor that was standard output."""
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    name = os.path.join(folder, "output")
    output = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.unlink(name)  # the program's folder is its own
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - what was read ahead of the request is gone with the old one
    return report


def set_limits(limits: dict[str, Any]) -> None:
    """Seconds of CPU, bytes of memory and of a file, open files; no core files."""
    seconds = limits["cpu_seconds"]
    values = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_AS: (limits["memory_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (limits["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (limits["open_files"],) * 2,
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, (soft, hard) in values.items():
        resource.setrlimit(kind, (soft, hard))


def confine_self(request: dict[str, Any]) -> None:
    """Clock, limits, privileges, files, system calls; see `dllm.coding.confine`."""
    confine.set_alarm(request["limits"]["seconds"] + _GRACE_SECONDS)
    set_limits(request["limits"])
    confine.drop_privileges()
    version = confine.restrict_files(request["folder"], request["readable"]) if request["landlock"] else 0
    confine.apply_filter(may_write=version > 0)


def reason_of(error: BaseException, tests: str) -> str:
    """One line about an exception; of a failed test that says nothing, the test."""
    text = " ".join(traceback.format_exception_only(type(error), error)[-1].split())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _TESTS]
    if isinstance(error, AssertionError) and not str(error) and frames:
        line = tests.split("\n")[(frames[-1].lineno or 1) - 1]
        text += f": {line.strip()}"
    return text[:300]


def main() -> NoReturn:
    """Does what the request on standard input asks."""
    request = json.load(sys.stdin)
    tests = request["tests"]
    report = redirect(request["folder"])
    try:
        confine_self(request)
    except (confine.ConfinementError, ValueError) as error:
        send(report, setup=str(error)[:300], nonce=request["nonce"])
        _exit(SETUP_FAILED)

    def tell(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        send(report, reason=reason_of(error, tests))

    sys.excepthook = tell
    # Not __main__: a program's own demonstration is not run. A module, so that classes can be looked up and pickled.
    module = types.ModuleType("solution")
    sys.modules[module.__name__] = module
    sys.addaudithook(Guard(request["folder"], report))
    exec(compile(request["program"], "<program>", "exec", dont_inherit=True), vars(module))
    exec(compile(tests, _TESTS, "exec", dont_inherit=True), vars(module))
    finish(report, request)


def finish(report: int, request: dict[str, Any]) -> NoReturn:
    """Reports that the end was reached, and ends: no handler and no thread of the program has a say any more."""
    if sys.stdout is not None:
        sys.stdout.flush()
    most = request["limits"]["file_bytes"]
    if os.fstat(1).st_size >= most:  # the error that this raised was caught
        send(report, reason=f"prints more than {most >> 10} KiB")
    else:
        send(report, nonce=request["nonce"])
    _exit(0)
