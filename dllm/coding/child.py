"""The sandboxed process: it confines itself, runs a program and its tests, and reports how that went.

`dllm.coding.sandbox` starts it. Standard input is a JSON request, standard output takes one JSON line: {"nonce": ...}
after the last test, {"reason": ...} where something failed, {"setup": ...} where it could not be confined.
"""

import json
import os
import resource
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from dllm.coding import confine

SETUP_FAILED, FORBIDDEN = 70, 77  # exit statuses
MOST_WRITES = 64  # files that a program may open for writing or folders it may make, so that the disk stays free
_TESTS = "<tests>"

# Audit events that end the process, by what they mean.
_STARTS = "starts a process"
_SIGNALS = "sends a signal"
_NETWORK = "uses the network"
_FORBIDDEN_EVENTS = {
    **dict.fromkeys(("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system"), _STARTS),
    **dict.fromkeys(("subprocess.Popen", "pty.spawn"), _STARTS),
    **dict.fromkeys(("os.kill", "os.killpg", "signal.pthread_kill"), _SIGNALS),
    **dict.fromkeys(("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"), _NETWORK),
    **dict.fromkeys(("resource.setrlimit", "resource.prlimit"), "changes its limits"),
    **dict.fromkeys(("os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr"), "changes file properties"),
}
_PATH_EVENTS = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
_OPENS_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Guard:
    """An audit hook that ends the process at what it must not do, and says why.

    The kernel holds without it; but a program could catch the kernel's errors and go on to pass its tests.

    Args:
        folder: the only one to write in.
        report: descriptor for the reason.
    """

    def __init__(self, folder: str, report: int) -> None:
        self.folder, self.report = folder, report
        self.num_writes = 0

    def __call__(self, event: str, arguments: Sequence[Any]) -> None:
        if event in _FORBIDDEN_EVENTS:
            self.refuse(_FORBIDDEN_EVENTS[event])
        if event == "open" and arguments[2] & _OPENS_TO_WRITE:
            self.check(arguments[:1], "opens {} for writing")
        elif event in _PATH_EVENTS:
            self.check(arguments[:2], f"{event.removeprefix('os.')} of {{}}")

    def check(self, paths: Sequence[Any], what: str) -> None:
        """Refuses a path outside the folder, and too many of them inside."""
        for path in paths:
            if not isinstance(path, (str, bytes)):
                continue  # an open descriptor, or a number that is no path
            place = os.path.realpath(os.fsdecode(path))
            if place != os.devnull and os.path.commonpath([place, self.folder]) != self.folder:
                self.refuse(f"{what.format(repr(place))}, outside its folder")
        self.num_writes += 1
        if self.num_writes > MOST_WRITES:
            self.refuse(f"writes more than {MOST_WRITES} files")

    def refuse(self, reason: str) -> NoReturn:
        """Ends the process."""
        send(self.report, reason=f"forbidden: {reason}")
        os._exit(FORBIDDEN)


def send(report: int, **entries: Any) -> None:
    """Writes the report."""
    os.write(report, json.dumps(entries).encode() + b"\n")


def redirect(folder: str) -> int:
    """Standard input at its end and output into a file of the folder; the descriptor that was standard output."""
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(os.path.join(folder, "output.txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - what was read ahead of the request is gone with the old one
    return report


def set_limits(limits: dict[str, int]) -> None:
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
    """Limits, privileges, files, system calls; see `dllm.coding.confine`."""
    set_limits(request["limits"])
    confine.drop_privileges()
    version = confine.restrict_files(request["folder"], request["readable"]) if request["landlock"] else 0
    confine.apply_filter(may_write=version > 0)


def reason_of(error: BaseException, tests: str) -> str:
    """One line about an exception; of a failed test that says nothing, the test."""
    text = " ".join(traceback.format_exception_only(type(error), error)[-1].split())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _TESTS]
    if isinstance(error, AssertionError) and not str(error) and frames:
        text += f": {tests.splitlines()[(frames[-1].lineno or 1) - 1].strip()}"
    return text[:300]


def main() -> NoReturn:
    """Does what the request on standard input asks."""
    request = json.load(sys.stdin)
    tests = request["tests"]
    report = redirect(request["folder"])
    try:
        confine_self(request)
    except (confine.ConfinementError, ValueError) as error:
        send(report, setup=str(error))
        os._exit(SETUP_FAILED)

    def tell(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        send(report, reason=reason_of(error, tests))

    sys.excepthook = tell
    sys.addaudithook(Guard(request["folder"], report))
    # Not __main__: a program's own demonstration is not run.
    names: dict[str, Any] = {"__name__": "solution"}
    exec(compile(request["program"], "<program>", "exec"), names)
    exec(compile(tests, _TESTS, "exec"), names)
    sys.stdout.flush()
    most = request["limits"]["file_bytes"]
    if os.fstat(1).st_size >= most:  # the error that this raised was caught
        send(report, reason=f"prints more than {most >> 10} KiB")
    else:
        send(report, nonce=request["nonce"])
    os._exit(0)  # no handler of the program, and no thread of it, has a say any more
