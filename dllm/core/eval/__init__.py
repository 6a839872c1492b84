"""Evaluation with lm-eval: model arguments, the harness, likelihoods."""

from dllm.core.eval.block import BlockEvalConfig, BlockEvalHarness
from dllm.core.eval.config import BaseEvalConfig, MDLMEvalConfig
from dllm.core.eval.harness import BaseEvalHarness
from dllm.core.eval.mdlm import MDLMEvalHarness
from dllm.core.eval.progress import Interrupted

__all__ = [
    "BaseEvalConfig",
    "BaseEvalHarness",
    "BlockEvalConfig",
    "BlockEvalHarness",
    "Interrupted",
    "MDLMEvalConfig",
    "MDLMEvalHarness",
]
