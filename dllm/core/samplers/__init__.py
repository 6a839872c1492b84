"""Samplers: from masks to tokens."""

from dllm.core.reveal import add_gumbel_noise, get_num_transfer_tokens
from dllm.core.samplers.base import BaseSampler, BaseSamplerConfig, BaseSamplerOutput, Visit
from dllm.core.samplers.block import BlockSampler
from dllm.core.samplers.block_config import BLOCK_PRESETS, BlockSamplerConfig
from dllm.core.samplers.mdlm import MDLM_PRESETS, MDLMSampler, MDLMSamplerConfig

__all__ = [
    "BLOCK_PRESETS",
    "MDLM_PRESETS",
    "BaseSampler",
    "BaseSamplerConfig",
    "BaseSamplerOutput",
    "BlockSampler",
    "BlockSamplerConfig",
    "MDLMSampler",
    "MDLMSamplerConfig",
    "Visit",
    "add_gumbel_noise",
    "get_num_transfer_tokens",
]
