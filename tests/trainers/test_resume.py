"""kill -9 at any moment, then --resume_from_checkpoint True: bit for bit the run that nothing stopped."""

import importlib.util
import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import pytest
import torch

from dllm.models.backbone import unwrap
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.checkpoints import STAGING_FOLDER, list_checkpoints

WORKER = pathlib.Path(__file__).with_name("resume_worker.py")
# Six batches and three steps in each of three epochs. Logs, checkpoints and evaluations fall on different steps.
COMMON = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "learning_rate": 1e-2,
    "warmup_steps": 0.2,
    "logging_steps": 3,
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "seed": 1,
}
MEMORY = {"mem_enabled": True, "mem_inner_rank": 4, "mem_inner_layer_fraction": 0.5, "mem_inner_lr": 0.5}
NUM_BATCHES, FIRST_SAVED = 18, 4
# name -> (LoRA, settings, the step whose checkpoint is half written; None: in the middle of a step)
SCENARIOS = {
    "mdlm-full": (False, {}, None),
    "mdlm-lora": (True, {}, None),
    "memory-full": (False, MEMORY, None),
    "memory-lora": (True, {**MEMORY, "gradient_checkpointing": True}, None),
    "memory-saving": (False, MEMORY, 6),
    "memory-one-log": (False, {**MEMORY, "logging_steps": 9, "gradient_accumulation_steps": 4}, None),
}


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("resume_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict[str, dict]:
    """Scenario -> what the worker was given; all were killed."""
    folder = tmp_path_factory.mktemp("resume")
    tiny = make_tiny_checkpoint(folder / "tiny", "llada", d_model=32, n_layers=2, mlp_hidden_size=32, init_std=0.1)
    scenarios = {
        name: {
            "checkpoint": str(tiny),
            "output": str(folder / name),
            "lora": lora,
            "settings": {**COMMON, **settings},
            # Not before the first checkpoint: then the run would begin anew.
            "batch": random.SystemRandom().randint(2 * FIRST_SAVED + 1, NUM_BATCHES),
            "saving": saving,
        }
        for name, (lora, settings, saving) in SCENARIOS.items()
    }
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder / "scenarios.json"), str(folder / "codes.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads((folder / "codes.json").read_text())
    assert codes == dict.fromkeys(SCENARIOS, -signal.SIGKILL), done.stderr[-3000:]
    return scenarios


def _logged(trainer) -> list:
    names = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_nll")
    return [
        (entry["step"], name, entry[name]) for entry in trainer.state.log_history for name in names if name in entry
    ]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_run_goes_on_bit_for_bit(killed, worker, tmp_path, name: str) -> None:
    scenario = killed[name]
    where, output = f"killed after batch {scenario['batch']}", pathlib.Path(scenario["output"])
    arguments = (scenario["lora"], scenario["settings"])
    if scenario["saving"] is not None:
        assert (output / STAGING_FOLDER / f"checkpoint-{scenario['saving']}").is_dir()
        assert list_checkpoints(output)[0].name == f"checkpoint-{scenario['saving'] - 2}"
    whole = worker.build(scenario["checkpoint"], str(tmp_path / "whole"), *arguments)
    whole.train()
    resumed = worker.build(scenario["checkpoint"], str(output), *arguments)
    resumed.train(resume_from_checkpoint="True")
    assert not (output / STAGING_FOLDER).exists()
    assert _logged(whole) == _logged(resumed) and _logged(whole), where
    assert whole.state.global_step == resumed.state.global_step == whole.state.max_steps
    for key, value in unwrap(whole.model).state_dict().items():
        assert torch.equal(value, unwrap(resumed.model).state_dict()[key]), f"{key}, {where}"
