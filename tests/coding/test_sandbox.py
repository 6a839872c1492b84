"""What a program cannot do in the sandbox, by the kernel and by the guard, and that it has then failed."""

import pathlib
import socket
import subprocess
import sys

import pytest

from dllm.coding import confine
from dllm.coding.sandbox import Limits, check_sandbox, remove_folder, run_program, run_programs
from dllm.utils import InputError

QUICK = Limits(seconds=1.0, memory_mb=512)
PATIENT = Limits(seconds=30.0, memory_mb=512)  # for what ends by itself: machines may be busy
SIGSYS = "killed by SIGSYS"
NATIVE = "import ctypes\nlibrary = ctypes.CDLL(None, use_errno=True)\n"


pytestmark = pytest.mark.usefixtures("confining_kernel")


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
        ("raise ValueError('\\u20ac' * 400)", "ValueError: " + "\u20ac" * 288),
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
        ("import socket\nsocket.socketpair()[0].sendmsg([b'x'], [], 0, '/x')", "uses the network"),
        ("import socket\nsocket.socketpair()[0].sendto(b'x', '/x')", "uses the network"),
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
        "library.sendmsg(0, None, 0)",
        "library.sendto(0, b'x', 1, 0, b'x' * 16, 16)",
        "library.fcntl(0, 8, PARENT)",
        "library.ioctl(0, 0x8901, ctypes.byref(ctypes.c_int(PARENT)))",
        "library.ioctl(0, 0x40086602, ctypes.byref(ctypes.c_long(0x40)))",
        "library.shmctl(0, 0, None)",
        "library.sched_setaffinity(PARENT, 8, ctypes.byref(ctypes.c_ulong(1)))",
        "library.prctl(1, 0, 0, 0, 0)",
        "library.timer_delete(ctypes.c_void_p(0))",
        "library.mkfifo(b'x', 0o600)",
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
        f"os.remove('there', dir_fd=os.open({str(tmp_path)!r}, os.O_PATH))",
        f"os.mkdir('folder', dir_fd=os.open({str(tmp_path)!r}, os.O_PATH))",
        f"import sqlite3; sqlite3.connect({str(tmp_path / 'base')!r})",
        f"os._exit = os.write = print; open({str(there)!r}, 'w')",
    ):
        outcome = run_program(
            f"import os\ntry:\n    {call}\nexcept OSError:\n    pass\n", "", PATIENT, landlock=landlock
        )
        assert not outcome.passed and "outside its folder" in outcome.reason, call
    for call in (
        f"os.open('x', os.O_CREAT | os.O_WRONLY, dir_fd=os.open({str(tmp_path)!r}, os.O_PATH))",
        f"os.mkfifo({str(tmp_path / 'pipe')!r})",
    ):
        outcome = run_program(
            f"import os\ntry:\n    {call}\nexcept OSError:\n    pass\n", "", PATIENT, landlock=landlock
        )
        assert not outcome.passed and outcome.reason.startswith(SIGSYS), call
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


WRITE = "import os\nfor number in range(3, 10):\n    try:\n        os.write(number, {!r})\n"
WRITE += "    except OSError:\n        pass\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"setup": "x"}\n', "ended with status 0 before its tests were done"),
        (b'{"setup": "x", "nonce": "y"}\n', "ended with status 0 before its tests were done"),
        (b'{"reason": "x", "more": "y"}\n', "ended with status 0 before its tests were done"),
        (b'{"reason": ["x"]}\n', "ended with status 0 before its tests were done"),
        (b"[" * 4000 + b"\n", "ended with status 0 before its tests were done"),
        (b"[" * 15000, "ended with status 0 before its tests were done"),
        (b'{"reason": "' + b"x" * 5000 + b'"}\n', "ended with status 0 before its tests were done"),
        (b'{"reason": "\\ud800 \\u001b[31mall passed\\n\\u202e"}\n', "? ?[31mall passed??"),
    ],
)
def test_what_a_program_writes_to_the_report_harms_nobody(line: bytes, reason: str) -> None:
    outcome = run_program(WRITE.format(line) + "os._exit(0)\n", "", PATIENT)
    assert (outcome.passed, outcome.reason) == (False, reason)


def test_names_of_exceptions_can_be_printed_and_stored() -> None:
    reason = run_program("raise type('\\ud800\\x1b', (Exception,), {})('x')", "", PATIENT).reason
    assert reason.isprintable() and reason.encode() and "surrogates not allowed" in reason
    assert run_program("raise ValueError('\\x1b[31m \\ud800')", "", PATIENT).reason == "ValueError: ?[31m ?"


