"""memdlm: memory between the denoising steps of a masked-diffusion language model."""

from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric import ParametricMemory
from memdlm.trainer import MemBD3LMConfig, MemBD3LMTrainer, MemDLMConfig, MemDLMTrainer

__all__ = ["MemBD3LMConfig", "MemBD3LMTrainer", "MemDLMConfig", "MemDLMTrainer", "MemoryConfig", "ParametricMemory"]
