"""What the inner loop needs of a model: nothing compiled, no reentrant checkpointing."""

from __future__ import annotations

from typing import Any

from accelerate.utils import has_compiled_regions
from torch import nn

from dllm.models.backbone import Backbone
from dllm.utils.parsing import InputError


def refuse_compiled(model: nn.Module) -> None:
    """Nothing, if no part of the model is compiled.

    Raises:
        InputError: one is.
    """
    if has_compiled_regions(model) or any(part._compiled_call_impl is not None for part in model.modules()):
        raise InputError("memory and torch.compile cannot be combined (compiled code ignores hooks): do not compile")


def refuse_reentrant(backbone: Backbone) -> None:
    """Nothing, if the layers checkpoint no activations, or in the non-reentrant way.

    Raises:
        InputError: the reentrant way, under which the inner loop can take no gradients.
    """
    for layer in backbone.layers:
        function: Any = layer._gradient_checkpointing_func if layer.gradient_checkpointing else None
        if function is not None and function.keywords.get("use_reentrant", True):
            raise InputError(
                "memory needs non-reentrant activation checkpointing: enable it with "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
