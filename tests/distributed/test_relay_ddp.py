"""Relay under DDP: two processes (gloo, CPU), started once for all scenarios, against one on the same global batch."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dllm.models.tiny import make_tiny_checkpoint

pytestmark = pytest.mark.distributed
WORKER = pathlib.Path(__file__).with_name("relay_worker.py")
# A threshold that nothing exceeds reveals one token per block and forward in every row: then all rows have as many
# masks, the mean over two ranks is the mean over their rows, and rows leave together on all ranks.
COMMON = {
    "max_steps": 5,
    "learning_rate": 0.05,
    "optim": "sgd",
    "warmup_steps": 0,
    "logging_steps": 1,
    "seed": 1,
    "train_sampling_strategy": "sequential",
    "relay_gate": "default",
    "relay_threshold": 1.0,
}
MEMORY = {"mem_enabled": True, "mem_inner_rank": 4, "mem_inner_layer_fraction": 0.5, "mem_inner_lr": 0.5}
SCENARIOS = {
    "full": ("llada", False, {"relay_block_size": 4}),
    "memory": ("llada", False, {"relay_block_size": 4, "mem_inner_grad_clip": 0.0, **MEMORY}),
    "lora": ("llada", True, {"relay_block_size": 4, "relay_num_steps": 3}),
    "blocks": ("fast_dllm_v2", False, {"gradient_checkpointing": True}),
    # Rows of unequal numbers of labels: the processes go through the data at paces of their own.
    "uneven": ("llada", False, {"relay_block_size": 16, "max_steps": 12}),
}
SAME_PACE = [name for name in SCENARIOS if name != "uneven"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    sizes = {
        "llada": {"d_model": 32, "n_layers": 4, "init_std": 0.1},
        "fast_dllm_v2": {"hidden_size": 32, "bd_size": 4},
    }
    folder = tmp_path_factory.mktemp("relay_ddp")
    return {family: str(make_tiny_checkpoint(folder / family, family, **own)) for family, own in sizes.items()}


@pytest.fixture(scope="module")
def seen(checkpoints, tmp_path_factory) -> dict[int, list[dict]]:
    """Number of processes -> what each of them saw, by scenario."""
    found = {}
    for processes in (1, 2):
        output = tmp_path_factory.mktemp(f"processes_{processes}")
        rows = {"per_device_train_batch_size": 4 // processes}
        scenarios = {
            name: {
                "family": family,
                "checkpoint": checkpoints[family],
                "lora": lora,
                "uneven": name == "uneven",
                "settings": {**COMMON, **own, **rows},
            }
            for name, (family, lora, own) in SCENARIOS.items()
        }
        (output / "scenarios.json").write_text(json.dumps(scenarios))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*(launcher if processes > 1 else []), str(WORKER), str(output), str(output / "scenarios.json")]
        done = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[processes] = [json.loads((output / f"{rank}.json").read_text()) for rank in range(processes)]
        assert all(one[name]["world_size"] == processes for one in found[processes] for name in SCENARIOS)
    return found


@pytest.mark.parametrize("name", SAME_PACE)
def test_two_processes_train_as_one_on_the_same_global_batch(seen, name: str) -> None:
    (single,) = (one[name] for one in seen[1])
    first, second = (one[name] for one in seen[2])
    assert first["weights"] == second["weights"] and first["relay"] == second["relay"]
    # float32; gradients are averaged over two halves instead of summed over one batch.
    assert first["losses"] == pytest.approx(single["losses"], rel=1e-4)
    assert first["grad_norms"] == pytest.approx(single["grad_norms"], rel=1e-3)
    for one, other in zip(first["relay"], single["relay"], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    for key, value in single["weights"].items():
        assert first["weights"][key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
    assert max(first["shares"]) > 0


def test_processes_that_use_up_rows_at_different_paces_stay_one_model(seen) -> None:
    first, second = (one["uneven"] for one in seen[2])
    assert first["weights"] == second["weights"] and len(first["losses"]) == 12
    assert first["taken"] != second["taken"]


@pytest.mark.parametrize("name", SAME_PACE)
def test_each_process_has_rows_of_its_own_and_gets_fresh_ones(seen, name: str) -> None:
    (single,) = (one[name] for one in seen[1])
    first, second = (one[name] for one in seen[2])
    assert sorted(first["examples"] + second["examples"]) == sorted(single["examples"])
    assert not set(single["examples"]) & set(range(4))  # the first four rows are done
