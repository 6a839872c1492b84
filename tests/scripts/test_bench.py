"""The benchmark of a training step, run as a user runs it, at a tiny size; how fast anything is does not matter."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MOE = ("--hidden_size", "32", "--num_layers", "3", "--num_heads", "4", "--vocab_size", "200", "--length", "32")
MOE = (*MOE, "--prompt_length", "8", "--rounds", "2", "--warmup_rounds", "1")
PLAIN_PARTS = {"forward and loss", "outer backward", "clip, optimizer, zero_grad", "other", "whole"}


def _run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/bench/training_step.py", *MOE, *flags],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def _results(tmp_path: pathlib.Path, *flags: str) -> dict:
    """The numbers of a run, after what every run must have shown."""
    file = tmp_path / "numbers.json"
    done = _run("--json", str(file), *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(file.read_text())
    (shown,) = re.findall(r"^ratio memdlm/plain: (\d+\.\d\d)$", done.stdout, re.MULTILINE)
    assert float(shown) == pytest.approx(results["ratios"]["memdlm"]["ratio"], abs=0.006)
    assert {len(seconds) for seconds in results["seconds"].values()} == {2}
    assert set(results["parts"]["plain"]) == PLAIN_PARTS
    for parts in results["parts"].values():
        whole = parts.pop("whole")
        assert all(seconds > 0 for seconds in parts.values()), parts
        assert sum(parts.values()) == pytest.approx(whole, rel=0.05)
    return results


def test_plain_memory_and_full_vocabulary_steps_train_on_one_loss(tmp_path) -> None:
    results = _results(tmp_path, "--compare_full_vocabulary", "True")
    losses = results["losses"]
    assert set(losses) == set(results["seconds"]) == {"plain", "memdlm", "full-vocabulary plain"}
    # One or two optimizer steps lie between them.
    assert losses["full-vocabulary plain"][0] == pytest.approx(losses["plain"][0], rel=0.02)
    assert results["ratios"]["full-vocabulary plain"]["ratio"] > 0
    assert set(results["peak_memory_mib"]) == {"plain", "memdlm"}
    assert all(mib > 50 for mib in results["peak_memory_mib"].values())


@pytest.mark.parametrize(
    "flags",
    [
        ("--lora", "True", "--mem_scope", "row", "--mem_inner_loss_type", "distill"),
        ("--family", "llada", "--gradient_checkpointing", "True", "--dtype", "bfloat16"),
    ],
    ids=["lora, row, distill", "llada, checkpointing, bfloat16"],
)
def test_settings_of_model_and_memory(tmp_path, flags) -> None:
    results = _results(tmp_path, *flags, "--peak_memory", "False")
    assert results["peak_memory_mib"] is None
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert {name: str(results["options"][name[2:]]) for name in given} == given
    machine = results["machine"]
    assert (machine["trained_parameters"] < machine["parameters"]) == ("--lora" in given)
    # Rows are chosen by their t of 0.5; of 48 labels, 24 masked ones are expected, and more in the state before.
    before, anchor = machine["inner_loss_positions"]
    assert anchor == machine["loss_positions"] and 10 < anchor < before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--layers", "3"), "unknown flag --layers; the closest known one is --num_layers"),
        (("--mem_inner_lr", "-1"), "mem_inner_lr must be at least 0"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message) -> None:
    done = _run(*flags)
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
