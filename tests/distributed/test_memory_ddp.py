"""The memory under DDP: two processes (gloo, CPU), started once for all scenarios."""

import importlib.util
import itertools
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

from dllm.models.tiny import make_tiny_checkpoint

pytestmark = pytest.mark.distributed
WORKER = pathlib.Path(__file__).with_name("memory_worker.py")
# The learning rate of the model is 0 where a run is compared with one process: each step starts from the same weights.
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.0,
    "optim": "sgd",
    "warmup_steps": 0,
    "logging_steps": 1,
    "seed": 1,
    "train_sampling_strategy": "sequential",
    "mem_enabled": True,
    "mem_inner_layer_fraction": 0.4,
}
LOW_RANK = {"mem_inner_rank": 4}
NO_CLIP = {"mem_inner_grad_clip": 0.0, "mem_inner_lr": 0.05}

# What one process with the whole batch writes too: (rows, settings).
EQUAL = {
    "token": ("same_masks", {**LOW_RANK, **NO_CLIP}),
    "sequence": ("plain", {**LOW_RANK, **NO_CLIP, "loss_norm_type": "sequence"}),
    # The mean over two ranks of two rows is the value of four: so is its clip, if the mean is clipped.
    "clip": ("plain", {**LOW_RANK, "loss_norm_type": "batch", "mem_inner_grad_clip": 0.05, "mem_inner_lr": 0.5}),
    "distill": ("same_masks", {**LOW_RANK, **NO_CLIP, "mem_inner_loss_type": "distill"}),
    "full": ("plain", {**NO_CLIP, "loss_norm_type": "batch", "mem_inner_adapter_type": "full"}),
}
# The rank whose first batch has nothing to predict in the inner loop takes part all the same: rows by target.
NOTHING = {"response": "no_labels", "prompt": "no_prompt", "disjoint": "no_labels"}
OBJECTIVES = ["ce", "distill", "distill_hidden"]
TRAINED = {**LOW_RANK, "learning_rate": 0.05}


def _scenarios(dense: str, sparse: str) -> dict[str, dict]:
    made = {name: (dense, rows, settings) for name, (rows, settings) in EQUAL.items()}
    made["three_steps"] = (sparse, "plain", {**TRAINED, "mem_num_inner_steps": 3, "mem_num_inner_epochs": 2})
    made["alone"] = (sparse, "plain", {**TRAINED, "mem_sync_inner": False})
    made["row"] = (sparse, "plain", {**TRAINED, "mem_scope": "row"})
    accumulated = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "gradient_checkpointing": True}
    made["accumulated"] = (sparse, "plain", {**TRAINED, **accumulated})
    made["bad"] = (sparse, "plain", TRAINED)
    for (target, rows), objective in itertools.product(NOTHING.items(), OBJECTIVES):
        settings = {**TRAINED, "mem_inner_target": target, "mem_inner_loss_type": objective}
        made[f"nothing {target} {objective}"] = (sparse, rows, settings)
    scenarios = {
        name: {"checkpoint": checkpoint, "rows": rows, "settings": {**SETTINGS, **settings}}
        for name, (checkpoint, rows, settings) in made.items()
    }
    scenarios["bad"]["bad_rank"] = 1
    return scenarios


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("memory_ddp")
    # Larger weights than usual: near-uniform predictions would hide what the memory does. Dense where runs are
    # compared, so that rounding cannot send a token to another expert.
    dense = make_tiny_checkpoint(folder / "dense", "llada", d_model=32, n_layers=5, init_std=0.1)
    sparse = make_tiny_checkpoint(
        folder / "sparse", "llada_moe", hidden_size=32, num_hidden_layers=5, num_experts=4, initializer_range=0.1
    )
    return _scenarios(str(dense), str(sparse))


@pytest.fixture(scope="module")
def ranks(scenarios, tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    """What the two ranks saw, by scenario."""
    output = tmp_path_factory.mktemp("ranks")
    torch.save(scenarios, output / "scenarios.pt")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(WORKER), str(output), str(output / "scenarios.pt")]
    with (output / "log").open("w+") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=300)
        finally:
            if process.poll() is None:  # ranks that wait for each other would outlive their launcher
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        assert process.returncode == 0, log.read()[-3000:]
    first, second = (torch.load(output / f"{rank}.pt") for rank in range(2))
    assert all(one["world_size"] == 2 for one in (*first.values(), *second.values()))
    return {name: (first[name], second[name]) for name in scenarios}


@pytest.fixture(scope="module")
def train():
    """`train` of the worker, for a run in this process."""
    spec = importlib.util.spec_from_file_location("memory_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train


def _assert_same_weights(first: dict, second: dict) -> None:
    assert first["weights"].keys() == second["weights"].keys()
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]) and bool(value.isfinite().all()), name


