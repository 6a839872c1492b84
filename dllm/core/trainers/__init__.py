"""Trainers of the base framework."""

from dllm.core.trainers.mdlm import MDLMConfig, MDLMTrainer
from dllm.core.trainers.meters import NLLMetric, OnEvaluateMetricsCallback, PPLMetric

__all__ = ["MDLMConfig", "MDLMTrainer", "NLLMetric", "OnEvaluateMetricsCallback", "PPLMetric"]
