"""The set-up scripts: options, and when they install. Python is a stand-in here that writes down what it is asked."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

# Answers like an interpreter: makes a folder for `-m venv`, runs small programs, and only notes what pip is asked.
STAND_IN = """#!/usr/bin/env bash
case "$1 $2" in
    "-m venv") mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python"; touch "${@: -1}/pyvenv.cfg" ;;
    "-m pip") [[ "$3" == "--version" ]] && exit 0
        echo "$*" >>"$CALLS"; sleep "${PIP_SECONDS:-0}"; exit "${PIP_EXIT:-0}" ;;
    "-c import torch,"*) exit 0 ;;
    *) exec REAL "$@" ;;
esac
"""
USE = 'source scripts/_env.sh && ensure_env "$@" && echo "$PWD $(command -v python)"'


class Checkout:
    """A copy of what the set-up reads, with the stand-in as interpreter."""

    def __init__(self, root: pathlib.Path, folder: pathlib.Path):
        self.folder = folder / "checkout"
        (self.folder / "scripts").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "scripts/_env.sh", "scripts/test.sh"):
            shutil.copy(root / name, self.folder / name)
        self.python = folder / "python"
        self.python.write_text(STAND_IN.replace("REAL", sys.executable))
        self.python.chmod(0o755)
        self.calls_file = folder / "calls"

    def start(self, *extras: str, **variables: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHON": str(self.python), "CALLS": str(self.calls_file), **variables}
        return subprocess.Popen(
            ["bash", "-c", USE, "bash", *extras],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *extras: str, **variables: str) -> tuple[int, str, str]:
        process = self.start(*extras, **variables)
        out, err = process.communicate()
        return process.returncode, out, err

    def installs(self) -> list[str]:
        """What pip was asked to install, in order: the last word of each call."""
        return [line.split()[-1] for line in self.calls_file.read_text().splitlines()]


@pytest.fixture
def checkout(root, tmp_path) -> Checkout:
    return Checkout(root, tmp_path)


def test_the_second_call_installs_nothing(checkout):
    for _ in range(2):
        code, out, err = checkout.run("dev", "quant")
        assert code == 0, err
        assert out.splitlines()[-1] == f"{checkout.folder} {checkout.folder}/.venv/bin/python"
    assert checkout.installs() == [".[dev,quant]"]


def test_the_base_package_comes_with_the_extras_but_not_the_other_way_round(checkout):
    assert checkout.run()[0] == checkout.run("dev")[0] == checkout.run()[0] == 0
    assert checkout.installs() == [".", ".[dev]"]


def test_new_constraints_install_again(checkout):
    checkout.run()
    with open(checkout.folder / "constraints.txt", "a") as file:
        file.write("# another\n")
    checkout.run()
    assert checkout.installs() == [".", "."]


def test_a_failed_install_is_told_and_done_again(checkout):
    code, _, err = checkout.run(PIP_EXIT="3")
    assert code == 1 and err.count("\n") == 1 and "run this again" in err
    assert checkout.run()[0] == 0
    assert checkout.installs() == [".", "."]


def test_two_calls_at_once_install_once(checkout):
    calls = [checkout.start("dev", PIP_SECONDS="1") for _ in range(2)]
    assert [call.wait() for call in calls] == [0, 0]
    assert checkout.installs() == [".[dev]"]
    outputs = [call.communicate()[0] for call in calls]
    assert sum("waiting for it" in out for out in outputs) == 1


def test_a_moved_checkout_gets_a_new_environment(checkout, tmp_path):
    checkout.run()
    checkout.folder = checkout.folder.rename(tmp_path / "moved")
    code, out, err = checkout.run()
    assert code == 0, err
    assert "making it anew" in out and checkout.installs() == [".", "."]


def test_a_folder_that_is_no_environment_is_left_alone(checkout):
    (checkout.folder / ".venv").mkdir()
    (checkout.folder / ".venv" / "notes.txt").write_text("mine")
    code, _, err = checkout.run()
    assert code == 1 and "is not a virtual environment" in err
    assert (checkout.folder / ".venv" / "notes.txt").read_text() == "mine"


def test_an_interpreter_that_does_not_exist_is_one_line(checkout):
    code, _, err = checkout.run(PYTHON="python-that-is-not-there")
    assert code == 1 and err.count("\n") == 1 and "no Python >= 3.10" in err


def test_an_unknown_option_is_one_line_and_exit_code_2(root, tmp_path):
    done = subprocess.run(
        ["bash", str(root / "scripts/test.sh"), "--nonsense"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert "--nonsense" in done.stderr and "--distributed" in done.stderr
