"""memdlm: memory between the denoising steps of a masked-diffusion language model."""

from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric import ParametricMemory
from memdlm.trainer import MemDLMConfig, MemDLMTrainer

__all__ = ["MemDLMConfig", "MemDLMTrainer", "MemoryConfig", "ParametricMemory"]
