"""The built-in data set: the same every time, no module in both splits, no answer in its own context."""

import ast
import inspect
import re

import pytest

from dllm.data import builtin, load_docstrings, load_sft_dataset
from dllm.utils import InputError


@pytest.fixture(scope="module")
def rows():
    return load_docstrings(context=600)


def modules_of(split):
    return {re.search(r"module `([\w.]+)`", row["instruction"])[1] for row in split}


def test_a_few_thousand_rows_within_the_context(rows):
    assert len(rows["train"]) > 2000 and len(rows["test"]) > 100
    assert max(map(len, rows["train"]["input"])) <= 600


def test_no_module_is_in_both_splits(rows):
    assert not modules_of(rows["train"]) & modules_of(rows["test"])


def test_first_rows_mix_modules(rows):
    assert len(modules_of(rows["train"].select(range(50)))) > 30


def test_context_holds_the_function_but_not_the_answer(rows):
    for row in rows["test"]:
        name = re.search(r"`([\w.]+)` of", row["instruction"])[1].split(".")[-1]
        assert re.search(rf"def {name}\s*\(", row["input"])
        assert row["output"] not in " ".join(row["input"].split())


def test_same_rows_again(rows, monkeypatch):
    some = [(name, path) for name, path in builtin._modules() if name < "b"]
    monkeypatch.setattr(builtin, "_modules", lambda: some)
    first = load_docstrings(context=600)
    monkeypatch.setattr(builtin, "_modules", lambda: some[::-1])
    assert load_docstrings(context=600)["train"].to_list() == first["train"].to_list()


SOURCE = '''import x

def before():
    return 1

@decorator
def asked(a,
          b):
    """Gives the sum
    of both numbers.

    More words."""
    return a + b

def after():
    """Not the question, stays."""
    return 2

class C:
    async def method(self):
        "Waits for one single event."
        await self.event

    def only_doc(self):
        """Nothing but these few words."""

    def one_line(self): "Shares its line with code."; return 3

    def copied(self):
        """Not the question, stays."""
        return 4
'''


@pytest.fixture
def module_file(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    return path


def test_which_functions_are_asked_about(module_file):
    found = dict(builtin._rows_of_module("m", module_file, 5000))
    asked = {place.split(":")[1]: row for place, row in found.items()}
    assert sorted(asked) == ["C.method", "asked"]  # `after` and `copied` hold each other's answer
    assert asked["asked"]["output"] == "Gives the sum of both numbers."
    assert asked["C.method"]["instruction"] == "What does the method `C.method` of the Python module `m` do?"


def test_window_is_whole_lines_around_the_function(module_file):
    lines = SOURCE.splitlines(keepends=True)
    tree = ast.parse(SOURCE)
    function = builtin._documented("asked", tree.body[2], lines)
    own = "@decorator\ndef asked(a,\n          b):\n    return a + b\n"
    assert builtin._window(lines, function, len(own)) == own
    assert builtin._window(lines, function, len(own) - 1) is None
    assert builtin._window(lines, function, len(own) + 2) == "\n" + own + "\n"
    docstring = inspect.cleandoc(ast.get_docstring(tree.body[2], clean=False))
    assert builtin._window(lines, function, 10**6).count(docstring.split("\n")[0]) == 0


def test_grammar_reaches_it():
    found = load_sft_dataset("builtin:docstrings?context=300[train:5,test:3]")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 5, "test": 3}
    assert found["train"][0]["messages"][1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("builtin:docstring", "is not built in; there is builtin:docstrings"),
        ("builtin:docstrings?context=9", "at least 100"),
        ("builtin:docstrings?context=-5", "whole number of characters"),
        ("builtin:docstrings?size=9", "option 'size' is unknown; allowed: context"),
        ("builtin:docstrings?context", "is not key=value"),
    ],
)
def test_wrong_names(name, part):
    with pytest.raises(InputError, match=part):
        load_sft_dataset(name)
