"""Trains the scenarios that tests/distributed/test_streaming_ddp.py names, all in one process (start-up takes longest).

Started as one of two processes it writes what it saw to RANK.json; the test starts it alone for the run in one process.
"""

import json
import pathlib
import sys
from typing import Any

import torch.distributed as dist

from dllm.data.collators import PaddingCollator
from dllm.data.prepare import PretrainingArguments, load_pretraining_rows
from dllm.models.auto import load_model, load_tokenizer
from memdlm import MemDLMConfig, MemDLMTrainer


def train(checkpoint: str, output: pathlib.Path, data: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What one process saw of a training run, and of the run that goes on from its first checkpoint."""
    tokenizer = load_tokenizer(checkpoint)

    def run(resume: pathlib.Path | None) -> dict[str, Any]:
        trainer = MemDLMTrainer(
            model=load_model(checkpoint, dtype="float32"),
            args=MemDLMConfig(output_dir=str(output), use_cpu=True, disable_tqdm=True, **settings),
            processing_class=tokenizer,
            data_collator=PaddingCollator(tokenizer.pad_token_id, train_on_padding=False, hide_padding=True),
            train_dataset=load_pretraining_rows(PretrainingArguments(**data), tokenizer, checkpoint, 0)["train"],
        )
        seen: list[list[int]] = []
        step = trainer.training_step

        def watch(model, inputs, *rest):
            seen.append(inputs["example_id"].tolist())
            return step(model, inputs, *rest)

        trainer.training_step = watch
        trainer.train(resume_from_checkpoint=resume)
        return {
            "world_size": trainer.accelerator.num_processes,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "ids": seen,
        }

    return {"whole": run(None), "resumed": run(output / f"checkpoint-{settings['save_steps']}")}


def main() -> None:
    checkpoint, output, scenarios = sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
    seen = {name: train(checkpoint, output / name, **scenario) for name, scenario in scenarios.items()}
    rank = dist.get_rank() if dist.is_initialized() else 0
    (output / f"{rank}.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        # Leaving without this aborts at random.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