@pytest.mark.parametrize("name", EQUAL)
def test_a_synchronised_memory_is_that_of_one_process_with_the_whole_batch(
    ranks, scenarios, train, tmp_path, name: str
) -> None:
    first, second = ranks[name]
    scenario = scenarios[name]
    whole = {**scenario, "settings": {**scenario["settings"], "per_device_train_batch_size": 4}}
    single = train(output=str(tmp_path), **whole)
    assert single["world_size"] == 1 and single["reduced"] == []
    assert len(first["written"]) == len(single["written"]) == 2
    for step, expected in enumerate(single["written"]):
        one, two = first["written"][step], second["written"][step]
        assert torch.equal(one, two)
        change = float((expected - single["initial"][step]).norm())
        # float32; two halves are averaged instead of one batch summed.
        assert float((one - expected).norm()) < 1e-3 * change and change > 1e-3


def test_one_flat_buffer_is_reduced_in_each_inner_step_and_nothing_else(ranks) -> None:
    for name, inner_steps in (("token", 2), ("full", 2), ("three_steps", 6)):
        for seen in ranks[name]:
            # Behind the inner steps of a batch how many losses are not finite, and the two logged losses.
            assert seen["reduced"] == ([[1, seen["numel"]]] * inner_steps + [[], [2]]) * 2, name
    for name in ("alone", "row"):
        assert all(seen["reduced"] == [[], [2]] * 2 for seen in ranks[name]), name


@pytest.mark.parametrize("name", ["three_steps", "accumulated"])
def test_ranks_that_synchronise_share_one_memory(ranks, name: str) -> None:
    first, second = ranks[name]
    batches = 4 if name == "accumulated" else 2
    assert len(first["written"]) == len(second["written"]) == batches
    assert all(torch.equal(one, two) for one, two in zip(first["written"], second["written"], strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first["losses"], second["losses"], strict=True))
    _assert_same_weights(first, second)


@pytest.mark.parametrize("name", ["alone", "row"])
def test_without_synchronisation_and_per_row_each_rank_has_its_own(ranks, name: str) -> None:
    first, second = ranks[name]
    for one, two in zip(first["written"], second["written"], strict=True):
        assert len(one) == (2 if name == "row" else 1) and not torch.equal(one, two)
    if name == "alone":  # the same initial values: what differs was learnt
        assert all(torch.equal(one, two) for one, two in zip(first["initial"], second["initial"], strict=True))
    _assert_same_weights(first, second)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("target", NOTHING)
def test_a_rank_with_nothing_to_predict_takes_part(ranks, target: str, objective: str) -> None:
    first, second = ranks[f"nothing {target} {objective}"]
    assert first["empty"][0].tolist() == [0.0, 0.0] and second["empty"][0].tolist() == [2.0, 2.0]
    assert second["losses"][0].tolist() == [[0.0], [0.0]]
    for step in range(2):
        assert torch.equal(first["written"][step], second["written"][step])
        assert float(first["changes"][step]) == float(second["changes"][step]) > 0
    assert len(first["logs"]) == len(second["logs"]) == 2
    _assert_same_weights(first, second)


def test_a_rank_whose_loss_is_not_finite_leaves_the_memory_to_the_other(ranks) -> None:
    first, second = ranks["bad"]
    assert all(bad.tolist() == [0.0, 0.0] for bad in first["bad"])
    assert all(bad.tolist() == [2.0, 2.0] for bad in second["bad"])
    for step in range(2):
        assert torch.equal(first["written"][step], second["written"][step]) and float(first["changes"][step]) > 0
    _assert_same_weights(first, second)


@pytest.mark.parametrize("name", ["three_steps", "alone", "row", "accumulated", "nothing response ce"])
def test_logged_losses_are_means_over_ranks(ranks, name: str) -> None:
    first, second = ranks[name]
    keys = ("loss_with_memory", "loss_without_memory", "memory_gap")
    assert [[log[key] for key in keys] for log in first["logs"]] == [[log[k] for k in keys] for log in second["logs"]]
    batches = len(first["observed"]) // 2  # per step
    assert batches == (2 if name == "accumulated" else 1)
    for key in keys[:2]:
        own = [[losses[key] for losses in seen["observed"]] for seen in (first, second)]
        assert own[0] != own[1]
        for step, log in enumerate(first["logs"]):
            part = slice(step * batches, (step + 1) * batches)
            values = own[0][part] + own[1][part]
            assert log[key] == pytest.approx(sum(values) / len(values), rel=1e-6)  # float32
            if key == "loss_with_memory":  # the number that the model is trained on, which transformers gathers
                assert log["loss"] == pytest.approx(log[key], rel=1e-5)


def test_ranks_draw_times_of_their_own(ranks) -> None:
    for name in ("three_steps", "accumulated"):
        first, second = (set(itertools.chain(*seen["times"])) for seen in ranks[name])
        assert len(first) == len(second) == 4 and not first & second
