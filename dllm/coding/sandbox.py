"""Run a generated program and its tests in a process that is confined: see docs/code_evaluation.md for what that holds.

    outcome = run_program("def add(a, b):\n    return a + b\n", "assert add(1, 2) == 3\n")
    outcome.passed, outcome.reason

Linux alone, on x86_64 and aarch64.
"""

import contextlib
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

from dllm.coding import confine
from dllm.utils.parsing import InputError

_MOST_REPORT_BYTES, _MOST_LINE_BYTES = 16_384, 4_096
_REPORTS = ({"nonce"}, {"reason"}, {"setup", "nonce"})  # entries that a report has, all of them text
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
    file_kb: int = 1024  # of each file that it writes and of all that it prints, in KiB, at least 8: reports take some
    open_files: int = 64  # at a time, at least 16

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise InputError(f"the time limit of a program must be above 0 seconds, got {self.seconds}")
        for name, least in (("memory_mb", 128), ("file_kb", 8), ("open_files", 16)):
            if vars(self)[name] < least:
                raise InputError(f"{name} of a program must be at least {least}, got {vars(self)[name]}")

    def request(self) -> dict[str, float]:
        """As the process sets them."""
        return {
            "seconds": self.seconds,
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
    base = os.path.realpath(tempfile.mkdtemp(prefix="program-"))
    folder = os.path.join(base, "own")
    try:
        os.mkdir(folder, 0o700)
        request = {
            "program": program,
            "tests": tests,
            "nonce": nonce,
            "folder": folder,
            "readable": [*_READABLE, *sorted({sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix})],
            "limits": limits.request(),
            "landlock": landlock,
        }
        began = time.perf_counter()
        status, report = _run(request, folder, limits.seconds)
        seconds = time.perf_counter() - began
    finally:
        remove_folder(base)
    if report.get("nonce") == nonce and "setup" in report:
        raise InputError(
            f"this machine cannot confine a program ({report['setup']}): run where Linux allows seccomp filters, or "
            "without --allow_code_execution"
        )
    if report.get("nonce") == nonce:
        return Outcome(True, None, seconds)
    return Outcome(False, report.get("reason", _ending(status, limits)), seconds)


def remove_folder(base: str) -> None:
    """Deletes a folder with all that is in it; what cannot be deleted stays.

    Not shutil.rmtree: a program can nest folders deeper than Python recurses and than a path may be long. Each folder
    is moved up to `base` before it is looked into.

    Args:
        base: holds folders to which nobody writes any more.
    """
    waiting, number = [entry.path for entry in _entries(base)], 0
    while waiting:
        place = waiting.pop()
        for entry in _entries(place):
            with contextlib.suppress(OSError):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)
                moved = os.path.join(base, f"moved-{number}")
                os.rename(entry.path, moved)
                waiting.append(moved)
                number += 1
        with contextlib.suppress(OSError):
            os.rmdir(place)
    with contextlib.suppress(OSError):
        os.rmdir(base)


def _entries(place: str) -> list[os.DirEntry[str]]:
    try:
        os.chmod(place, 0o700)
        with os.scandir(place) as found:
            return list(found)
    except OSError:
        return []


def run_programs(
    programs: Sequence[tuple[str, str]], limits: Limits | None = None, *, num_workers: int = 1
) -> list[Outcome]:
    """`run_program` of each (program, tests), `num_workers` at a time."""
    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(lambda pair: run_program(pair[0], pair[1], limits), programs))


def check_sandbox(limits: Limits | None = None) -> str:
    """One line that says what confines programs on this machine.

    Args:
        limits: of the programs; None: the defaults.

    Raises:
        InputError: nothing does, what should does not, or even an empty program fails.
    """
    started = run_program("", "", limits)
    if not started.passed:
        raise InputError(
            f"an empty program fails in the sandbox ({started.reason}): raise --timeout and --memory_mb, or run "
            "without --allow_code_execution"
        )
    forked = run_program("import ctypes\nctypes.CDLL(None).fork()", "", limits)
    if forked.passed:
        raise InputError("the sandbox does not stop a program that forks: run without --allow_code_execution")
    if "SIGSYS" not in str(forked.reason):
        raise InputError(
            f"whether the sandbox stops a program that forks cannot be seen ({forked.reason}): raise --timeout and "
            "--memory_mb, or run without --allow_code_execution"
        )
    has_rules = confine.landlock_version() > 0
    files = "Landlock" if has_rules else "no Landlock: programs can write no file, and read all that you can"
    return f"programs run confined by seccomp and limits; {files}"


def _check_platform() -> None:
    if sys.platform != "linux":
        raise InputError(
            f"generated programs are confined by the Linux kernel and this is {sys.platform}: run in a container of "
            "Linux, or without --allow_code_execution"
        )


def _run(request: dict[str, Any], folder: str, seconds: float) -> tuple[int | None, dict[str, str]]:
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


def _read(report: bytes) -> dict[str, str]:
    """The last line that is a report; {} if there is none. A program can write there too: nothing in it is trusted."""
    for line in reversed(report.split(b"\n")):
        if len(line) > _MOST_LINE_BYTES:
            continue
        try:
            entries = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(entries, dict) or set(entries) not in _REPORTS:
            continue
        if all(isinstance(value, str) for value in entries.values()):
            return {name: _printable(value) for name, value in entries.items()}
    return {}


def _printable(text: str) -> str:
    """One line without control characters and halves of characters, for files and terminals."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:300]


def _ending(status: int | None, limits: Limits) -> str:
    """Why a process that did not say it ended."""
    if status is None:
        return f"timed out after {limits.seconds:g} s"
    if status >= 0:
        return f"ended with status {status} before its tests were done"
    if -status == signal.SIGSYS:
        return "killed by SIGSYS: it asked the system for something forbidden (a process, a signal, the network, ...)"
    known = {number.value: number.name for number in signal.Signals}
    name = known.get(-status, f"signal {-status}")
    return f"killed by {name}: out of CPU time or memory" if name in ("SIGXCPU", "SIGKILL") else f"killed by {name}"
