"""Relay: the last hidden state of one denoising forward is fed into the next (arXiv 2605.22967)."""

from memdlm.relay.buffer import RolloutBuffer
from memdlm.relay.channel import RelayChannel, RelayState
from memdlm.relay.config import ARMS, PRESETS, RelayConfig
from memdlm.relay.likelihood import RelayScorer
from memdlm.relay.loading import load_model
from memdlm.relay.memory import MemRelayBD3LMConfig, MemRelayBD3LMTrainer, MemRelayConfig, MemRelayTrainer
from memdlm.relay.rollout import RevealRule, Unrolled, unroll
from memdlm.relay.sampler import RelayBlockSampler, RelayMDLMSampler, RelaySampler, make_sampler
from memdlm.relay.trainer import RelayBD3LMConfig, RelayBD3LMTrainer, RelayTrainer, RelayTrainerConfig

__all__ = [
    "ARMS",
    "PRESETS",
    "MemRelayBD3LMConfig",
    "MemRelayBD3LMTrainer",
    "MemRelayConfig",
    "MemRelayTrainer",
    "RelayBD3LMConfig",
    "RelayBD3LMTrainer",
    "RelayBlockSampler",
    "RelayChannel",
    "RelayConfig",
    "RelayMDLMSampler",
    "RelaySampler",
    "RelayScorer",
    "RelayState",
    "RelayTrainer",
    "RelayTrainerConfig",
    "RevealRule",
    "RolloutBuffer",
    "Unrolled",
    "load_model",
    "make_sampler",
    "unroll",
]
