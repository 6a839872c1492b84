"""Meters: negative log-likelihood and perplexity over all ranks, seconds per step, tokens, peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torchmetrics import Metric


class MeanMetric(Metric):
    """Weighted mean over all updates and ranks: sum of value * weight / sum of weights; not finite values stay visible.

    (torchmetrics' own MeanMetric drops nan with a warning, and looks for it by waiting for the device in each update.)
    """

    total: torch.Tensor
    weight: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, value: torch.Tensor, weight: torch.Tensor) -> None:
        """Adds values with their weights, both of any one shape."""
        self.total += (value.double() * weight.double()).sum()
        self.weight += weight.double().sum()

    def compute(self) -> torch.Tensor:
        """The mean, a float64 scalar; nan without updates."""
        return self.total / self.weight


class NLLMetric(MeanMetric):
    """Negative log-likelihood per token in nats: update with per-token means and token counts."""


class PPLMetric(MeanMetric):
    """Perplexity: exp of what `NLLMetric` gives for the same updates."""

    def compute(self) -> torch.Tensor:
        """exp of the mean, a float64 scalar."""
        return torch.exp(super().compute())


class OnEvaluateMetricsCallback(transformers.TrainerCallback):
    """Adds metrics that were updated during an evaluation pass to its result and to the log, then empties them.

    The trainer's prediction_step calls `update` with values of all ranks; sums stay on the device and are read once
    per pass.

    Args:
        trainer: the trainer whose `log` is used.
        metrics: name -> metric; `eval_<name>` in the result.
    """

    def __init__(self, trainer: transformers.Trainer, metrics: dict[str, MeanMetric]) -> None:
        self.trainer = trainer
        self.metrics = metrics

    def update(self, name: str, value: torch.Tensor, weight: torch.Tensor) -> None:
        """Adds values with their weights to metric `name`."""
        self.metrics[name].to(value.device).update(value, weight)

    def reset(self) -> None:
        """Empties all metrics."""
        for metric in self.metrics.values():
            metric.reset()

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        """Adds the values to `metrics` and logs them."""
        prefix = next(key for key in metrics if key.endswith("_loss")).removesuffix("_loss")
        values = {f"{prefix}_{name}": float(metric.compute()) for name, metric in self.metrics.items()}
        self.reset()
        metrics.update(values)
        self.trainer.log(values)

    on_predict = on_evaluate


class StepClock(transformers.TrainerCallback):
    """Wall seconds of the optimizer steps since the last reading, from on_step_begin to on_step_end.

    Data loading, evaluation, logging and saving are outside. On a GPU the queue is not flushed: single steps blur,
    means are right.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Notes the seconds of this step."""
        self._seconds.append(time.perf_counter() - self._began)

    def read(self) -> tuple[float, int]:
        """(seconds, number of steps) since the last call."""
        seconds, self._seconds = self._seconds, []
        return sum(seconds), len(seconds)


class BatchCounts:
    """What went through training: kept on the device until `read`, so that no step waits for it.

    Args:
        device: where the sums are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums = torch.zeros(2, dtype=torch.int64, device=device)

    def add(self, batch: dict[str, Any]) -> None:
        """Adds a collated batch: `num_tokens` and `num_maskable`, int64 [B]."""
        counts = torch.stack([batch["num_tokens"].sum(), (batch["num_maskable"].sum() == 0).long()])
        self._sums += counts.to(self.device)

    def read(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, int]:
        """Over all ranks: {"num_tokens", "empty_batches", "peak_memory_bytes"}.

        num_tokens: tokens before padding, prompts included, since the last call; a row counts once however often a step
            looks at it.
        empty_batches: batches with nothing maskable so far.
        peak_memory_bytes: `peak_memory_mib` of the rank that has used most.

        Args:
            gather: int64 [1, 3] of this rank -> [ranks, 3].
        """
        peak = torch.tensor([int(peak_memory_mib(self.device) * 2**20)], device=self.device)
        ranks = gather(torch.cat([self._sums, peak])[None])
        self._sums[0] = 0
        tokens, empty, _ = ranks.sum(dim=0).tolist()
        return {"num_tokens": tokens, "empty_batches": empty, "peak_memory_bytes": int(ranks[:, 2].max())}


class DeviceTimer:
    """Seconds spent inside `with timer:` blocks, on the device: CUDA events there, wall time elsewhere.

    Nothing waits for the device until `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._began: list[Any] = []  # of the blocks that are open
        self._pairs: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._began.append(self._now())

    def __exit__(self, *exception: object) -> None:
        self._pairs.append((self._began.pop(), self._now()))

    def read(self) -> float:
        """Seconds in blocks left since the last call."""
        pairs, self._pairs = self._pairs, []
        if not self._on_cuda:
            return sum(end - start for start, end in pairs)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1000


def peak_memory_mib(device: torch.device) -> float:
    """Most memory this process has used so far, in MiB: allocated on a CUDA device, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
