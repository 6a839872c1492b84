"""Trains the scenarios that tests/distributed/test_engines.py names, all in one process (start-up takes longest).

    accelerate launch --config_file scripts/accelerate_configs/cpu_zero2.yaml engine_worker.py OUTPUT SCENARIOS.json

Each process writes what it saw to OUTPUT/RANK.json, and every scenario its model to OUTPUT/NAME/final. Started without
a launcher it is the run in one process.
"""

import json
import pathlib
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from dllm.core.trainers import BD3LMConfig, BD3LMTrainer
from dllm.models.auto import load_tokenizer
from dllm.utils.args import ModelArguments
from memdlm import MemDLMConfig, MemDLMTrainer
from memdlm.models import get_model
from memdlm.relay import MemRelayConfig, MemRelayTrainer, RelayConfig, load_model
from memdlm.trainer import MemBD3LMConfig, MemBD3LMTrainer

TRAINERS: dict[str, Any] = {
    "mdlm": (MemDLMConfig, MemDLMTrainer),
    "bd3lm": (BD3LMConfig, BD3LMTrainer),
    "mem_bd3lm": (MemBD3LMConfig, MemBD3LMTrainer),
    "relay": (MemRelayConfig, MemRelayTrainer),
}
LENGTH = 20


def shard_on_cpu() -> None:
    """Makes accelerate use FSDP on a CPU where FSDP is asked for: by itself it runs plain DDP there."""
    original = AcceleratorState.__init__

    def init(self, *args: Any, **kwargs: Any) -> None:
        is_new = not self._shared_state
        original(self, *args, **kwargs)
        if is_new and self.__dict__.get("fsdp_plugin") is None and kwargs.get("fsdp_plugin") is not None:
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init


def make_rows(first_empty: bool) -> list[dict]:
    """Sixteen rows, 12 of 20 tokens to predict; with `first_empty` rows 2 and 3, those of the second rank's first step,
    have nothing to predict."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(16):
        ids = torch.randint(20, 200, (LENGTH,), generator=generator).tolist()
        known = LENGTH if first_empty and index in (2, 3) else 8
        rows.append({"input_ids": ids, "labels": [-100] * known + ids[known:], "example_id": index})
    return rows


def make_trainer(scenario: dict[str, Any], output: pathlib.Path) -> Any:
    """The trainer of a scenario, with all that it needs."""
    config_class, trainer_class = TRAINERS[scenario.get("trainer", "mdlm")]
    settings = {"output_dir": str(output), "use_cpu": True, "disable_tqdm": True}
    if not scenario.get("resumes"):
        settings["save_strategy"] = "no"
    # Before the model: the process group must be there when a sharded model is loaded.
    args = config_class(**{**settings, **scenario["settings"]})
    model_args = ModelArguments(scenario["checkpoint"], dtype="float32", **scenario.get("model", {}))
    if scenario.get("trainer") == "relay":
        model = load_model(model_args, RelayConfig(gate="default"), seed=1)
    else:
        model = get_model(model_args, seed=1)
    rows = make_rows(scenario.get("first_empty", False))
    return trainer_class(
        model=model,
        args=args,
        processing_class=load_tokenizer(scenario["checkpoint"]),
        train_dataset=rows,
        eval_dataset=rows[:6],
    )


def watch_memory(trainer: Any) -> list[float]:
    """Gets the sum of the absolute values of every memory that is written in training."""
    written: list[float] = []
    if trainer.memory is None:
        return written
    step, put = trainer.training_step, trainer.memory.fast.set
    last: list[torch.Tensor] = []

    def remember(flat: torch.Tensor | None, **options: Any) -> None:
        if flat is not None and not flat.requires_grad:
            last[:] = [flat]
        put(flat, **options)

    def train_step(*inputs: Any) -> torch.Tensor:
        loss = step(*inputs)
        written.append(float(last[0].double().abs().sum()))
        return loss

    trainer.memory.fast.set, trainer.training_step = remember, train_step
    return written


def held_share(trainer: Any) -> float:
    """Which share of the weights' numbers this process holds, in (0, 1]."""
    weights = list(trainer.lm.parameters())
    if trainer.engine == "zero3":
        return sum(weight.ds_tensor.numel() for weight in weights) / sum(weight.ds_numel for weight in weights)
    own = sum((weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in weights)
    return own / sum(weight.numel() for weight in weights)


def train(scenario: dict[str, Any], output: pathlib.Path) -> dict[str, Any]:
    """What one process saw of a training run."""
    trainer = make_trainer(scenario, output)
    written = watch_memory(trainer) if isinstance(trainer, MemDLMTrainer) else []
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(output / "final"))
    resumed = resume(scenario, output) if scenario.get("resumes") else []
    plugin = trainer.accelerator.state.deepspeed_plugin
    return {
        "world_size": trainer.accelerator.num_processes,
        "engine": str(trainer.accelerator.distributed_type.value) + (f"-{plugin.zero_stage}" if plugin else ""),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "grad_norms": [entry.get("grad_norm") for entry in trainer.state.log_history if "loss" in entry],
        "held_share": held_share(trainer),
        "written": written,
        "resumed": resumed,
        "metrics": {name: metrics[name] for name in sorted(metrics) if name in ("eval_nll", "eval_memory_loss")},
    }


def resume(scenario: dict[str, Any], output: pathlib.Path) -> list[float]:
    """The losses of a second run that goes on from the first one's checkpoint-2."""
    trainer = make_trainer(scenario, output / "resumed")
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    trainer.save_model(str(output / "final_resumed"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry and entry["step"] > 2]


def attempt(scenario: dict[str, Any], output: pathlib.Path) -> dict[str, Any]:
    """As `train`; a refusal is an entry of its own."""
    try:
        return train(scenario, output)
    except ValueError as error:
        if not scenario.get("refused"):
            raise
        return {"refused": str(error)}


def main() -> None:
    output, scenarios = pathlib.Path(sys.argv[1]), json.loads(pathlib.Path(sys.argv[2]).read_text())
    shard_on_cpu()
    seen = {name: attempt(scenario, output / name) for name, scenario in scenarios.items()}
    rank = dist.get_rank() if dist.is_initialized() else 0
    (output / f"{rank}.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        # Leaving without this aborts at random.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
