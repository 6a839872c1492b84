"""What the tests of the evaluation scripts share: running one, and seeing what it would start."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Runs the script's own helper, and only writes down the evaluation that it would start.
STAND_IN = """#!/usr/bin/env bash
[[ "$1" == "-m" ]] || exec REAL "$@"
printf '%s\\0' "$PWD" "$@" >"$CALL"
"""


@pytest.fixture
def run_script(tmp_path):
    """A function (script below examples/, *flags, **environment) -> the finished process."""

    def run(script: str, *flags: str, **changes: str) -> subprocess.CompletedProcess[str]:
        path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", **changes}
        command = ["bash", str(ROOT / "examples" / script), *flags]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def started(run_script, tmp_path):
    """A function (script, *flags) -> the options of the evaluation that it starts, its model arguments as a dict."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(STAND_IN.replace("REAL", sys.executable))
    (folder / "python").chmod(0o755)

    def start(script: str, *flags: str) -> dict:
        path, adapter = f"{folder}{os.pathsep}{os.environ['PATH']}", script.split("/")[0]
        done = run_script(script, "--num_gpu", "0", *flags, PATH=path, CALL=str(tmp_path / "call"))
        assert done.returncode == 0, done.stderr
        where, *words = (tmp_path / "call").read_text().split("\0")[:-1]
        assert pathlib.Path(where) == ROOT and words[:3] == ["-m", f"memdlm.eval.{adapter}", "run"]
        assert done.stdout.startswith(f"$ python -m memdlm.eval.{adapter} run --model {adapter}")
        options = dict(zip(words[3::2], words[4::2], strict=True))
        return {**options, "--model_args": json.loads(options["--model_args"])}

    return start


@pytest.fixture(scope="session")
def helper():
    """The module behind the scripts."""
    spec = importlib.util.spec_from_file_location("eval_helper", ROOT / "examples" / "_eval.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
