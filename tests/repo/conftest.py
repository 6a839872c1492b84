"""What the repository tests look at: the source tree and the modules in it."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """Top folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def modules() -> list[str]:
    """Dotted names of every module of the two packages, found by walking the files (not by importing)."""
    names = []
    for package in ("dllm", "memdlm"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert "dllm" in names and "memdlm" in names
    return names
