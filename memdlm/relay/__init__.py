"""Relay: the last hidden state of one denoising forward is fed into the next (arXiv 2605.22967)."""

from memdlm.relay.buffer import RolloutBuffer
from memdlm.relay.channel import RelayChannel, RelayState
from memdlm.relay.config import ARMS, PRESETS, RelayConfig
from memdlm.relay.loading import load_model
from memdlm.relay.rollout import RevealRule, Unrolled, unroll
from memdlm.relay.trainer import RelayBD3LMConfig, RelayBD3LMTrainer, RelayTrainer, RelayTrainerConfig

__all__ = [
    "ARMS",
    "PRESETS",
    "RelayBD3LMConfig",
    "RelayBD3LMTrainer",
    "RelayChannel",
    "RelayConfig",
    "RelayState",
    "RelayTrainer",
    "RelayTrainerConfig",
    "RevealRule",
    "RolloutBuffer",
    "Unrolled",
    "load_model",
    "unroll",
]
