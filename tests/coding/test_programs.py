"""Problems from the benchmarks' files, and programs from answers."""

import gzip
import json

import pytest

from dllm.coding.extract import build_program, clean, find_code
from dllm.coding.problems import Problem, load_problems
from dllm.coding.sandbox import run_programs
from dllm.data.files import read_jsonl
from dllm.utils import InputError

STUB = "import math\n\n\ndef helper(x):\n    return x + 1\n\n\ndef area(r):\n    '''Area of a disc.'''\n"
HUMAN = {"task_id": "HumanEval/7", "prompt": STUB, "entry_point": "area", "test": "def check(f):\n    assert f(0) == 0"}
MBPP = {"task_id": 12, "text": "Add.", "test_list": ["assert add(1, 2) == 3\r\n"], "test_setup_code": "a = 1\r\nb = 2"}
DISC = "def area(r):\n    return math.pi * r * r\n"


@pytest.fixture
def disc(tmp_path) -> Problem:
    return _load(tmp_path, "humaneval", HUMAN)[0]


def _load(folder, task: str, *rows, **options) -> list[Problem]:
    path = folder / f"{task}.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return load_problems(task, path, **options)


def test_problems_are_read_plain_and_compressed(tmp_path, disc) -> None:
    assert (disc.task_id, disc.entry_point, disc.stub) == ("HumanEval/7", "area", STUB)
    assert disc.tests.endswith("assert f(0) == 0\ncheck(area)\n")
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(HUMAN).encode()))
    assert load_problems("humaneval", packed) == [disc]


