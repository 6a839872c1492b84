"""Two processes evaluate what one does, each a part of the documents (gloo, CPU)."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from dllm.models.tiny import make_tiny_checkpoint

pytestmark = pytest.mark.distributed
ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = pathlib.Path(__file__).with_name("eval_worker.py")
# An odd number: one process is given a document twice.
TEXTS = ["The old man and the boy", "def f(x, y, z=3):", "import json, sys, os", "a b c d e f g", "one two three four"]
MEMORY = {"mem_enabled": True, "mem_inner_rank": 4, "mem_inner_layer_fraction": 0.5, "mem_prompt_mask_ratio": 0.5}


def _run(command: list[str], cwd: pathlib.Path) -> str:
    """Standard error of a command that must succeed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with (cwd / "log").open("w+") as log:
        process = subprocess.Popen(command, env=env, cwd=cwd, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(timeout=300)
        finally:
            if process.poll() is None:  # ranks that wait for each other would outlive their launcher
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        written = log.read()
    assert process.returncode == 0, written[-3000:]
    return written


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("eval_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(make_tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", "llada", n_layers=2, init_std=0.3))


@pytest.fixture(scope="module")
def arguments(checkpoint, tmp_path_factory) -> dict:
    # One row per forward: float32 products of other sizes round in another way.
    answers = str(tmp_path_factory.mktemp("answers"))
    return {"pretrained": checkpoint, "answers_dir": answers, "mc_num": 3, "batch_size": 1, "steps": 2, **MEMORY}


@pytest.fixture(scope="module")
def two(worker, arguments, tmp_path_factory) -> tuple[pathlib.Path, dict, str]:
    folder = tmp_path_factory.mktemp("tasks")
    worker.write_tasks(folder, TEXTS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(WORKER), str(folder), str(folder / "out.json"), json.dumps(arguments)]
    printed = _run(command, folder)
    return folder, json.loads((folder / "out.json").read_text()), printed


def _answers(results: dict) -> dict[tuple[str, int], list]:
    """First answer to each request of every document (a padding repeat adds another)."""
    return {
        (task, sample["doc_id"]): [responses[0] for responses in sample["resps"]]
        for task, samples in results["samples"].items()
        for sample in samples
    }


def test_two_processes_give_the_results_of_one(worker, arguments, two):
    folder, results, printed = two
    one = worker.evaluate(folder, {**arguments, "answers_dir": None})
    assert len(_answers(one)) == 3 * len(TEXTS)
    assert _answers(results) == _answers(one)
    for task, metrics in one["results"].items():
        for name, value in metrics.items():
            expected = pytest.approx(value) if isinstance(value, float) else value
            assert results["results"][task][name] == expected, (task, name)
    assert (results["config"]["num_processes"], one["config"]["num_processes"]) == (2, 1)
    # Each kind is announced once, by the main process.
    assert printed.count("generate_until on each of 2 processes") == 1


def test_the_report_adds_up_over_processes(two, worker, arguments):
    folder, results, _ = two
    config = results["config"]
    one = worker.evaluate(folder, {**arguments, "answers_dir": None})["config"]
    # 5 texts to go on from, 5 of 3 choices, 5 to read. The second process has one document less and is given its last
    # request again, as often as requests are missing.
    assert one["num_requests"] == 5 + 15 + 5
    assert config["num_requests"] == one["num_requests"] + 1 + 3 + 1
    assert config["mean_nfe"] == pytest.approx(one["mean_nfe"])
    assert config["num_memories_written"] >= one["num_memories_written"] > 5
    assert config["adaptation_seconds"] > 0 and config["tokens_per_second"] > 0


def test_one_process_goes_on_from_the_answers_of_two(two, worker, arguments):
    folder, results, _ = two
    files = sorted(path.name for path in pathlib.Path(arguments["answers_dir"]).iterdir())
    assert files == ["answers-0.jsonl", "answers-1.jsonl"]
    again = worker.evaluate(folder, arguments)
    assert _answers(again) == _answers(results)
    assert again["config"]["num_resumed"] == again["config"]["num_requests"] == 25
    assert again["config"]["num_memories_written"] == 0


def test_the_adapter_is_launched_by_path(checkpoint, tmp_path):
    config = ROOT / "scripts" / "accelerate_configs" / "cpu_ddp.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    words = ["--tasks", "memdlm_babilong_qa1", "--metadata", '{"lengths": "0k"}', "--limit", "3", "--device", "cpu"]
    words += ["--model_args", f"pretrained={checkpoint},steps=2", "--output_path", str(tmp_path / "out")]
    printed = _run([*launcher, str(ROOT / "memdlm" / "eval" / "llada.py"), *words], tmp_path)
    (path,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(path.read_text())
    assert results["config"]["num_processes"] == 2 and results["config"]["mean_nfe"] <= 2
    assert results["n-samples"]["memdlm_babilong_qa1"]["effective"] == 3
    assert printed.count("|memdlm_babilong_qa1|") == 1  # one table
