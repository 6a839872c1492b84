"""Two processes under DDP (gloo, CPU) against one."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dllm.models.tiny import make_tiny_checkpoint

pytestmark = pytest.mark.distributed
WORKER = pathlib.Path(__file__).with_name("ddp_worker.py")
SETTINGS = {
    "max_steps": 3,
    "learning_rate": 0.05,
    "optim": "sgd",
    "warmup_steps": 0,
    "logging_steps": 1,
    "seed": 1,
    "per_device_eval_batch_size": 3,
}
MEMORY = {"mem_enabled": True, "mem_inner_rank": 4, "mem_inner_layer_fraction": 0.4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("ddp") / "tiny"
    return make_tiny_checkpoint(folder, "llada_moe", hidden_size=32, num_hidden_layers=5, num_experts=4)


def _run(checkpoint: pathlib.Path, output: pathlib.Path, processes: int, **settings) -> list[dict]:
    output.mkdir()
    words = [str(WORKER), str(checkpoint), str(output), json.dumps({**SETTINGS, **settings})]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(launcher if processes > 1 else []), *words]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    seen = [json.loads((output / f"{rank}.json").read_text()) for rank in range(processes)]
    assert [one["world_size"] for one in seen] == [processes] * processes
    return seen


def test_two_processes_train_as_one_on_the_same_global_batch(checkpoint, tmp_path) -> None:
    (single,) = _run(checkpoint, tmp_path / "one", 1, per_device_train_batch_size=4)
    ranks = _run(checkpoint, tmp_path / "two", 2, per_device_train_batch_size=2)
    assert ranks[0]["weights"] == ranks[1]["weights"]
    # float32; gradients are averaged over two halves instead of summed over one batch. Rows have equally many maskable
    # positions.
    assert ranks[0]["losses"] == pytest.approx(single["losses"], rel=1e-4)
    for name, value in single["weights"].items():
        assert ranks[0]["weights"][name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    # Over all ranks, weighted by tokens: the same number on every rank and as in one process.
    assert ranks[0]["eval_nll"] == ranks[1]["eval_nll"] == pytest.approx(single["eval_nll"], rel=1e-4)


@pytest.mark.parametrize("sync", [True, False])
def test_inner_gradients_are_averaged_when_asked(checkpoint, tmp_path, sync: bool) -> None:
    settings = {**MEMORY, "mem_sync_inner": sync, "gradient_checkpointing": sync}
    first, second = _run(checkpoint, tmp_path / "two", 2, per_device_train_batch_size=2, **settings)
    assert len(first["written"]) == len(second["written"]) >= 3
    training = slice(0, 3)  # evaluation writes each rank's own
    assert (first["written"][training] == second["written"][training]) == sync
    assert first["weights"] == second["weights"]