def test_deep_folders_are_removed(tmp_path) -> None:
    if confine.landlock_version() == 0:
        pytest.skip("without Landlock no file can be written")
    program = (
        f"{NATIVE}import os\nplace = os.getcwd()\nfor _ in range(3000):\n    assert library.mkdir(b'd', 0o700) == 0\n"
        "    library.close(library.creat(b'f', 0o600))\n    library.chdir(b'd')\nraise ValueError(place)\n"
    )
    reason = run_program(program, "", PATIENT).reason
    place = pathlib.Path(reason.removeprefix("ValueError: "))
    assert place.name == "own" and not place.parent.exists()
    outside = tmp_path / "kept"
    outside.mkdir()
    base = tmp_path / "base"
    (base / "own" / "closed" / "inner").mkdir(parents=True)
    (base / "own" / "link").symlink_to(outside)
    (base / "own" / "closed").chmod(0)
    remove_folder(str(base))
    remove_folder(str(base))  # what is not there is no error
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("landlock", [True, False])
def test_nothing_is_sent_to_sockets_of_others(tmp_path, landlock: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mine:
        mine.bind(str(tmp_path / "socket"))
        mine.setblocking(False)
        program = (
            "import socket, ctypes\nname = {!r}\npair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n{}\n"
        )
        address = "b'\\x01\\x00' + name.encode() + b'\\x00'"
        native = f"address = {address}\nctypes.CDLL(None).sendto(pair[0].fileno(), b'x', 1, 0, address, len(address))"
        for call in ("pair[0].sendmsg([b'x'], [], 0, name)", "pair[0].sendto(b'x', name)", native):
            outcome = run_program(program.format(str(tmp_path / "socket"), call), "", PATIENT, landlock=landlock)
            assert not outcome.passed, call
            with pytest.raises(BlockingIOError):
                mine.recv(10)
    assert run_program("import socket\na, b = socket.socketpair()\na.send(b'x')", "assert b.recv(1) == b'x'").passed


def test_nobody_else_is_sent_a_signal() -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        program = (
            "import fcntl, socket, time\na, b = socket.socketpair()\n"
            "{}\nfcntl.fcntl(a, 4, fcntl.fcntl(a, 3) | 0o20000)\nb.send(b'x')\ntime.sleep(0.2)\n"
        )
        owner = f"__import__('struct').pack('ii', 1, {other.pid})"
        for call in (
            f"fcntl.fcntl(a, 8, {other.pid}); fcntl.fcntl(a, 10, 9)",
            f"fcntl.fcntl(a, 15, {owner}); fcntl.fcntl(a, 10, 9)",
            f"fcntl.ioctl(a, 0x8902, __import__('struct').pack('i', {other.pid}))",
        ):
            outcome = run_program(program.format(call), "", PATIENT, landlock=False)
            assert not outcome.passed and outcome.reason.startswith(SIGSYS), call
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()


def test_what_is_set_before_a_program_starts_is_set() -> None:
    """Read back by the kernel's own words: limits, no capability, no new privileges, the end with the parent."""
    program = (
        f"{NATIVE}import resource, struct\n"
        "def limit(name):\n    return resource.getrlimit(getattr(resource, f'RLIMIT_{name}'))\n"
        "held = ctypes.create_string_buffer(24)\n"
        f"assert library.capget(struct.pack('=Ii', 0x20080522, 0), held) == 0\n"
        "signal = ctypes.c_int()\nassert library.prctl(2, ctypes.byref(signal), 0, 0, 0) == 0\n"
    )
    tests = (
        "assert limit('CPU') == (3, 4)\nassert limit('AS') == (512 << 20,) * 2\nassert limit('CORE') == (0, 0)\n"
        "assert limit('FSIZE') == (16 << 10,) * 2\nassert limit('NOFILE') == (30, 30)\n"
        "assert held.raw == bytes(24)\nassert signal.value == 9\nassert library.prctl(39, 0, 0, 0, 0) == 1\n"
        "assert library.prctl(21, 0, 0, 0, 0) == 2\n"
    )
    outcome = run_program(program, tests, Limits(seconds=2.5, memory_mb=512, file_kb=16, open_files=30))
    assert outcome.reason is None


def test_the_kernel_ends_what_nobody_watches() -> None:
    code = (
        "import signal, time\nfrom dllm.coding import confine\nconfine.set_alarm(0.2)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ntime.sleep(60)\n"
    )
    root = pathlib.Path(confine.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == -9


def test_a_program_is_a_module_of_its_own() -> None:
    program = (
        "from __future__ import annotations\nimport dataclasses, pickle\nfrom typing import get_type_hints\n"
        "@dataclasses.dataclass\nclass A:\n    x: int\n    y: B = None\nclass B:\n    pass\n"
    )
    tests = "assert pickle.loads(pickle.dumps(A(1))) == A(1)\nassert get_type_hints(A)['y'] is B\n"
    tests += "from solution import A as again\nassert again is A\ndef f(x: undefined = 1): pass\n"
    assert run_program(program, tests, PATIENT).reason == "NameError: name 'undefined' is not defined"


def test_one_file_may_be_written_often() -> None:
    if confine.landlock_version() == 0:
        pytest.skip("without Landlock no file can be written")
    program = "for _ in range(200):\n    with open('output.txt', 'w') as file:\n        file.write('x')\n"
    program += "print('y', flush=True)\n"
    assert run_program(
        program, "import os\nassert os.listdir() == ['output.txt'] and len(open('output.txt').read()) == 1"
    ).passed


def test_the_check_says_what_is_wrong(monkeypatch) -> None:
    assert "programs run confined by seccomp and limits; " in check_sandbox()
    with pytest.raises(InputError, match=r"an empty program fails in the sandbox \(timed out after 0.001 s\): raise"):
        check_sandbox(Limits(seconds=0.001))


def test_several_at_a_time_keep_their_order() -> None:
    outcomes = run_programs([(f"x = {index}", f"assert x % 2 == 0, {index}") for index in range(5)], num_workers=3)
    assert [outcome.reason for outcome in outcomes] == [None, "AssertionError: 1", None, "AssertionError: 3", None]


def test_limits_are_checked() -> None:
    for name, value in (("seconds", 0), ("memory_mb", 1), ("file_kb", 7), ("open_files", 3)):
        with pytest.raises(InputError, match=f"must be .*got {value}"):
            Limits(**{name: value})
