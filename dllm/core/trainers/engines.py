"""What runs a training: DDP, FSDP or DeepSpeed, compiled or not; and what a trainer cannot do under each."""

from __future__ import annotations

import transformers
from accelerate.utils import DynamoBackend
from torch import nn

from dllm.models.moe import RoutedExperts
from dllm.utils.parsing import InputError


def shards_weights(trainer: transformers.Trainer) -> bool:
    """Whether each rank holds a part of the weights only and gathers a layer when it is called: FSDP and ZeRO-3."""
    return trainer.is_fsdp_enabled or _is_zero3(trainer)


def _is_zero3(trainer: transformers.Trainer) -> bool:
    plugin = trainer.accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def gather_experts_whole(trainer: transformers.Trainer, model: nn.Module) -> None:
    """Makes ZeRO-3 gather the weights of a block of routed experts at once; nothing under other engines.

    By itself it gathers expert by expert as they are called, and waits forever where two ranks call different ones.
    """
    kinds = {type(module) for module in model.modules() if isinstance(module, RoutedExperts)}
    if kinds and _is_zero3(trainer):
        from deepspeed.utils import set_z3_leaf_modules  # an extra: importing this module must work without it

        set_z3_leaf_modules(model, list(kinds))


def refuse_fsdp1(trainer: transformers.Trainer, what: str) -> None:
    """Nothing, unless the trainer runs under the first version of FSDP.

    Raises:
        InputError: it does; `what` needs hooks and parameters that it flattens away.
    """
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin is not None and plugin.fsdp_version == 1:
        raise InputError(
            f"{what} and FSDP1 cannot be combined: use FSDP2 (scripts/accelerate_configs/fsdp2.yaml, fsdp_version: 2)"
        )


def refuse_torch_compile(trainer: transformers.Trainer, what: str) -> None:
    """Nothing, if the trainer does not compile its model.

    Raises:
        InputError: it does, and `what` works through calls that compiled code may leave out.
    """
    plugin = trainer.accelerator.state.dynamo_plugin
    if trainer.args.torch_compile or (plugin is not None and plugin.backend != DynamoBackend.NO):
        raise InputError(
            f"{what} and torch.compile cannot be combined (compiled code ignores hooks): drop --torch_compile, and "
            "dynamo_backend from the launcher's settings"
        )
