"""What is trained under each engine, and how it is started: shared by test_engines.py and support_matrix.py."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file

from dllm.models.tiny import make_tiny_checkpoint

ROOT = pathlib.Path(__file__).parents[2]
WORKER = pathlib.Path(__file__).with_name("engine_worker.py")
ENGINES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}

COMMON = {
    "max_steps": 3,
    "learning_rate": 0.05,
    "optim": "sgd",
    "warmup_steps": 0,
    "logging_steps": 1,
    "seed": 1,
    "train_sampling_strategy": "sequential",
    "per_device_eval_batch_size": 3,
}
# The mean over rows: then the loss and the inner gradient of two processes' halves, averaged, are those of one process
# also where rows have unequal numbers of tokens to predict.
ROWS = {"loss_norm_type": "batch"}
MEMORY = {**ROWS, "mem_enabled": True, "mem_inner_rank": 4, "mem_inner_layer_fraction": 0.4}
RESUME = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4, "save_steps": 2}
TWICE = {"gradient_accumulation_steps": 2}
CHECKPOINTING = {"gradient_checkpointing": True}
# A threshold that nothing exceeds reveals one token per block and forward in every row.
RELAY = {"relay_gate": "default", "relay_threshold": 1.0, "relay_block_size": 4}
# A relay knows no other mean; all rows have as many masks.
TOKENS = {"loss_norm_type": "token", "mem_inner_grad_clip": 0.0}
LORA = {"lora": True, "lora_dropout": 0.0}
FOUR_BIT = {**LORA, "load_in_4bit": True}


def _scenario(family: str, settings: dict[str, Any], model: dict[str, Any] | None = None, **rest: Any) -> dict:
    return {"checkpoint": family, "settings": {**COMMON, **settings}, "model": model or {}, **rest}


SCENARIOS: dict[str, dict[str, Any]] = {
    "full": _scenario("dense", {}),
    "full, mixture of experts": _scenario("sparse", {}),
    "LoRA": _scenario("dense", {}, LORA),
    "4-bit + LoRA": _scenario("dense", {}, FOUR_BIT),
    "accumulation": _scenario("dense", TWICE),
    "checkpointing": _scenario("dense", CHECKPOINTING),
    "a rank without labels": _scenario("dense", ROWS, first_empty=True),
    "block diffusion": _scenario("blocks", {}, trainer="bd3lm"),
    "save, resume": _scenario("dense", RESUME, resumes=True),
    "memory": _scenario("dense", MEMORY),
    "memory, block diffusion": _scenario("blocks", MEMORY, trainer="mem_bd3lm"),
    "memory, LoRA: save, resume": _scenario("dense", {**MEMORY, **RESUME}, LORA, resumes=True),
    "memory, mixture of experts": _scenario("sparse", MEMORY),
    "memory, LoRA": _scenario("dense", MEMORY, LORA),
    "memory, 4-bit + LoRA": _scenario("dense", MEMORY, FOUR_BIT),
    "memory, accumulation, checkpointing": _scenario("dense", {**MEMORY, **TWICE, **CHECKPOINTING}),
    "memory per row": _scenario("dense", {**MEMORY, "mem_scope": "row"}),
    "memory per rank": _scenario("dense", {**MEMORY, "mem_sync_inner": False}),
    "memory, a rank without labels": _scenario("dense", MEMORY, first_empty=True),
    "relay": _scenario("dense", RELAY, trainer="relay"),
    "relay and memory": _scenario("dense", {**RELAY, **MEMORY, **TOKENS}, trainer="relay"),
}
# What one process has no counterpart of is compared with DDP.
AGAINST_DDP = ("memory per rank",)
REFUSED = {
    (engine, name): "ZeRO-3 cannot shard 4-bit weights: use DDP, FSDP2 or ZeRO-2, or drop load_in_4bit"
    for engine in ("zero3",)
    for name in ("4-bit + LoRA", "memory, 4-bit + LoRA")
}


def make_checkpoints(folder: pathlib.Path) -> dict[str, str]:
    """Tiny models by the names that scenarios use. Larger weights than usual, so that a memory shows; the mixture of
    experts with usual ones, where rounding sends fewer tokens to another expert."""
    made = {
        "dense": ("llada", {"d_model": 32, "n_layers": 5, "init_std": 0.1}),
        "sparse": ("llada_moe", {"hidden_size": 32, "num_hidden_layers": 3, "num_experts": 4}),
        "blocks": ("llada2_moe", {"hidden_size": 32, "num_hidden_layers": 3}),
    }
    return {name: str(make_tiny_checkpoint(folder / name, family, **own)) for name, (family, own) in made.items()}


def _clear_stale_locks() -> None:
    """DeepSpeed compiles an operator at its first start; a process that is killed meanwhile leaves a lock, for which
    all later ones wait forever."""
    cache = pathlib.Path(os.environ.get("TORCH_EXTENSIONS_DIR") or pathlib.Path.home() / ".cache/torch_extensions")
    for lock in cache.glob("**/lock"):
        if time.time() - lock.stat().st_mtime > 600:
            lock.unlink(missing_ok=True)


def run(engine: str | None, checkpoints: dict[str, str], folder: pathlib.Path) -> list[dict[str, Any]]:
    """What each process saw, by scenario; `engine` None: one process with the batches of two.

    Raises:
        RuntimeError: it failed; the end of its output.
    """
    folder.mkdir()
    _clear_stale_locks()
    scenarios = {}
    for name, scenario in SCENARIOS.items():
        batch = {"per_device_train_batch_size": 4 if engine is None else 2}
        made = {**scenario, "checkpoint": checkpoints[scenario["checkpoint"]]}
        scenarios[name] = {
            **made,
            "settings": {**scenario["settings"], **batch},
            "refused": (engine, name) in REFUSED,
        }
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    words = [str(WORKER), str(folder), str(folder / "scenarios.json")]
    config = ROOT / f"scripts/accelerate_configs/cpu_{engine}.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    command = [sys.executable, *(launcher if engine else []), *words]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=900)  # DeepSpeed compiles an operator at its first start
        finally:
            if process.poll() is None:  # ranks that wait for each other would outlive their launcher
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"{engine}: {log.read()[-4000:]}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2 if engine else 1)]


def runner(folder: pathlib.Path) -> Callable[[str | None], list[dict[str, Any]]]:
    """`run` in subfolders of `folder`, each engine once."""
    checkpoints = make_checkpoints(folder)
    return functools.cache(lambda engine: run(engine, checkpoints, folder / (engine or "one")))


def saved(folder: pathlib.Path, engine: str | None, name: str, which: str = "final") -> dict[str, torch.Tensor]:
    """The tensors of a scenario's model or adapter file."""
    (file,) = (folder / (engine or "one") / name / which).glob("*model.safetensors")
    return load_file(file)


def loss_difference(seen: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest relative difference of the logged losses."""
    pairs = zip(seen["losses"], expected["losses"], strict=True)
    return max(abs(one - other) / abs(other) for one, other in pairs)
