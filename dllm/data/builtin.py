"""`builtin:docstrings`: real text with no network, made from the source of the running Python's standard library.

A row asks what a function does, shows the module's source around it without its docstring, and answers with the
first paragraph of that docstring. No module is imported; another Python version gives other rows.
"""

import ast
import hashlib
import inspect
import pathlib
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
from tqdm.auto import tqdm

from dllm.utils.distributed import is_main_process
from dllm.utils.parsing import InputError

DEFAULT_CONTEXT = 4000  # characters
SMALLEST_CONTEXT = 100
# Tests, vendored packages and grammar fixtures: not the library's own prose, or not valid source.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
_FEWEST_WORDS = 4
_MOST_CHARACTERS = 600
_TEST_SHARE = 10  # one module in ten

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class _Documented:
    """One function: line numbers count from 0, ends are exclusive."""

    qualname: str
    start: int
    end: int
    doc_start: int
    doc_end: int
    summary: str


def _modules() -> list[tuple[str, pathlib.Path]]:
    """(dotted name, file) of every pure-Python module of the standard library, sorted by name."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.intersection(parts) or not all(part.isidentifier() for part in parts):
            continue
        found.append((".".join(parts).removesuffix(".__init__"), path))
    return sorted(found)


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, _Function]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, _Function):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")


def _documented(qualname: str, node: _Function, lines: list[str]) -> _Documented | None:
    """None where there is no docstring of use, nothing but the docstring, or it shares a line with code."""
    doc = ast.get_docstring(node, clean=False)
    if doc is None or len(node.body) < 2:
        return None
    expression, following = node.body[:2]
    doc_start, doc_end = expression.lineno - 1, expression.end_lineno or expression.lineno
    if lines[doc_start][: expression.col_offset].strip() or following.lineno <= doc_end:
        return None
    summary = " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())
    if len(summary.split()) < _FEWEST_WORDS or len(summary) > _MOST_CHARACTERS or not summary.isascii():
        return None
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    return _Documented(qualname, start, node.end_lineno or node.lineno, doc_start, doc_end, summary)


def _window(lines: list[str], function: _Documented, context: int) -> str | None:
    """Whole lines around the function, without its docstring, at most `context` characters; None if it is longer.

    Grows by one line above and one below in turn, so that the function stands in the middle where there is room.
    """
    kept = lines[: function.doc_start] + lines[function.doc_end :]
    start, end = function.start, function.end - (function.doc_end - function.doc_start)
    size = sum(len(line) for line in kept[start:end])
    if size > context:
        return None
    above = below = True
    while above or below:
        above = above and start > 0 and size + len(kept[start - 1]) <= context
        if above:
            start -= 1
            size += len(kept[start])
        below = below and end < len(kept) and size + len(kept[end]) <= context
        if below:
            size += len(kept[end])
            end += 1
    return "".join(kept[start:end])


def _rows_of_module(module: str, path: pathlib.Path, context: int) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, row) of every function of the module that can be asked about."""
    with tokenize.open(path) as file:
        source = file.read()
    lines = source.splitlines(keepends=True)
    if len(lines) != source.count("\n") + (not source.endswith("\n")):
        return  # form feeds split lines here but not in ast: line numbers would not agree
    for qualname, node in _functions(ast.parse(source)):
        function = _documented(qualname, node, lines)
        window = None if function is None else _window(lines, function, context)
        if function is None or window is None:
            continue
        if function.summary in " ".join(window.split()):
            continue  # a copy of the docstring elsewhere in the module would give the answer away
        kind = "method" if "." in qualname else "function"
        question = f"What does the {kind} `{qualname}` of the Python module `{module}` do?"
        row = {"instruction": question, "input": window, "output": function.summary}
        yield f"{module}:{qualname}:{function.start}", row


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load_docstrings(context: int = DEFAULT_CONTEXT) -> datasets.DatasetDict:
    """Rows {"instruction", "input", "output"} in splits train and test; no module is in both.

    The order is fixed and mixes the modules, so that the first rows of a split are a fair sample of it.

    Args:
        context: most characters of source in `input`, at least 100. Functions that are longer are left out.

    Raises:
        InputError: context is too small, or this Python has no source of its standard library.
    """
    if context < SMALLEST_CONTEXT:
        raise InputError(f"builtin:docstrings?context={context}: must be at least {SMALLEST_CONTEXT} characters")
    splits: dict[str, list[tuple[str, dict[str, str]]]] = {"train": [], "test": []}
    modules = tqdm(_modules(), desc="reading the standard library", unit="module", disable=not is_main_process())
    for module, path in modules:
        split = "test" if int(_digest(module), 16) % _TEST_SHARE == 0 else "train"
        try:
            splits[split] += _rows_of_module(module, path, context)
        except (SyntaxError, UnicodeDecodeError):
            continue  # a template or a file for another version of Python
    if not all(splits.values()):
        raise InputError(
            "builtin:docstrings finds too little source of the standard library "
            f"in {sysconfig.get_paths()['stdlib']} (context={context}): give a larger context, or a local file"
        )
    for rows in splits.values():
        rows.sort(key=lambda place_and_row: _digest(place_and_row[0]))
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list([row for _, row in rows]) for name, rows in splits.items()}
    )
