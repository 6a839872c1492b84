"""Imports go one way, and importing changes nothing elsewhere."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
FORBIDDEN = {
    "dllm": ("memdlm", "examples", "scripts", "tests"),
    "memdlm": ("examples", "scripts", "tests"),
}


def _imported(path: pathlib.Path, package: str) -> set[str]:
    """Absolute dotted names that a file imports, by statement or by name in a string."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(f"{package}.{node.module}" if node.level else str(node.module))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # importlib.import_module("memdlm.memory") is an import too
            names |= {node.value} & set(re.findall(r"^[a-z_]+(?:\.[a-z_]+)+$", node.value))
    return names


def test_imports_go_one_way(root):
    wrong = [
        f"{path.relative_to(root)} imports {name}"
        for package, forbidden in FORBIDDEN.items()
        for path in sorted((root / package).rglob("*.py"))
        for name in _imported(path, package)
        if name.split(".")[0] in forbidden
    ]
    assert not wrong, wrong


def test_importing_opens_no_connection_and_changes_nothing_elsewhere(root, modules, tmp_path):
    done = subprocess.run(
        [sys.executable, str(HERE / "import_all.py"), str(root), *modules],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["changed"] == []
    assert set(report["files"]) | set(report["skipped"]) == set(modules)