def test_unusual_characters_of_a_data_file_stay(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a\u2028b\u0085c\x1cd"}, {"prompt": "e"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_jsonl(path) == rows


def test_mbpp_is_its_test_split_unless_all_rows_are_asked_for(tmp_path) -> None:
    rows = [{**MBPP, "task_id": number} for number in (10, 11, 510, 511)]
    assert [one.task_id for one in _load(tmp_path, "mbpp", *rows)] == ["MBPP/11", "MBPP/510"]
    (first, *_), every = _load(tmp_path, "mbpp", MBPP), _load(tmp_path, "mbpp", *rows, all_rows=True)
    assert len(every) == 4
    assert first.tests == "a = 1\nb = 2\nassert add(1, 2) == 3\n" and first.shown_tests == "assert add(1, 2) == 3"
    for prompt in (first.raw_prompt(), first.chat_prompt()):
        assert "Add." in prompt and first.shown_tests in prompt and "b = 2" not in prompt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no problem"),
        ('{"task_id": 1}\n', "row 1 has no field 'prompt': this is no file of humaneval"),
        ("[1]\n", "line 1 is no JSON object"),
        ('{"task_id": 1}\n{"task', "line 2: "),
    ],
)
def test_other_files_are_one_line(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_problems("humaneval", path)
    assert "\n" not in str(caught.value)
    for wrong in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            load_problems("humaneval", wrong)


def test_code_is_found_between_fences_or_behind_talk() -> None:
    assert find_code(f"Sure:\n```python\n{DISC}```\nDone.\n```\nother\n```") == DISC
    assert find_code(f"Run\n```bash\npip install x\n```\nthen\n```py\n{DISC}```") == DISC
    assert find_code(f"  1. Here\n   ```python\n   {DISC.replace(chr(10), chr(10) + '   ')}```") == DISC
    assert find_code(f"```python\n{DISC}") == DISC  # cut off
    assert find_code(f"The area of a disc is this.\n\n{DISC}") == DISC
    assert find_code("LIMIT = 3\ndef f(): return LIMIT") == "LIMIT = 3\ndef f(): return LIMIT"
    assert find_code("no code here") == "no code here"


def test_only_definitions_and_what_they_need_are_kept() -> None:
    source = (
        "import os, sys; print(sys)\nBASE = 2\nLIMIT: int = BASE * 5\nunused = input()\n@staticmethod\ndef f(x):\n"
        "    '''Text\nat the left.'''\n    return x < LIMIT\n\nprint(f(3))\nassert f(99)\nfor i in range(3): f(i)\n"
        "class A:\n    pass\nif __name__ == '__main__':\n    f(1)\n"
    )
    assert clean(source, {"f"}) == (
        "BASE = 2\nLIMIT: int = BASE * 5\n@staticmethod\ndef f(x):\n"
        "    '''Text\nat the left.'''\n    return x < LIMIT\n"
    )
    assert clean(source, {"A", "sys"}) == "import os, sys; print(sys)\nclass A:\n    pass\n"
    assert clean("print(1)\ndef f(): pass\nclass A: pass\n", {"g"}) == "def f(): pass\nclass A: pass\n"
    assert clean("table = {}\n", {"table"}) == "table = {}\n" and clean("table = {}\n", set()) == ""
    assert clean("def f(:", {"f"}) == "def f(:"
    for strange in ("\0", "(" * 5000, "def f():\n\treturn 1\n        return 2", ""):
        assert clean(strange, set()) == strange


@pytest.mark.parametrize(
    ("needed", "further"),
    [
        ("try:\n    from math import prod\nexcept ImportError:\n    prod = None\ndef f():\n    return prod\n", ""),
        ("import sys\nsys.setrecursionlimit(9999)\ndef f():\n    return 1\n", "import os\n"),
        ("TABLE = []\nfor i in range(3):\n    TABLE.append(i)\ndef f():\n    return TABLE\n", "i = input()\n"),
        ("import heapq\nHEAP = [2, 1]\nheapq.heapify(HEAP)\ndef f():\n    return HEAP\n", "print(HEAP)\n"),
        ("MEMO = {}\nMEMO[0] = 1\nMEMO.update(a=1)\ndef f(n=MEMO):\n    return n\n", "n = input()\n"),
        ("def f(x):\n    y = x\n    return [z for z in y]\n", "x = y = z = input()\n"),
        ("count = 0\ndef f():\n    global count\n    count += 1\n    return g()\ndef g():\n    pass\n", "g()\n"),
        ("def f(x):\n    pass\n@f.register(int)\ndef _(x):\n    pass\n", "f.__doc__\n"),
        ("def f(x: 'A'):\n    return eval('h')\ndef h(): pass\nclass A: pass\n", ""),
        ("class A:\n    def f(self):\n        return B\nclass B: pass\nf = A().f\n", "a = A()\na.f()\n"),
        ("def f():\n    pass\nf.cache = {}\nf = print(f) or f\n", "class TestF(unittest.TestCase):\n    f = f\n"),
        ("X = 'a\u2028b\x1cc'\ndef f():\n    return X\n", "print(X)\n"),
    ],
)
def test_what_is_needed_is_kept_and_nothing_else(needed: str, further: str) -> None:
    assert clean(needed + further + "assert f()\nif __name__ == '__main__':\n    f = 1\n", {"f"}) == needed


def test_code_in_several_blocks(disc) -> None:
    other, use = "def half(x):\n    return x / 2\n", "print(area(2))\n"
    calls = "def area(r):\n    return half(6.28) * r * r\n"
    fenced = "Text:\n```python\n{}```\n"
    for blocks in ((other, calls, use), (use, calls, other), (use, other, calls, DISC, "def half(:\n")):
        names: dict = {}
        exec(build_program(disc, "".join(map(fenced.format, blocks)), "chat"), names)
        assert names["area"](1) == pytest.approx(3.14)
    assert find_code("".join(map(fenced.format, (use, other, DISC)))) == f"{other}\n{DISC}"


def test_future_imports_come_first(disc) -> None:
    code = "from __future__ import annotations\nimport sys\n\ndef area(r: unknown):\n    return math.pi\n"
    names: dict = {}
    exec(compile(build_program(disc, f"```python\n{code}```", "chat"), "p", "exec", dont_inherit=True), names)
    assert names["area"](1) == pytest.approx(3.1416, abs=1e-3) and names["helper"](1) == 2


def test_strange_programs_come_back() -> None:
    for source in (
        "x = " + "-" * 900 + "1\ndef f(): pass\n",
        "f = " + "(" * 90 + ")" * 90 + "\n",
        "f = 1" + "+1" * 900,
    ):
        assert clean(source, {"f"}) in (source, f"{source}\n", "def f(): pass\n")


def test_what_follows_the_code_is_cut(disc) -> None:
    talk = "\n\nThis function's result is an area.\n\ndef later():\n    pass\n"
    for answer, kind in ((DISC + talk, "chat"), ("    return math.pi * r * r" + talk, "raw")):
        program = build_program(disc, answer, kind)
        assert "later" not in program and "area." not in program.replace("Area of a disc.", "")
        names: dict = {}
        exec(program, names)
        assert names["area"](2) == pytest.approx(12.566, abs=1e-3) and names["helper"](1) == 2


def test_an_answer_without_the_function_continues_the_stub(disc) -> None:
    for answer in ("return 7", "    return 7", "```python\n    return 7\n```"):
        names: dict = {}
        exec(build_program(disc, answer, "chat"), names)
        assert names["area"](1) == 7


@pytest.mark.parametrize(("task", "file"), [("humaneval", "HumanEval.jsonl.gz"), ("mbpp", "mbpp.jsonl")])
def test_the_benchmarks_own_solutions_pass(shared_dir, confining_kernel, task: str, file: str) -> None:
    path = shared_dir / "data" / "code" / file
    rows, problems = read_jsonl(path), load_problems(task, path, all_rows=task == "mbpp")
    chosen = range(0, len(rows), 10 if task == "humaneval" else 60)
    pairs = []
    for index in chosen:
        problem, row = problems[index], rows[index]
        code = problem.stub + row["canonical_solution"] if problem.stub else row["code"]
        pairs.append((build_program(problem, f"Here you are:\n```python\n{code}\n```\nBye!", "chat"), problem.tests))
        # The code for another problem must not pass.
        pairs.append((build_program(problems[index - 1], code, "chat"), problems[index - 1].tests))
    outcomes = run_programs(pairs, num_workers=2)
    assert all(outcome.passed for outcome in outcomes[::2]), outcomes
    assert not any(outcome.passed for outcome in outcomes[1::2])
