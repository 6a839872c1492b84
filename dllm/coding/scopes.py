"""Which names a piece of Python reads from around it, binds there, and changes the values of."""

import ast
from collections.abc import Collection, Iterable, Iterator

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def names(node: ast.AST | None) -> set[str]:
    """All plain names in a tree, read or bound."""
    return set() if node is None else {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def _own(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The nodes and what is in them, without what is in a scope of its own."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*DEFINITIONS, ast.Lambda, *_COMPREHENSIONS)):
            waiting += ast.iter_child_nodes(node)


def root(node: ast.AST) -> str | None:
    """The name that an expression like name.attribute[0].other begins with; None: it begins with none."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def bound(*nodes: ast.AST) -> set[str]:
    """The names that statements bind or delete where they stand; of name.attribute = ... and name[key] = ..., name."""
    found: set[str | None] = set()
    for node in _own(nodes):
        if isinstance(node, DEFINITIONS):
            found.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            found.add(root(node))
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.ExceptHandler):
            found.add(node.name)
    return {name for name in found if name is not None}


def free(node: ast.AST) -> set[str]:
    """The names that a statement or expression reads from around it, in its nested functions too."""
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Load) else set()
    if isinstance(node, _FUNCTIONS):
        return _free_of_function(node)
    inner = set().union(*map(free, ast.iter_child_nodes(node)))
    if isinstance(node, _COMPREHENSIONS):
        return inner - bound(*(part.target for part in node.generators))
    return inner - bound(node.target) if isinstance(node, ast.For) else inner


def _free_of_function(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> set[str]:
    body = [node.body] if isinstance(node, ast.Lambda) else node.body
    outside = [part for part in ast.iter_child_nodes(node) if not any(part is one for one in body)]
    arguments = {part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)}
    declared = (part for part in _own(body) if isinstance(part, (ast.Global, ast.Nonlocal)))
    shared = {name for part in declared for name in part.names}
    # An assignment to name.attribute does not make the name local.
    stored = {part.id for part in _own(body) if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load)}
    defined = bound(*(part for part in _own(body) if isinstance(part, (*DEFINITIONS, *IMPORTS))))
    local = (arguments | stored | defined) - shared
    return set().union(shared, *map(free, outside), set().union(*map(free, body)) - local)


def changed(node: ast.AST, variables: Collection[str]) -> bool:
    """Whether a statement may change the value of one of the variables: calls its methods, or gives it to a function of
    a module (`variable.append(1)`, `heapq.heapify(variable)`)."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            given = {part.id for part in call.args if isinstance(part, ast.Name)}
            if root(call.func) in variables or given & set(variables):
                return True
    return False
