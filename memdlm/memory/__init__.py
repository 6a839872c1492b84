"""Parametric Memory: fast weights written by an inner loop (MemDLM, arXiv 2603.22241)."""

from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import InnerReport
from memdlm.memory.parametric import ParametricMemory
from memdlm.memory.plan import InnerPlan, InnerStep, plan_prompts
from memdlm.memory.prompts import WrittenMemory
from memdlm.memory.store import MemoryHeader, MemoryStore, read_header

__all__ = [
    "FastWeights",
    "InnerPlan",
    "InnerReport",
    "InnerStep",
    "MemoryConfig",
    "MemoryHeader",
    "MemoryStore",
    "ParametricMemory",
    "WrittenMemory",
    "plan_prompts",
    "read_header",
]
