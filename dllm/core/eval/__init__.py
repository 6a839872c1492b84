"""Evaluation with lm-eval: model arguments, the harness, likelihoods."""

from dllm.core.eval.config import BaseEvalConfig, MDLMEvalConfig

__all__ = ["BaseEvalConfig", "MDLMEvalConfig"]
