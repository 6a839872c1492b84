"""The problems of HumanEval (arXiv 2107.03374) and MBPP (arXiv 2108.07732): data files, prompts, tests."""

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dllm.data.files import read_jsonl
from dllm.utils.parsing import InputError

Task = Literal["humaneval", "mbpp"]
PromptKind = Literal["chat", "raw"]
MBPP_TEST_IDS = range(11, 511)  # the split that scores are published on; the others are for prompts and training

_FIELDS = {
    "humaneval": ("task_id", "prompt", "entry_point", "test"),
    "mbpp": ("task_id", "text", "test_list", "test_setup_code"),
}


@dataclass(frozen=True)
class Problem:
    """One programming problem.

    task_id: name in the data file.
    stub: the beginning of the code that is asked for: imports, signature, docstring; empty for MBPP.
    text: what is asked for in words; empty for HumanEval.
    entry_point: function that is tested, which the stub begins if there is one; None: the tests say what they call.
    shown_tests: tests that the prompt shows apart from the text, one per line.
    tests: source that is run behind the program; empty where evalplus has the tests.
    """

    task_id: str
    stub: str
    text: str
    entry_point: str | None
    shown_tests: str
    tests: str

    def raw_prompt(self) -> str:
        """What a base model continues."""
        return self.stub or '"""\n' + "".join(f"{part}\n" for part in (self.text, self.shown_tests) if part) + '"""\n'

    def chat_prompt(self) -> str:
        """What a chat model is asked."""
        if self.stub:
            return (
                "Complete the Python function below. Answer with one code block that holds the whole function.\n\n"
                f"```python\n{self.stub.strip()}\n```"
            )
        tests = f"\nThe code must pass these tests:\n\n```python\n{self.shown_tests}\n```" if self.shown_tests else ""
        return f"{self.text}{tests}\n\nAnswer with one block of Python code, without the tests."


def _humaneval(row: Mapping[str, Any]) -> Problem:
    entry_point = str(row["entry_point"])
    tests = f"{row['test']}\ncheck({entry_point})\n"
    return Problem(str(row["task_id"]), str(row["prompt"]), "", entry_point, "", tests)


def _mbpp(row: Mapping[str, Any]) -> Problem:
    shown = "\n".join(str(test).strip() for test in row["test_list"])
    tests = f"{row['test_setup_code']}\n{shown}\n".replace("\r\n", "\n")
    return Problem(f"MBPP/{row['task_id']}", "", str(row["text"]).strip(), None, shown, tests)


def load_problems(task: Task, path: str | pathlib.Path, all_rows: bool = False) -> list[Problem]:
    """The problems of a benchmark's own data file, in its order.

    Args:
        task: whose file it is.
        path: HumanEval.jsonl, mbpp.jsonl, plain or with .gz.
        all_rows: of mbpp, also the rows outside MBPP_TEST_IDS.

    Raises:
        InputError: the file cannot be read, holds nothing, or is another's (the missing field is named).
    """
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        missing = [field for field in _FIELDS[task] if field not in row]
        if missing:
            raise InputError(f"{path}, row {number} has no field {missing[0]!r}: this is no file of {task}")
    if task == "mbpp" and not all_rows:
        rows = [row for row in rows if row["task_id"] in MBPP_TEST_IDS]
    if not rows:
        raise InputError(f"{path} holds no problem of {task}: give the benchmark's own file")
    return [(_humaneval if task == "humaneval" else _mbpp)(row) for row in rows]
