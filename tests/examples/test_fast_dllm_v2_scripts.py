"""examples/fast_dllm_v2: mix the data and evaluate code, with a tiny model."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dllm.data import load_sft_dataset
from dllm.models.tiny import make_tiny_checkpoint

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples" / "fast_dllm_v2"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("scripts") / "tiny"
    return str(make_tiny_checkpoint(folder, "fast_dllm_v2", **sizes, num_key_value_heads=1, head_dim=16))


@pytest.fixture
def run(model, tmp_path):
    def started(script: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        caches = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, "PATH": path, "MODEL": model, **caches, **variables}
        command = ["bash", str(EXAMPLES / script), *flags]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return started


def test_local_rows_are_mixed_at_the_published_settings(run, tmp_path) -> None:
    maths = tmp_path / "maths.jsonl"
    rows = [{"problem": f"What is {number} + 1?", "generated_solution": str(number + 1)} for number in range(9)]
    rows += [{"problem": "long " * 3000, "generated_solution": "x"}]
    maths.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    benchmark = tmp_path / "bench.jsonl"
    benchmark.write_text(json.dumps({"prompt": "What is 3 + 1?"}) + "\n")
    output = tmp_path / "mix"
    flags = ("--source", f"{maths}:20", "--num_test", "2")
    done = run("data_process.sh", *flags, OUTPUT=str(output), BENCHMARKS=str(benchmark))
    assert done.returncode == 0, done.stderr
    found = load_sft_dataset(str(output))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 6, "test": 2}
    report = json.loads(pathlib.Path(f"{output}.report.json").read_text())
    assert (report["seed"], report["max_tokens"]) == (42, 2048)
    assert report["sources"][0]["dropped"] == {"benchmark": 1, "prompt_chars": 1}


def test_code_is_evaluated(run, tmp_path) -> None:
    data = tmp_path / "own.jsonl"
    row = {"task_id": "Own/0", "prompt": "def same(x):\n", "entry_point": "same", "test": "def check(f):\n    f(1)"}
    data.write_text(json.dumps(row) + "\n")
    flags = ("--data", str(data), "--max_new_tokens", "16", "--device", "cpu")
    done = run("eval_code.sh", "humaneval", *flags, OUTPUT=str(tmp_path / "results.json"))
    assert done.returncode == 0, done.stderr
    assert "| humaneval | 1     | not run  |" in done.stdout
    config = json.loads((tmp_path / "results.json").read_text())["config"]
    wanted = {"sampler_block_size": 32, "sampler_sub_block_size": 8, "sampler_threshold": 0.85}
    assert {name: config[name] for name in wanted} == wanted and config["sampler_max_new_tokens"] == 16
    done = run("eval_code.sh", "chess")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "humaneval or mbpp" in done.stderr
