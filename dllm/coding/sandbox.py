"""Run a generated program and its tests in a process that is confined: see docs/code_evaluation.md for what that holds.

    outcome = run_program("def add(a, b):\n    return a + b\n", "assert add(1, 2) == 3\n")
    outcome.passed, outcome.reason

Linux alone, on x86_64 and aarch64.
"""

import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dllm.utils.parsing import InputError

_MOST_REPORT_BYTES = 16_384
# What Python and its modules are read from, besides the installation itself.
_READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/random", "/dev/zero")


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Raises:
        InputError: a value out of its range.
    """

    seconds: float = 10.0  # on the clock, above 0; as many on the CPU, rounded up
    memory_mb: int = 1024  # address space in MiB, at least 128: Python itself needs most of that
    file_kb: int = 1024  # of each file that it writes and of all that it prints, in KiB, at least 1
    open_files: int = 64  # at a time, at least 16

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise InputError(f"the time limit of a program must be above 0 seconds, got {self.seconds}")
        for name, least in (("memory_mb", 128), ("file_kb", 1), ("open_files", 16)):
            if vars(self)[name] < least:
                raise InputError(f"{name} of a program must be at least {least}, got {vars(self)[name]}")

    def request(self) -> dict[str, int]:
        """As the process sets them."""
        return {
            "cpu_seconds": int(-(-self.seconds // 1)),
            "memory_bytes": self.memory_mb << 20,
            "file_bytes": self.file_kb << 10,
            "open_files": self.open_files,
        }


@dataclass(frozen=True)
class Outcome:
    """How a program did.

    passed: it came to the end of its tests.
    reason: why it did not; None if it did.
    seconds: on the clock, the start of Python included.
    """

    passed: bool
    reason: str | None
    seconds: float


def run_program(program: str, tests: str, limits: Limits | None = None, *, landlock: bool = True) -> Outcome:
    """Runs `program` and then `tests` behind it, in one namespace, in a process of its own.

    It has passed only if the process reports, after the last test, a number that was drawn for this run: whatever ends
    it before (a loop, a limit, an exception, sys.exit(0)) is a failure with a reason.

    Args:
        program: Python source; its __name__ is "solution".
        tests: Python source that raises where the program is wrong.
        limits: None: the defaults.
        landlock: False leaves Landlock out as if the kernel had none; the program can then write no file at all.

    Raises:
        InputError: this machine cannot confine a process.
    """
    _check_platform()
    limits = limits or Limits()
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder:
        request = {
            "program": program,
            "tests": tests,
            "nonce": nonce,
            "folder": os.path.realpath(folder),
            "readable": [*_READABLE, *sorted({sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix})],
            "limits": limits.request(),
            "landlock": landlock,
        }
        began = time.perf_counter()
        status, report = _run(request, folder, limits.seconds)
        seconds = time.perf_counter() - began
    if "setup" in report:
        raise InputError(
            f"this machine cannot confine a program ({report['setup']}): run where Linux allows seccomp filters, or "
            "without --allow_code_execution"
        )
    if report.get("nonce") == nonce:
        return Outcome(True, None, seconds)
    return Outcome(False, str(report.get("reason", _ending(status, limits))), seconds)


def run_programs(
    programs: Sequence[tuple[str, str]], limits: Limits | None = None, *, num_workers: int = 1
) -> list[Outcome]:
    """`run_program` of each (program, tests), `num_workers` at a time."""
    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(lambda pair: run_program(pair[0], pair[1], limits), programs))


def check_sandbox() -> str:
    """One line that says what confines programs on this machine.

    Raises:
        InputError: nothing does, or what should does not.
    """
    found = run_program("from dllm.coding.confine import landlock_version", "assert landlock_version()")
    files = "Landlock" if found.passed else "no Landlock: programs can write no file, and read all that you can"
    forked = run_program("import ctypes\nctypes.CDLL(None).fork()", "")
    if forked.passed or "SIGSYS" not in str(forked.reason):
        raise InputError(
            f"the sandbox does not stop a program that forks ({forked.reason}): run without --allow_code_execution"
        )
    return f"programs run confined by seccomp and limits; {files}"


def _check_platform() -> None:
    if sys.platform != "linux":
        raise InputError(
            f"generated programs are confined by the Linux kernel and this is {sys.platform}: run in a container of "
            "Linux, or without --allow_code_execution"
        )


def _run(request: dict[str, Any], folder: str, seconds: float) -> tuple[int | None, dict[str, Any]]:
    """(exit status, negative for a signal, None if it was stopped by the clock; report) of the process."""
    # Files and not pipes: neither a process that prints without end nor one that reads nothing holds us up.
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as report:
        asked.write(json.dumps(request).encode())
        asked.seek(0)
        process = subprocess.Popen(
            _command(),
            stdin=asked,
            stdout=report,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()
            process.wait()
        report.seek(0)
        return status, _read(report.read(_MOST_REPORT_BYTES))


def _command() -> list[str]:
    # The package may be a checkout that is not installed: its folder is on the path only for the import. Not -I: that
    # would ignore PYTHONHASHSEED too, and the environment is ours anyway.
    package = str(pathlib.Path(__file__).resolve().parents[2])
    start = f"import sys; sys.path.insert(0, {package!r}); from dllm.coding.child import main; del sys.path[0]; main()"
    return [sys.executable, "-s", "-B", "-c", start]


def _environment(folder: str) -> dict[str, str]:
    # Sets are printed and walked in one order in every run: the same answers give the same table.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": folder,
        "TMPDIR": folder,
        "PYTHONHASHSEED": "0",
        "LANG": "C.UTF-8",
        **threads,
    }


def _read(report: bytes) -> dict[str, Any]:
    """The last whole line, if it is a report."""
    for line in reversed(report.splitlines()):
        try:
            entries = json.loads(line)
        except ValueError:
            continue
        if isinstance(entries, dict):
            return entries
    return {}


def _ending(status: int | None, limits: Limits) -> str:
    """Why a process that did not say it ended."""
    if status is None:
        return f"timed out after {limits.seconds:g} s"
    if status >= 0:
        return f"ended with status {status} before its tests were done"
    if -status == signal.SIGSYS:
        return "killed by SIGSYS: it asked the system for something forbidden (a process, a signal, the network, ...)"
    name = signal.Signals(-status).name
    return f"killed by {name}: out of CPU time or memory" if name in ("SIGXCPU", "SIGKILL") else f"killed by {name}"
