"""Parametric Memory: fast weights written by an inner loop (MemDLM, arXiv 2603.22241)."""

from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import InnerReport, InnerStep
from memdlm.memory.parametric import ParametricMemory

__all__ = ["FastWeights", "InnerReport", "InnerStep", "MemoryConfig", "ParametricMemory"]
