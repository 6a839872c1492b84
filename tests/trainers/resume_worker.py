"""Trains the scenarios of tests/trainers/test_resume.py, each in a process of its own that is killed in the middle.

All start in one process, which imports once and forks.
"""

import json
import os
import pathlib
import signal
import sys
from typing import Any

import torch

from dllm.models.auto import get_model, load_tokenizer
from dllm.utils.args import ModelArguments
from memdlm import MemDLMConfig, MemDLMTrainer


def make_rows() -> list[dict]:
    """Twelve rows of 20 tokens, 12 of them to predict."""
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(20, 200, (20,), generator=generator).tolist() for _ in range(12)]
    return [{"input_ids": row, "labels": [-100] * 8 + row[8:]} for row in ids]


def build(checkpoint: str, output: str, lora: bool, settings: dict[str, Any]) -> MemDLMTrainer:
    """The trainer of a scenario; dropout is on where there are adapters, so that random numbers count."""
    model_args = ModelArguments(checkpoint, dtype="float32", lora=lora)
    return MemDLMTrainer(
        model=get_model(model_args, seed=1),
        args=MemDLMConfig(output_dir=output, use_cpu=True, disable_tqdm=True, **settings),
        processing_class=load_tokenizer(checkpoint),
        train_dataset=make_rows(),
        eval_dataset=make_rows()[:4],
    )


def die_at(trainer: MemDLMTrainer, batch: int, saving: int | None) -> None:
    """kill -9 after the backward of a batch (counted from 1), or while the checkpoint of a step is half written."""
    step, write, seen = trainer.training_step, trainer._save_rng_state, [0]

    def counted(*args, **kwargs):
        loss = step(*args, **kwargs)
        seen[0] += 1
        if saving is None and seen[0] == batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    def half(output_dir: str) -> None:
        if trainer.state.global_step == saving:
            os.kill(os.getpid(), signal.SIGKILL)
        write(output_dir)

    trainer.training_step, trainer._save_rng_state = counted, half


def main() -> None:
    codes = {}
    for name, scenario in json.loads(pathlib.Path(sys.argv[1]).read_text()).items():
        child = os.fork()
        if child == 0:
            trainer = build(scenario["checkpoint"], scenario["output"], scenario["lora"], scenario["settings"])
            die_at(trainer, scenario["batch"], scenario["saving"])
            trainer.train()
            os._exit(0)
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    pathlib.Path(sys.argv[2]).write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
