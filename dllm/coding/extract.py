"""From a model's answer to a program: the code without the talk around it, and without calls of its own."""

import ast
import re
import textwrap
import warnings
from collections.abc import Collection

from dllm.coding.problems import Problem, PromptKind
from dllm.coding.scopes import DEFINITIONS, IMPORTS, bound, changed, free, names

_FENCED = re.compile(r"```[ \t]*\w*[ \t]*\r?\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_FIRST_CODE = re.compile(r"^(?:(?:async def|def|class|import|from)\b|@\w|\w+ *=[^=])", re.MULTILINE)
_BINDING = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.If, ast.Try, ast.For, ast.While, ast.With)
_CHANGING = (ast.Expr, ast.If, ast.Try, ast.For, ast.While, ast.With)
_BY_NAME = {"globals", "eval", "exec"}  # functions that find others by their names as text


def build_program(problem: Problem, answer: str, kind: PromptKind) -> str:
    """The source that is run before the tests of `problem`.

    raw: the stub and the answer as its continuation. chat: the code of the answer, behind the imports and helpers of
    the stub; an answer without the function that the stub begins continues the stub.

    Args:
        answer: text of the model.
        kind: of prompt that it answers.
    """
    before = _before_entry(problem)
    tests, given = _parse(problem.tests), _parse(before)
    tested = set() if tests is None else free(tests)
    wanted = tested if problem.entry_point is None else {problem.entry_point}
    # Tests, those of evalplus included, may use what the stub brings.
    used = wanted | tested | (set() if given is None else bound(given))
    if kind == "raw" and problem.stub:
        return clean(problem.stub + answer, used)
    code = find_code(answer, wanted)
    if problem.entry_point is None or not problem.stub:
        return clean(code, used)
    if re.search(rf"^(?:async )?def {re.escape(problem.entry_point)}\b", code, re.MULTILINE):
        return clean(f"{before}\n{code}", used)
    body = code if code[:1].isspace() else textwrap.indent(code, "    ")
    return clean(f"{problem.stub.rstrip()}\n{body}", used)


def _before_entry(problem: Problem) -> str:
    """What the stub has before the function that it begins."""
    if problem.entry_point is None:
        return problem.stub
    starts = [found.start() for found in re.finditer(rf"^def {re.escape(problem.entry_point)}\b", problem.stub, re.M)]
    return problem.stub[: starts[-1]] if starts else problem.stub


def find_code(answer: str, wanted: Collection[str] = ()) -> str:
    """The first fenced block that defines one of the `wanted` names, behind the other blocks with definitions (its
    helpers); else all blocks with definitions, else the first block, else what follows from the first line that looks
    like Python on; the whole answer if there is none.

    Args:
        answer: text of the model.
        wanted: names that the tests call.
    """
    blocks = [textwrap.dedent(block) for block in _FENCED.findall(answer)]
    if not blocks:
        start = _FIRST_CODE.search(answer)
        return answer if start is None else answer[start.start() :]
    defined = [_defined(block) for block in blocks]
    chosen = next((at for at, found in enumerate(defined) if found & set(wanted)), None)
    if chosen is None:
        return "\n".join(block for block, found in zip(blocks, defined, strict=True) if found) or blocks[0]
    # A block that does not parse, or another version of what is wanted, is no helper.
    helpers = [
        block
        for block, found in zip(blocks, defined, strict=True)
        if found and not found & set(wanted) and _parse(block) is not None
    ]
    return "\n".join([*helpers, blocks[chosen]])


def _defined(block: str) -> set[str]:
    """What a block defines at its top level, one that does not parse included."""
    return set(re.findall(r"^(?:async def|def|class)\s+(\w+)", block, re.MULTILINE))


def clean(source: str, wanted: Collection[str]) -> str:
    """`source` up to the first top-level line that is no Python, with only what `wanted` needs: the definitions,
    imports and assignments that it reaches, and what changes them. Printing, tests and demonstrations of the model's
    own are left out. Where nothing of `wanted` is there, every definition is wanted.

    Source of which nothing can be parsed comes back as it is, so that the error is found where it is run.

    Args:
        wanted: names that the tests use.
    """
    tree, source = _longest(source)
    if tree is None:
        return source
    try:
        kept = _needed(tree.body, wanted)
    except RecursionError:
        return source
    lines = source.split("\n")
    first = {number for node in kept if _is_future(node) for number in _lines(node)}
    others = {number for node in kept for number in _lines(node)} - first
    return "".join(f"{lines[number - 1]}\n" for number in [*sorted(first), *sorted(others)])


def _needed(body: list[ast.stmt], wanted: Collection[str]) -> list[ast.stmt]:
    """The statements that `wanted` reaches."""
    defined = {node.name for node in body if isinstance(node, DEFINITIONS)}
    needed = set(wanted) if any(bound(node) & set(wanted) for node in body) else defined | set(wanted)
    kept: list[ast.stmt] = []
    waiting = [node for node in body if not (isinstance(node, ast.If) and "__name__" in names(node.test))]
    while True:
        variables = {name for node in kept if isinstance(node, _BINDING) for name in bound(node)}
        local = {name for node in kept if not isinstance(node, IMPORTS) for name in bound(node)}
        added = [node for node in waiting if _takes_part(node, needed, variables, local)]
        if not added:
            return kept
        kept += added
        waiting = [node for node in waiting if not any(node is one for one in added)]
        needed = needed.union(*(free(node) for node in added))
        needed |= defined if needed & _BY_NAME else set()


def _takes_part(node: ast.stmt, needed: set[str], variables: set[str], local: set[str]) -> bool:
    """Whether a statement is kept.

    Args:
        node: of the top level.
        needed: names that kept statements and the tests read.
        variables: names that kept assignments bind.
        local: names that kept statements bind, without imports.
    """
    if isinstance(node, ast.ImportFrom) and (_is_future(node) or node.names[0].name == "*"):
        return True
    if isinstance(node, DEFINITIONS):
        # A decorator of the program's own may put the function in its books under another name.
        registers = {name for one in node.decorator_list for name in free(one)} & local
        return node.name in needed or bool(registers)
    if isinstance(node, (*IMPORTS, *_BINDING)) and bound(node) & needed:
        return True
    if not isinstance(node, _CHANGING):
        return False
    return _sets_recursion_limit(node) or changed(node, variables)


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _sets_recursion_limit(node: ast.stmt) -> bool:
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    return ast.unparse(node.value.func) in ("sys.setrecursionlimit", "setrecursionlimit")


def _longest(source: str) -> tuple[ast.Module | None, str]:
    """(tree, text) of the longest beginning of `source` that is Python, up to a top-level line or the end."""
    lines = source.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "").split("\n")
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


def _lines(node: ast.stmt) -> range:
    first = (
        min([node.lineno, *(one.lineno for one in node.decorator_list)])
        if isinstance(node, DEFINITIONS)
        else node.lineno
    )
    return range(first, (node.end_lineno or node.lineno) + 1)
