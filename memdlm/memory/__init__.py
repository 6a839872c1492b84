"""Parametric Memory: fast weights written by an inner loop (MemDLM, arXiv 2603.22241)."""

from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import InnerReport
from memdlm.memory.parametric import ParametricMemory
from memdlm.memory.plan import InnerPlan, InnerStep, plan_prompts

__all__ = [
    "FastWeights",
    "InnerPlan",
    "InnerReport",
    "InnerStep",
    "MemoryConfig",
    "ParametricMemory",
    "plan_prompts",
]
