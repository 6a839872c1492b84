"""The wheel holds every module: built from a copy of the sources, installed into a fresh environment, imported."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

HERE = pathlib.Path(__file__).resolve().parent


def _run(*command: str, cwd: pathlib.Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-1000:]} {done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> pathlib.Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for package in ("dllm", "memdlm"):
        shutil.copytree(root / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", cwd=source)
    (built,) = (source / "dist").glob("memdlm-*.whl")
    return built


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> pathlib.Path:
    """An environment that sees the dependencies of this one, but not this checkout."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    # A path file is not followed to further path files, so the editable install of this checkout stays unseen.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n")
    return folder / "bin" / "python"


def test_wheel_holds_every_file_of_the_packages(wheel, root):
    sources = {
        str(path.relative_to(root))
        for package in ("dllm", "memdlm")
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources == {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_every_module_imports_from_the_wheel(wheel, bare_python, modules, tmp_path):
    _run(
        *(sys.executable, "-m", "pip", "--python", str(bare_python), "install"),
        *("--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)),
        cwd=tmp_path,
    )
    # The folder handed over is empty: nothing but the environment can supply the packages.
    report = json.loads(_run(str(bare_python), str(HERE / "import_all.py"), str(tmp_path), *modules, cwd=tmp_path))
    assert set(report["files"]) | set(report["skipped"]) == set(modules)
    # resolve() on the environment only: its interpreter is a link out of it
    environment = bare_python.parent.parent.resolve()
    outside = [file for file in report["files"].values() if environment not in pathlib.Path(file).resolve().parents]
    assert not outside
