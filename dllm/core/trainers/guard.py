"""A guard on the training loss: a run whose loss is not finite stops before the weights move, and keeps the batch."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dllm.data.collators import Batch
from dllm.utils.distributed import rank
from dllm.utils.parsing import InputError

BATCH_FILE, REPORT_FILE = "batch.safetensors", "report.json"


class NonFiniteLoss(InputError):
    """The training loss is nan or infinite; the line says where the batch is and what to do."""


class NonFiniteGuard(transformers.TrainerCallback):
    """Stops a run on all ranks alike, in the optimizer step whose loss is not finite on one of them.

    The trainer calls `add` after each micro-batch; nothing is read from the device there. Before the optimizer moves,
    the ranks add up how many of their losses are not finite (one number each) and read the sum. If there are any, each
    rank with such a loss saves its first such batch under OUTPUT_DIR/nonfinite-STEP-rankR, and all of them raise. So
    neither the weights nor a checkpoint have anything of that step. (DeepSpeed steps inside backward: there the weights
    in memory have moved, and no checkpoint is written any more.)

    Gradients that overflow under float16 while the loss is finite are the gradient scaler's business.

    Args:
        output_dir: where to save.
        device: of the losses.
        sum_over_ranks: an int64 scalar on the device -> its sum over all ranks; all of them call it at once.
    """

    def __init__(
        self, output_dir: str, device: torch.device, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.output_dir = pathlib.Path(output_dir)
        self.device, self.sum_over_ranks = device, sum_over_ranks
        self._seen: list[tuple[torch.Tensor, Batch]] = []  # (loss, batch) of each micro-batch of this optimizer step

    def add(self, loss: torch.Tensor, batch: Batch) -> None:
        """Notes the loss (a scalar, on the device) of a micro-batch after its backward."""
        self._seen.append((loss.detach(), batch))

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Forgets what a run that broke off has left."""
        self._seen.clear()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Raises where a loss of this step is not finite on any rank.

        Raises:
            NonFiniteLoss: on all ranks.
        """
        seen, self._seen = self._seen, []
        losses = torch.stack([loss.to(self.device) for loss, _ in seen])  # [micro-batches]
        bad = ~losses.isfinite()
        num_bad = int(self.sum_over_ranks(bad.sum()))
        if num_bad == 0:
            return
        step = state.global_step + 1
        saved = "its batch is saved by the rank that had it"
        if bad.any():
            index = int(bad.nonzero()[0])
            folder = self.output_dir / f"nonfinite-{step}-rank{rank()}"
            report = {
                "step": step,
                "epoch": state.epoch,
                "rank": rank(),
                "micro_batch": index,
                "losses": [repr(loss) for loss in losses.tolist()],  # JSON has no nan
                "nonfinite_weights": _nonfinite_weights(model),
            }
            saved = _save(folder, seen[index][1], report)
        raise NonFiniteLoss(
            f"the training loss is not finite in step {step} ({num_bad} batch(es) over all ranks); {saved}; nothing of "
            "this step is in a checkpoint: lower --learning_rate or use --bf16 True instead of --fp16 True and go on "
            "with --resume_from_checkpoint True, or look at the batch"
        )


def _nonfinite_weights(model: Any) -> list[str] | None:
    """Names of the weights that are not finite in what this process holds of them; None, for unknown, under ZeRO-3."""
    if is_deepspeed_zero3_enabled():  # each weight is an empty tensor there, and its part is padded with anything
        return None
    from torch.distributed.tensor import DTensor  # takes long to import and is wanted once at most

    def own(weight: torch.Tensor) -> torch.Tensor:
        # Of sharded weights the own part: not every rank comes here, and whoever asks for the rest would wait.
        return weight.to_local() if isinstance(weight, DTensor) else weight

    return [name for name, weight in model.named_parameters() if not bool(own(weight.detach()).isfinite().all())]


def _save(folder: pathlib.Path, batch: Batch, report: dict[str, Any]) -> str:
    """Writes the batch and the report; says where, or why not: a full disk must not hide the loss."""
    values = flatten_batch(batch)
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    rows = {name: batch[name].tolist() for name in ("example_id", "t", "num_maskable") if name in batch}
    rows["num_masked"] = batch["is_masked"].sum(dim=1).tolist()
    others = {name: repr(value) for name, value in values.items() if name not in tensors}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT_FILE).write_text(json.dumps({**report, **rows, "others": others}, indent=2) + "\n")
        save_file(
            {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()},
            os.fspath(folder / BATCH_FILE),
        )
    except OSError as error:
        return f"its batch could not be saved under {folder} ({error})"
    return f"its batch is in {folder}"


def flatten_batch(batch: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists by dotted name: {"edit.t": ..., "memory_plan.steps.0.t": ...}."""
    if isinstance(batch, dict):
        entries = batch.items()
    elif isinstance(batch, (list, tuple)):
        entries = enumerate(batch)
    else:
        return {prefix: batch}
    found: dict[str, Any] = {}
    for name, value in entries:
        found.update(flatten_batch(value, f"{prefix}.{name}" if prefix else str(name)))
    return found
