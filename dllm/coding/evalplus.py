"""HumanEval+ and MBPP+ through the package evalplus (arXiv 2305.01210), where its data file is at hand.

The file is named by the environment variable that evalplus itself reads: HUMANEVAL_OVERRIDE_PATH, MBPP_OVERRIDE_PATH.
evalplus runs programs with its own guard, not in `dllm.coding.sandbox`.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from dllm.coding.problems import Problem, Task
from dllm.data.files import read_jsonl
from dllm.utils.parsing import InputError

OVERRIDES: dict[Task, str] = {"humaneval": "HUMANEVAL_OVERRIDE_PATH", "mbpp": "MBPP_OVERRIDE_PATH"}
_PASSED = "pass"
# All that evalplus, and so the programs that it runs, see of the environment: no tokens and no keys.
_PASSED_ON = (
    *("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "PYTHONPATH", "LD_LIBRARY_PATH", "XDG_CACHE_HOME"),
    *("EVALPLUS_MAX_MEMORY_BYTES", "EVALPLUS_TIMEOUT_PER_TASK"),
)


def data_file(task: Task) -> str | None:
    """The data file that the environment names; None: it names none."""
    return os.environ.get(OVERRIDES[task]) or None


def check_installed() -> None:
    """Nothing, if evalplus can be used.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("evalplus") is None:
        names = " and ".join(OVERRIDES.values())
        raise InputError(
            f"evalplus is not installed: pip install evalplus==0.3.1, or unset {names} and give --data FILE"
        )


def load_plus_problems(task: Task, path: str) -> list[Problem]:
    """The problems of evalplus's data file, without tests.

    Raises:
        InputError: the file cannot be read, or is another's.
    """
    problems = []
    for number, row in enumerate(read_jsonl(path), 1):
        missing = [field for field in ("task_id", "prompt", "entry_point", "plus_input") if field not in row]
        if missing:
            raise InputError(f"{path}, row {number} has no field {missing[0]!r}: {OVERRIDES[task]} is no evalplus file")
        prompt, name = str(row["prompt"]), str(row["entry_point"])
        # The prompts of MBPP+ are docstrings that hold text and a test.
        stub, text = (prompt, "") if task == "humaneval" else ("", prompt.strip().strip('"').strip())
        problems.append(Problem(str(row["task_id"]), stub, text, name, "", ""))
    if not problems:
        raise InputError(f"{path} holds no problem of {task}: correct {OVERRIDES[task]}")
    return problems


def evaluate(task: Task, programs: Mapping[str, str], path: str, num_workers: int) -> dict[str, tuple[bool, bool]]:
    """{task_id: (passed the original tests, passed those and evalplus's further ones)}.

    Args:
        task: of which evalplus has the tests.
        programs: source by task_id; problems without one are left out.
        path: evalplus's data file.
        num_workers: programs that run at a time.

    Raises:
        InputError: evalplus is not installed, or fails (its last line is told).
    """
    check_installed()
    with tempfile.TemporaryDirectory(prefix="evalplus-") as folder:
        # evalplus wants a program for every problem of its file: it gets a file of those that have one.
        rows = [row for row in read_jsonl(path) if str(row["task_id"]) in programs]
        data = _write(folder, "data.jsonl", rows)
        answers = [{"task_id": name, "solution": program} for name, program in programs.items()]
        samples = _write(folder, "samples.jsonl", answers)
        words = ["--dataset", task, "--samples", samples, "--parallel", str(num_workers)]
        done = subprocess.run(
            [sys.executable, "-m", "evalplus.evaluate", *words],
            env={**{name: os.environ[name] for name in _PASSED_ON if name in os.environ}, OVERRIDES[task]: data},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        results = pathlib.Path(samples.replace(".jsonl", "_eval_results.json"))
        if done.returncode != 0 or not results.is_file():
            said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
            raise InputError(f"evalplus failed ({said}): run `python -m evalplus.evaluate` on its own to see why")
        return _verdicts(json.loads(results.read_text()))


def _write(folder: str, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    path = pathlib.Path(folder, name)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def _verdicts(results: Mapping[str, Any]) -> dict[str, tuple[bool, bool]]:
    """From evalplus's result file: one answer for each problem."""
    verdicts = {}
    for name, (answer, *_) in results["eval"].items():
        base = answer["base_status"] == _PASSED
        verdicts[name] = (base, base and answer["plus_status"] == _PASSED)
    return verdicts
