"""The benchmarks of decoding and of writing a memory, at tiny sizes; how fast anything is does not matter."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

BENCH = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "bench"
SIZES = ("--hidden_size", "32", "--num_layers", "3", "--num_heads", "4", "--vocab_size", "200", "--rounds", "2")
SIZES = (*SIZES, "--warmup_rounds", "0", "--prompt_length", "20", "--max_new_tokens", "8")


def _run(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / script), *SIZES, *flags],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_sampling(tmp_path) -> None:
    done = _run("sampling.py", "--caches", "none,dual", "--block_size", "4", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert {name: side["forwards"] for name, side in results["sides"].items()} == {
        "all logits": 8,
        "cache none": 8,
        "cache dual": 8,
    }
    assert results["share_of_equal_tokens"]["cache none"] == 1.0
    (ratio,) = re.findall(r"^ratio cache dual / all logits, time per step: (\d+\.\d+)$", done.stdout, re.MULTILINE)
    assert float(ratio) == pytest.approx(results["ratios"]["cache dual"]["step_seconds"]["ratio"], abs=6e-4)


def test_sampling_with_an_exact_cache(tmp_path) -> None:
    done = _run("sampling.py", "--family", "llada2", "--block_size", "4", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["share_of_equal_tokens"] == {"cache on": 1.0}
    assert results["sides"]["cache on"]["forwards"] == results["sides"]["cache off"]["forwards"] + 1  # the prompt


def test_adapt(tmp_path) -> None:
    done = _run("adapt.py", "--batch_size", "3", "--mem_num_inner_steps", "3", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["options"]["mem_num_inner_steps"] == 3
    # Both sides write the same memory: sums of other orders, float32.
    assert results["write"]["difference_over_change"] < 1e-4
    assert results["batch"]["share_of_equal_tokens"] > 0.9
    assert re.search(r"^ratio one by one / one batch: \d+\.\d\d$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        ("sampling.py", ("--caches", "triple"), "cache is 'triple'"),
        ("sampling.py", ("--family", "llada2", "--steps", "4"), "no effect with --family llada2"),
        ("adapt.py", ("--mem_inner_lr", "-1"), "mem_inner_lr must be at least 0"),
        ("adapt.py", ("--json", "no/such/folder/x.json"), "make it first"),
    ],
)
def test_wrong_flags(script: str, flags: tuple[str, ...], said: str) -> None:
    done = _run(script, *flags)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()[-1:]) == 1
