"""KV caches of the samplers.

RowCache is exact: a block-causal model's keys and values of finished blocks never change. WindowCache is approximate,
in the manner of Fast-dLLM (arXiv 2505.22618, section 3.2): in a bidirectional model every position sees every other, so
a committed token changes the keys and values everywhere. Within a block it pretends that it does not: keys and values
outside a window are taken from the last full forward, which is the first step of every block. `prefix`: the window is
the block and all after it; `dual`: the block alone. The tokens can therefore differ from those of `none`; only a block
of one step is exact.
Shapes: B rows, n key heads, L columns, W columns of the window, d head width.
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


class RowLayer(DynamicLayer):
    """Keys and values [B, heads, L, d] of one layer; a forward replaces those of its window and reads columns [0,
    end)."""

    def __init__(self, owner: RowCache) -> None:
        super().__init__()
        self.owner = owner

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `end` keys and values, given those of the window [B, heads, W, d]."""
        if self.keys is None or self.values is None:
            shape = (*key_states.shape[:2], self.owner.length, key_states.shape[3])
            self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
            self.is_initialized = True
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            stored.scatter_(2, self.owner.columns[:, None, :, None].expand_as(new), new)
        return self.keys[:, :, : self.owner.end], self.values[:, :, : self.owner.end]

    def get_seq_length(self) -> int:
        """Keys that the present forward finds beside its own."""
        return self.owner.end - self.owner.columns.shape[1]


class RowCache(Cache):
    """What a model takes as `past_key_values`: a buffer of L columns per layer, written at each row's own columns.

    Args:
        num_layers: layers of the model.
        length: L.
    """

    def __init__(self, num_layers: int, length: int) -> None:
        self.length, self.end = length, 0
        self.columns = torch.zeros(1, 0, dtype=torch.int64)
        super().__init__(layers=[RowLayer(self) for _ in range(num_layers)])

    def window(self, columns: torch.Tensor, end: int) -> RowCache:
        """Says where the next forward writes, int64 [B, W], and how many columns it reads."""
        self.columns, self.end = columns, end
        return self
