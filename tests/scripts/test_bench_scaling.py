"""The scaling benchmark, run as a user runs it, at a tiny size; how fast anything is does not matter."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "bench" / "scaling.py"
SIZES = ("--hidden_size", "32", "--num_layers", "2", "--num_heads", "4", "--vocab_size", "200", "--length", "32")


def _run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *SIZES, *flags],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.distributed
def test_both_sides_take_turns(tmp_path) -> None:
    file = tmp_path / "numbers.json"
    done = _run("--kinds", "memory", "--rounds", "2", "--warmup_rounds", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(file.read_text())
    (ratio,) = re.findall(r"^ratio two/one memory: (\d+\.\d+)$", done.stdout, re.MULTILINE)
    assert float(ratio) == pytest.approx(results["ratios"]["memory"]["ratio"], abs=6e-4)
    times = results["times"]["memory"]
    for name in ("seconds", "cpu_seconds"):
        assert {side: len(values) for side, values in times[name].items()} == {"one": 2, "two": 2}
        assert all(value > 0 for values in times[name].values() for value in values)
    # One loss of each process; the ranks have different rows.
    assert [len(losses) for losses in times["losses"]["one"]] == [1, 1]
    assert all(len(losses) == 2 and losses[0] != losses[1] for losses in times["losses"]["two"])
    # Random weights over 200 tokens, weighted by the schedule.
    assert all(1 < loss < 100 for side in times["losses"].values() for losses in side for loss in losses)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kinds", "plain", "fast"), "--kinds fast: choose of plain, memory, memory_alone"),
        (("--steps_per_turn", "0"), "--steps_per_turn must be at least 1, got 0"),
    ],
)
def test_wrong_flags_are_one_line(flags, message) -> None:
    done = _run(*flags)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(message)
    assert "Traceback" not in done.stderr


def test_help_names_the_flags() -> None:
    done = _run("--help")
    assert done.returncode == 0 and "--ddp_bucket_cap_mb" in done.stdout and "--steps_per_turn" in done.stdout
