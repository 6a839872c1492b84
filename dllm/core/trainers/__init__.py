"""Trainers of the base framework."""

from dllm.core.trainers.bd3lm import BD3LMConfig, BD3LMTrainer
from dllm.core.trainers.ema import EmaCallback, TimeBudget
from dllm.core.trainers.mdlm import MDLMConfig, MDLMTrainer
from dllm.core.trainers.meters import NLLMetric, OnEvaluateMetricsCallback, PPLMetric

__all__ = [
    "BD3LMConfig",
    "BD3LMTrainer",
    "EmaCallback",
    "MDLMConfig",
    "MDLMTrainer",
    "NLLMetric",
    "OnEvaluateMetricsCallback",
    "PPLMetric",
    "TimeBudget",
]
