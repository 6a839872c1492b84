"""Approximate KV caches for bidirectional models, in the manner of Fast-dLLM (arXiv 2505.22618, section 3.2).

In a bidirectional model every position sees every other, so a committed token changes the keys and values everywhere.
Within a block these caches pretend that it does not: keys and values outside a window are taken from the last full
forward, which is the first step of every block. `prefix`: the window is the block and all after it; `dual`: the block
alone. The tokens can therefore differ from those of `none`; only a block of one step is exact.
Shapes: B rows, n key heads, L positions, W positions of the window, d head width.
"""

from __future__ import annotations

from typing import Literal

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

CacheKind = Literal["none", "prefix", "dual"]


class WindowLayer(DynamicLayer):
    """Keys and values [B, n, L, d] of one layer: stored by the first forward, replaced inside the window by later
    ones."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__()
        self.start, self.end = start, end

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All L keys and values, given those of all positions [B, n, L, d] (first call) or of the window [B, n, W,
        d]."""
        if self.keys is None or self.values is None:
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
        else:
            self.keys[:, :, self.start : self.end] = key_states
            self.values[:, :, self.start : self.end] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Keys that a forward finds beside its own: 0 before the first, then L - W."""
        return 0 if self.keys is None else self.keys.shape[2] - (self.end - self.start)


class WindowCache(Cache):
    """What a model takes as `past_key_values`: one WindowLayer per layer, all with the window [start, end).

    Args:
        num_layers: layers of the model.
        start, end: the window, columns of the sequence.
    """

    def __init__(self, num_layers: int, start: int, end: int) -> None:
        super().__init__(layers=[WindowLayer(start, end) for _ in range(num_layers)])
