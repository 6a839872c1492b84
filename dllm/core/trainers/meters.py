"""Meters: negative log-likelihood and perplexity over all ranks, seconds per step, peak memory."""

from __future__ import annotations

import resource
import sys
import time

import torch
import transformers
from torchmetrics.aggregation import MeanMetric


class NLLMetric(MeanMetric):
    """Negative log-likelihood per token in nats, over all ranks: sum of `update(value, weight)` value * weight / sum of
    weights."""


class PPLMetric(MeanMetric):
    """Perplexity over all ranks: exp of what `NLLMetric` gives for the same updates."""

    def compute(self) -> torch.Tensor:
        return torch.exp(super().compute())


class OnEvaluateMetricsCallback(transformers.TrainerCallback):
    """Adds metrics that were updated during an evaluation pass to its result and to the log, then empties them.

    The trainer's prediction_step calls `update`; sums stay on the device and are read once per pass, gathered over
    ranks.

    Args:
        trainer: the trainer whose `log` is used.
        metrics: name -> metric; `eval_<name>` in the result.
    """

    def __init__(self, trainer: transformers.Trainer, metrics: dict[str, MeanMetric]) -> None:
        self.trainer = trainer
        self.metrics = metrics

    def update(self, name: str, value: torch.Tensor, weight: torch.Tensor | float) -> None:
        """Adds the mean `value` of `weight` items to metric `name`."""
        self.metrics[name].to(value.device).update(value, weight)

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        prefix = next(key for key in metrics if key.endswith("_loss")).removesuffix("_loss")
        values = {f"{prefix}_{name}": float(metric.compute()) for name, metric in self.metrics.items()}
        for metric in self.metrics.values():
            metric.reset()
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
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._seconds.append(time.perf_counter() - self._began)

    def read(self) -> float | None:
        """Mean seconds per step since the last call; None if there was no step."""
        seconds, self._seconds = self._seconds, []
        return sum(seconds) / len(seconds) if seconds else None


def peak_memory_mib(device: torch.device) -> float:
    """Most memory this process has used so far, in MiB: allocated on a CUDA device, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
