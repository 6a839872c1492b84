"""The benchmark of a training step, run as a user runs it, at a tiny size; how fast anything is does not matter."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench" / "training_step.py"
SIZES = ("--hidden_size", "32", "--num_layers", "3", "--num_heads", "4", "--vocab_size", "200", "--length", "32")
SIZES = (*SIZES, "--prompt_length", "8", "--rounds", "2", "--warmup_rounds", "1")
PLAIN_PARTS = {"forward and loss", "outer backward", "clip, optimizer, zero_grad", "other", "whole"}


def _run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *SIZES, *flags],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def run_here(monkeypatch):
    """A function (flags) -> what the script prints, run in this process: a new one takes seconds to import torch."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("training_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    threads = torch.get_num_threads()

    def run(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SIZES, *flags])
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            script.main()
        return shown.getvalue()

    yield run
    torch.set_num_threads(threads)


def _check(shown: str, results: dict) -> None:
    """What every run must show and write."""
    (ratio,) = re.findall(r"^ratio memdlm/plain: (\d+\.\d\d)$", shown, re.MULTILINE)
    assert float(ratio) == pytest.approx(results["ratios"]["memdlm"]["ratio"], abs=0.006)
    assert {len(seconds) for seconds in results["seconds"].values()} == {2}
    assert set(results["parts"]["plain"]) == PLAIN_PARTS
    for parts in results["parts"].values():
        whole = parts.pop("whole")
        assert all(seconds > 0 for seconds in parts.values()), parts
        assert sum(parts.values()) == pytest.approx(whole, rel=0.05)


def test_plain_memory_and_full_vocabulary_steps_train_on_one_loss(tmp_path) -> None:
    file = tmp_path / "numbers.json"
    done = _run("--compare_full_vocabulary", "True", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(file.read_text())
    _check(done.stdout, results)
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
def test_settings_of_model_and_memory(run_here, tmp_path, flags) -> None:
    file = tmp_path / "numbers.json"
    shown = run_here(*flags, "--peak_memory", "False", "--json", str(file))
    results = json.loads(file.read_text())
    _check(shown, results)
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
        (("--family", "llada", "--num_experts", "4"), "--num_experts has no effect with --family llada"),
        (("--vocab_size", "7"), "--vocab_size must be at least 16, got 7"),
        (("--prompt_length", "32"), "--prompt_length must be below --length 32, got 32"),
        (("--json", "no/such/folder/x.json"), "its folder does not exist"),
        (("--time", "1"), "--time must lie in [0.01, 0.99]"),
    ],
)
def test_wrong_flags_are_one_line(run_here, capsys, flags, message) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_here(*flags)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_a_wrong_memory_setting_is_one_line() -> None:
    done = _run("--mem_inner_lr", "-1")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith("mem_inner_lr must be at least 0")
    assert "Traceback" not in done.stderr


def test_block_diffusion_steps(tmp_path, run_here) -> None:
    sizes = ("--family", "llada2", "--objective", "bd3lm", "--block_size", "8", "--peak_memory", "False")
    shown = run_here(*sizes, "--json", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())
    _check(shown, results)
    assert results["options"]["objective"] == "bd3lm"
    # Both kinds see the same masks: their first losses differ by what the memory does alone.
    plain, memdlm = (results["losses"][kind][0] for kind in ("plain", "memdlm"))
    assert plain == pytest.approx(memdlm, rel=0.1)


def test_block_size_needs_block_diffusion() -> None:
    done = _run("--block_size", "8")
    assert done.returncode == 2 and "no effect without --objective bd3lm" in done.stderr
