"""One process of tests/distributed/test_resume_ddp.py: runs the named part and writes what it saw to RANK.json."""

import json
import os
import pathlib
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist

from dllm.models.auto import load_model, load_tokenizer
from memdlm import MemDLMConfig, MemDLMTrainer


def make_rows() -> list[dict]:
    """Sixteen rows of 20 tokens, 12 of them to predict."""
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(20, 200, (20,), generator=generator).tolist() for _ in range(16)]
    return [{"input_ids": row, "labels": [-100] * 8 + row[8:]} for row in ids]


def build(checkpoint: str, output: str, settings: dict[str, Any]) -> MemDLMTrainer:
    return MemDLMTrainer(
        model=load_model(checkpoint, dtype="float32"),
        args=MemDLMConfig(output_dir=output, use_cpu=True, disable_tqdm=True, **settings),
        processing_class=load_tokenizer(checkpoint),
        train_dataset=make_rows(),
    )


def disturb(trainer: MemDLMTrainer, how: str, batches: list[int]) -> None:
    """On rank r, in the step of its batch batches[r] (counted from 1, 0: never): a signal, kill -9 or an error."""
    step, seen, mine = trainer.training_step, [0], batches[trainer.args.process_index]

    def disturbed(*args, **kwargs):
        seen[0] += 1
        if seen[0] == mine and how == "error":
            raise ValueError("this rank fails")
        if seen[0] == mine:
            os.kill(os.getpid(), getattr(signal, how))
        return step(*args, **kwargs)

    trainer.training_step = disturbed


def run(scenario: dict[str, Any]) -> dict[str, Any]:
    trainer = build(scenario["checkpoint"], scenario["output"], scenario["settings"])
    if "how" in scenario:
        disturb(trainer, scenario["how"], scenario["batches"])
    trainer.train(resume_from_checkpoint=scenario.get("resume"))
    names = ("loss", "grad_norm", "learning_rate")
    return {
        "world_size": trainer.accelerator.num_processes,
        "logged": [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry],
        "weights": {name: value.double().sum().item() for name, value in trainer.lm.state_dict().items()},
    }


def main() -> None:
    output, scenarios = pathlib.Path(sys.argv[1]), json.loads(pathlib.Path(sys.argv[2]).read_text())
    rank = int(os.environ.get("RANK", 0))
    seen = {}
    for name, scenario in scenarios.items():
        seen[name] = run(scenario)
        (output / f"{rank}.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
