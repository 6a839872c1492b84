"""From a model's answer to a program: the code without the talk around it, and without calls of its own."""

import ast
import re
import textwrap
import warnings
from collections.abc import Collection

from dllm.coding.problems import Problem, PromptKind

_FENCED = re.compile(r"```[ \t]*\w*[ \t]*\r?\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_FIRST_CODE = re.compile(r"^(?:(?:async def|def|class|import|from)\b|@\w|\w+ *=[^=])", re.MULTILINE)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)


def build_program(problem: Problem, answer: str, kind: PromptKind) -> str:
    """The source that is run before the tests of `problem`.

    raw: the stub and the answer as its continuation. chat: the code of the answer, behind the imports and helpers of
    the stub; an answer without the function that the stub begins continues the stub.

    Args:
        answer: text of the model.
        kind: of prompt that it answers.
    """
    wanted = {problem.entry_point} if problem.entry_point else _names(_parse(problem.tests))
    if kind == "raw" and problem.stub:
        return clean(problem.stub + answer, wanted)
    code = find_code(answer)
    if problem.entry_point is None or not problem.stub:
        return clean(code, wanted)
    if re.search(rf"^(?:async )?def {re.escape(problem.entry_point)}\b", code, re.MULTILINE):
        return clean(f"{_before_entry(problem)}\n{code}", wanted)
    body = code if code[:1].isspace() else textwrap.indent(code, "    ")
    return clean(f"{problem.stub.rstrip()}\n{body}", wanted)


def _before_entry(problem: Problem) -> str:
    """What the stub has before the function that it begins."""
    starts = [
        found.start() for found in re.finditer(rf"^def {re.escape(str(problem.entry_point))}\b", problem.stub, re.M)
    ]
    return problem.stub[: starts[-1]] if starts else problem.stub


def find_code(answer: str) -> str:
    """The first fenced block with a definition, else the first fenced block, else what follows from the first line that
    looks like Python on; the whole answer if there is none."""
    blocks = [textwrap.dedent(block) for block in _FENCED.findall(answer)]
    if blocks:
        return next((block for block in blocks if re.search(r"^(?:async )?def |^class ", block, re.M)), blocks[0])
    start = _FIRST_CODE.search(answer)
    return answer if start is None else answer[start.start() :]


def clean(source: str, wanted: Collection[str]) -> str:
    """`source` up to the first top-level line that is no Python, with only the imports, functions, classes and the
    assignments that they or `wanted` need: printing, tests and demonstrations of the model's own are left out.

    Source of which nothing can be parsed comes back as it is, so that the error is found where it is run.

    Args:
        wanted: names that the tests use.
    """
    tree, source = _longest(source)
    if tree is None:
        return source
    kept: list[ast.stmt] = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, *_DEFINITIONS))]
    needed = set(wanted).union(*map(_names, kept))
    added = True
    while added:
        added = [
            node
            for node in tree.body
            if isinstance(node, _ASSIGNMENTS) and node not in kept and _targets(node) & needed
        ]
        kept += added
        needed = needed.union(*map(_names, added))
    lines = source.splitlines()
    numbers = sorted({number for node in kept for number in _lines(node)})
    return "".join(f"{lines[number - 1]}\n" for number in numbers)


def _longest(source: str) -> tuple[ast.Module | None, str]:
    """(tree, text) of the longest beginning of `source` that is Python, up to a top-level line or the end."""
    lines = source.replace("\r\n", "\n").replace("\f", "").split("\n")
    ends = [index for index, line in enumerate(lines) if line[:1].strip() and index > 0]
    for end in [len(lines), *reversed(ends)]:
        text = "\n".join(lines[:end])
        tree = _parse(text)
        if tree is not None and tree.body:
            return tree, text
    return None, source


def _parse(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in the model's strings
            return ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _names(tree: ast.AST | None) -> set[str]:
    return set() if tree is None else {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _targets(node: ast.stmt) -> set[str]:
    assert isinstance(node, _ASSIGNMENTS)
    return set().union(*map(_names, node.targets if isinstance(node, ast.Assign) else [node.target]))


def _lines(node: ast.stmt) -> range:
    first = (
        min([node.lineno, *(one.lineno for one in node.decorator_list)])
        if isinstance(node, _DEFINITIONS)
        else node.lineno
    )
    return range(first, (node.end_lineno or node.lineno) + 1)
