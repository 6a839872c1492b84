"""The split point: run the network up to layer i once, and from layer i on as often as wanted.

Shapes: B rows, L positions, D hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dllm.models.backbone import Backbone

LayerInputs = dict[str, Any]
SplitCallback = Callable[[torch.Tensor, LayerInputs], torch.Tensor]


@dataclass(frozen=True)
class SplitState:
    """What `Backbone.run_layers` needs in order to go on from a layer.

    hidden: input of the layer, [B, L, D].
    layer_inputs: mask and position embeddings of the layers, without cache and recorder.
    """

    hidden: torch.Tensor
    layer_inputs: LayerInputs


@contextlib.contextmanager
def at_layer(backbone: Backbone, layer: int, callback: SplitCallback) -> Iterator[None]:
    """Within the block a forward of `backbone` calls `hidden = callback(hidden, layer_inputs)` once, before `layer`.

    The call happens in the layer loop, outside any checkpointed layer, and the forward goes on with what it returns. A
    forward that the callback itself starts does not call it again; neither do `run_layers` and a forward stopped at or
    below `layer`.

    Args:
        backbone: the unwrapped backbone (`dllm.models.backbone.unwrap(model).backbone`).
        layer: index of a layer, 0 (right after the embedding) to num_layers - 1.
        callback: gets the hidden state [B, L, D] before the layer and the layer inputs without cache and recorder, and
            returns the hidden state [B, L, D] to go on with.

    Raises:
        ValueError: no such layer.
        RuntimeError: a callback is already set: there is one split point at a time.
    """
    num_layers = len(backbone.layers)
    if not 0 <= layer < num_layers:
        raise ValueError(f"no layer {layer} to split at: choose 0 to {num_layers - 1}")
    if backbone.split_callback is not None:
        raise RuntimeError("a split callback is already set: leave the first at_layer(...) block before a second")
    backbone.split_layer, backbone.split_callback = layer, callback
    try:
        yield
    finally:
        backbone.split_layer, backbone.split_callback = -1, None
