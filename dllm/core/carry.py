"""What a forward hands on to the next one: a slot in the backbone for something added to the embeddings and something
read off the layers.

Shapes: B rows, L positions, D hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from dllm.models.backbone import Backbone


class Carry(Protocol):
    """What a backbone calls in every forward while it is in place (see `carrying`)."""

    def add(self, input_ids: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """The token embeddings [B, L, D] of `input_ids` [B, L] to go on with."""
        ...

    def take(self, index: int, hidden: torch.Tensor) -> None:
        """Shows the output [B, L, D] of layer `index`; index num_layers is the state after the final norm."""
        ...


@contextlib.contextmanager
def carrying(backbone: Backbone, carry: Carry) -> Iterator[None]:
    """Within the block every forward of `backbone` calls `carry.add` once and `carry.take` after each layer.

    A forward with `stop_at` calls `add` alone; `run_layers` calls neither: what is replayed shows nothing.

    Args:
        backbone: the unwrapped backbone (`dllm.models.backbone.unwrap(model).backbone`).
        carry: what to call.

    Raises:
        RuntimeError: something is carried already.
    """
    if backbone.carry is not None:
        raise RuntimeError("the model carries a state already: leave the first carrying(...) block before a second")
    backbone.carry = carry
    try:
        yield
    finally:
        backbone.carry = None
