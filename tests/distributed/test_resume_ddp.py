"""Two processes that stop and go on (gloo, CPU): one step for all at a signal, another number of them, one dying."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.checkpoints import find_damage, list_checkpoints, read_manifest

pytestmark = pytest.mark.distributed
ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = pathlib.Path(__file__).with_name("resume_worker.py")
# Eight rows a step: two steps per epoch, three epochs. A memory per micro-batch, so that two processes of two rows with
# two batches a step are one process with four.
SETTINGS = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,
    "optim": "sgd",
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_steps": 3,
    "save_total_limit": None,
    "seed": 1,
    "mem_enabled": True,
    "mem_inner_rank": 4,
    "mem_inner_layer_fraction": 0.5,
    "mem_sync_inner": False,
}
BATCHES = {1: 4, 2: 2}


def _start(folder: pathlib.Path, processes: int, scenarios: dict[str, dict]) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*(launcher if processes > 1 else []), str(WORKER), str(folder), str(folder / "scenarios.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)


def _seen(folder: pathlib.Path, processes: int) -> list[dict]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    sizes = {"d_model": 32, "n_layers": 2, "mlp_hidden_size": 32, "init_std": 0.1}
    return str(make_tiny_checkpoint(tmp_path_factory.mktemp("resume_ddp") / "tiny", "llada", **sizes))


@pytest.fixture(scope="module")
def scenario(tiny):
    """A function (output, processes, **more) -> what the worker is given."""

    def make(output: pathlib.Path, processes: int, **more) -> dict:
        settings = {**SETTINGS, "gradient_accumulation_steps": BATCHES[processes]}
        return {"checkpoint": tiny, "output": str(output), "settings": settings, **more}

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory, scenario) -> tuple[pathlib.Path, subprocess.CompletedProcess[str]]:
    """Folder of an uninterrupted run of two processes, and of one in which rank 1 and later rank 0 get a signal."""
    folder = tmp_path_factory.mktemp("runs")
    stopped = scenario(folder / "stopped", 2, how="SIGUSR1", batches=[5, 3])  # rank 1 in step 2, rank 0 too late
    done = _start(folder / "two", 2, {"whole": scenario(folder / "whole", 2), "stopped": stopped})
    return folder, done


def test_a_signal_to_one_process_stops_all_after_the_same_step(runs) -> None:
    folder, done = runs
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("stopped by")]
    assert line.startswith("stopped by SIGUSR1 at step 2 of 6; saved")
    assert done.stderr.count("exitcode  : 75") + done.stderr.count("exitcode: 75") >= 1
    (checkpoint,) = list_checkpoints(folder / "stopped")
    assert checkpoint.name == "checkpoint-2" and find_damage(checkpoint) is None
    manifest = read_manifest(checkpoint)
    assert (manifest["num_processes"], manifest["global_batch"]) == (2, 8)
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= manifest["files"].keys()


def test_stopped_runs_go_on_with_as_many_processes_bit_for_bit_and_with_others_closely(runs, scenario) -> None:
    folder, _ = runs
    (folder / "from_two").mkdir()
    two = str(folder / "whole" / "checkpoint-3")  # in the middle of the second epoch
    again = scenario(folder / "stopped", 2, resume="True")
    one = scenario(folder / "one", 1, resume=two)
    alone = scenario(folder / "alone", 1)
    done = _start(folder / "single", 1, {"one": one, "alone": alone})
    assert done.returncode == 0, done.stderr[-3000:]
    more = scenario(folder / "more", 2, resume=str(folder / "alone" / "checkpoint-3"))
    done = _start(folder / "again", 2, {"again": again, "more": more})
    assert done.returncode == 0, done.stderr[-3000:]
    whole, single, resumed = _seen(folder / "two", 2), _seen(folder / "single", 1)[0], _seen(folder / "again", 2)
    for first, second in zip(whole, resumed, strict=True):
        assert second["again"]["world_size"] == 2
        assert second["again"]["logged"] == first["whole"]["logged"]
        assert second["again"]["weights"] == first["whole"]["weights"]
    # float32: the gradients of four batches are summed in another order.
    for run in (single["one"], single["alone"], resumed[0]["more"]):
        assert len(run["logged"]) == 6
        for now, before in zip(run["logged"], whole[0]["whole"]["logged"], strict=True):
            assert now == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("how", ["error", "SIGKILL"])
def test_when_one_process_dies_the_others_stop_soon(scenario, tmp_path, how: str) -> None:
    began = time.monotonic()
    dying = scenario(tmp_path / "out", 2, how=how, batches=[0, 4])  # inside step 2
    done = _start(tmp_path / "run", 2, {"dying": dying})
    assert done.returncode != 0
    # Bounded by torchrun, which gives them 30 seconds; starting takes a few.
    assert time.monotonic() - began < 120
    said = "this rank fails" if how == "error" else "SIGKILL"
    assert said in done.stderr
    assert list_checkpoints(tmp_path / "out") == []


def test_on_a_busy_port_a_launch_of_one_node_takes_another_and_says_so(tiny, tmp_path) -> None:
    (tmp_path / "rank.py").write_text("import os; print('rank', os.environ['RANK'])")
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        command = ["accelerate.commands.launch", "--config_file", str(ROOT / "scripts/accelerate_configs/cpu_ddp.yaml")]
        done = subprocess.run(
            [sys.executable, "-m", *command, "--main_process_port", str(busy.getsockname()[1]), tmp_path / "rank.py"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split()) == ["0", "1", "rank", "rank"]
    assert "is already in use" in done.stderr
