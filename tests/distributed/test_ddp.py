"""Two processes under DDP (gloo, CPU) against one; more of the memory is in test_memory_ddp.py."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

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


def _written(output: pathlib.Path, processes: int) -> list[list[torch.Tensor]]:
    return [torch.load(output / f"{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def strong_checkpoint(tmp_path_factory) -> pathlib.Path:
    """Larger weights: near-uniform predictions would hide what the memory does. Dense, so that rounding cannot send a
    token to another expert."""
    folder = tmp_path_factory.mktemp("ddp") / "strong"
    return make_tiny_checkpoint(folder, "llada", d_model=32, n_layers=5, init_std=0.1)


def test_synchronised_fast_weights_are_those_of_one_process_on_the_global_batch(strong_checkpoint, tmp_path) -> None:
    # Sums over rows / B: the mean over two ranks of two rows is the value of four rows. No clip, which would hide a
    # factor; the learning rate of the model is 0 so that every step starts from the same weights.
    settings = {
        **MEMORY,
        "loss_norm_type": "batch",
        "learning_rate": 0.0,
        "mem_inner_grad_clip": 0.0,
        "mem_inner_lr": 0.05,
        "num_eval_rows": 10,
    }
    (single,) = _run(strong_checkpoint, tmp_path / "one", 1, per_device_train_batch_size=4, **settings)
    ranks = _run(strong_checkpoint, tmp_path / "two", 2, per_device_train_batch_size=2, **settings)
    (alone,), (first, second) = _written(tmp_path / "one", 1), _written(tmp_path / "two", 2)
    untouched = SETTINGS["max_steps"]
    for one, two, expected in zip(first[:untouched], second[:untouched], alone[:untouched], strict=True):
        assert torch.equal(one, two)
        # float32; two halves are averaged instead of one batch summed. A write moves phi by a hundred times more.
        assert float((one - expected).norm()) < 1e-5 * float(expected.norm())
    assert min(single["mem_change"]) > 1e-3 * float(alone[0].norm())
    assert ranks[0]["losses"] == pytest.approx(single["losses"], rel=1e-5)

    # Evaluation: each rank writes from its own rows (3 a batch: rank 0 gets rows 0-2 and 6-8, rank 1 rows 3-5 and 9),
    # to the memories that one process writes from the same rows.
    first, second, alone = (written[untouched:] for written in (first, second, alone))
    assert len(first) == len(second) == 2 and len(alone) == 4
    assert not any(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    for phi, expected in zip((first[0], second[0], first[1]), alone[:3], strict=True):
        assert float((phi - expected).norm()) < 1e-5 * float(expected.norm())


@pytest.mark.parametrize("num_rows", [10, 4])
def test_repeated_rows_of_an_uneven_evaluation_do_not_count(strong_checkpoint, tmp_path, num_rows: int) -> None:
    settings = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 2, "num_eval_rows": num_rows}
    (single,) = _run(strong_checkpoint, tmp_path / "one", 1, **settings)
    ranks = _run(strong_checkpoint, tmp_path / "two", 2, **settings)
    assert ranks[0]["metrics"]["eval_nll"] == ranks[1]["metrics"]["eval_nll"]
    for name in ("eval_nll", "eval_ppl"):
        # float32 logits of differently shaped batches; a row counted twice would move the mean by per cents.
        assert ranks[0]["metrics"][name] == pytest.approx(single["metrics"][name], rel=1e-4), name
