"""Rules for every source file that a linter does not check, and facts that stand in more than one file."""

import ast
import pathlib
import re
import subprocess

import pytest
from packaging.requirements import Requirement

FOLDERS = ("dllm", "memdlm", "examples", "scripts", "tests")
SUFFIXES = (".py", ".sh", ".yaml", ".yml", ".toml", ".cff", ".md", ".txt")


def _sources(root: pathlib.Path, suffixes=SUFFIXES) -> list[pathlib.Path]:
    found = [path for path in root.iterdir() if path.is_file()]
    found += [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file()]
    return sorted(path for path in found if path.suffix in suffixes and "__pycache__" not in path.parts)


def test_sources_are_ascii(root):
    wrong = [str(path.relative_to(root)) for path in _sources(root) if not path.read_bytes().isascii()]
    assert not wrong


def test_no_folder_of_somebodys_disk_is_named(root):
    # Absolute home and scratch paths work on one disk only.
    somebodys = re.compile(r"(?<![\w./])/(?:home|root|work|Users|mnt|data|scratch)/\w")
    wrong = [
        f"{path.relative_to(root)}:{number}"
        for path in _sources(root)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if somebodys.search(line)
    ]
    assert not wrong


def test_no_unfinished_marks(root):
    marks = re.compile(
        "|".join((r"\bTO" + "DO", r"\bFIX" + "ME", r"\bXX" + "X\\b", r"\bHA" + "CK\\b", "PLACE" + "HOLDER"))
    )
    wrong = [str(path.relative_to(root)) for path in _sources(root) if marks.search(path.read_text())]
    assert not wrong


def _guesses(path: pathlib.Path) -> list[int]:
    """Lines that guess: hasattr, getattr with a default, handlers that swallow any exception."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) > 2):
                lines.append(node.lineno)
        elif isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = [kind for kind in caught if kind is None or ast.unparse(kind) in ("Exception", "BaseException")]
            # A handler that cleans up and raises again swallows nothing.
            if broad and not any(isinstance(step, ast.Raise) for step in node.body):
                lines.append(node.lineno)
    return lines


def test_the_packages_do_not_guess(root):
    wrong = [
        f"{path.relative_to(root)}:{line}"
        for path in _sources(root, (".py",))
        if path.relative_to(root).parts[0] in ("dllm", "memdlm", "examples", "scripts")
        for line in _guesses(path)
    ]
    assert not wrong


@pytest.mark.parametrize("pattern", ["scripts/*.sh", "examples/**/*.sh", ".ci/run"])
def test_shell_scripts_parse(root, pattern):
    for path in sorted(root.glob(pattern)):
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def _project_value(root: pathlib.Path, key: str) -> str:
    found = re.search(rf'^{key} = "([^"]+)"', (root / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_version_and_licence_agree(root):
    citation = (root / "CITATION.cff").read_text()
    assert f"\nversion: {_project_value(root, 'version')}\n" in citation
    assert f"\nlicense: {_project_value(root, 'license')}\n" in citation
    assert (root / "LICENSE").read_text().startswith("MIT License")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_every_direct_dependency_inside_its_range(root):
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = {_normal(pin.name): pin for pin in (Requirement(line) for line in lines if line and line[0] != "#")}
    project = (root / "pyproject.toml").read_text().split("[tool.")[0]
    wanted = [Requirement(text) for text in re.findall(r'"([A-Za-z][\w.-]*(?:\[[\w,]+\])?>=[^"]+)"', project)]
    assert len(wanted) >= 15
    for requirement in wanted:
        (pin,) = pins[_normal(requirement.name)].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), requirement
        # A local version such as +cpu exists on one index only.
        assert "+" not in pin.version
