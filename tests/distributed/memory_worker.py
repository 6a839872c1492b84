"""Trains the scenarios that tests/distributed/test_memory_ddp.py names, all in one process (start-up takes longest).

Started as one of two processes it writes what it saw to RANK.pt; the test calls `train` itself for the run in one
process.
"""

import contextlib
import pathlib
import sys
from typing import Any

import torch
import torch.distributed as dist

from dllm.models.auto import load_model, load_tokenizer
from memdlm import MemDLMConfig, MemDLMTrainer
from memdlm.memory import inner_loop
from memdlm.memory.objectives import Objective, cross_entropy

LENGTH = 20


def make_rows(kind: str) -> list[dict]:
    """Eight rows; two processes with batches of two see rows 0-1 and 2-3 in the first step, 4-5 and 6-7 in the second.

    kind: "plain"; "same_masks": one example id for all, hence as many masks in every row; "no_prompt", "no_labels":
    rows 2 and 3, those of the second rank's first step, are nothing but answer or nothing but prompt.
    """
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(8):
        ids = torch.randint(20, 200, (LENGTH,), generator=generator).tolist()
        prompt = 8
        if index in (2, 3):
            prompt = {"no_prompt": 0, "no_labels": LENGTH}.get(kind, prompt)
        example_id = 11 if kind == "same_masks" else index
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "example_id": example_id})
    return rows


@contextlib.contextmanager
def counting_all_reduces(sizes: list[list[int]]):
    """`sizes` gets the shape of every tensor that Python code reduces (DDP's own buckets do not pass here)."""
    original = dist.all_reduce

    def note(tensor, *args, **kwargs):
        sizes.append(list(tensor.shape))
        return original(tensor, *args, **kwargs)

    dist.all_reduce = note
    try:
        yield
    finally:
        dist.all_reduce = original


@contextlib.contextmanager
def not_finite_on(rank: int | None):
    """Every inner cross-entropy of the process with this rank is not a number."""
    original = inner_loop.OBJECTIVES["ce"]
    if rank is not None and dist.is_initialized() and dist.get_rank() == rank:
        inner_loop.OBJECTIVES["ce"] = Objective(lambda *inputs: cross_entropy(*inputs) * torch.nan, uses_teacher=False)
    try:
        yield
    finally:
        inner_loop.OBJECTIVES["ce"] = original


def train(checkpoint: str, output: str, rows: str, settings: dict[str, Any], bad_rank: int | None = None) -> dict:
    """What one process saw of a training run."""
    args = MemDLMConfig(output_dir=output, use_cpu=True, disable_tqdm=True, save_strategy="no", **settings)
    trainer = MemDLMTrainer(
        model=load_model(checkpoint, dtype="float32"),
        args=args,
        processing_class=load_tokenizer(checkpoint),
        train_dataset=make_rows(rows),
    )
    assert trainer.memory is not None
    memory = trainer.memory
    written, initial, reports, times, observed, reduced = [], [], [], [], [], []
    put, start, step = memory.fast.set, memory.initial, trainer.training_step

    def remember_written(flat) -> None:
        if flat is not None and not flat.requires_grad:
            written.append(flat.clone())
        put(flat)

    def remember_initial(*inputs):
        initial.append(start(*inputs))
        return initial[-1]

    def remember_step(model, inputs, *rest):
        times.append(inputs["t"].tolist())
        loss = step(model, inputs, *rest)
        reports.append(memory.report)
        observed.append({name: float(losses[-1]) for name, losses in trainer._observed.items()})
        return loss

    memory.fast.set, memory.initial = remember_written, remember_initial
    trainer.training_step = remember_step
    with counting_all_reduces(reduced), not_finite_on(bad_rank):
        trainer.train()
    return {
        "world_size": args.world_size,
        "written": written,
        "initial": initial,
        "losses": [report.losses for report in reports],
        "changes": [report.change for report in reports],
        "empty": [report.empty_rows for report in reports],
        "bad": [report.bad_rows for report in reports],
        "times": times,
        "observed": observed,
        "reduced": reduced,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "weights": {name: value.clone() for name, value in trainer.lm.state_dict().items()},
        "numel": memory.fast.numel,
    }


def main() -> None:
    output, scenarios = pathlib.Path(sys.argv[1]), torch.load(sys.argv[2])
    seen = {name: train(output=str(output), **scenario) for name, scenario in scenarios.items()}
    torch.save(seen, output / f"{dist.get_rank()}.pt")
    # Leaving without this aborts at random.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
