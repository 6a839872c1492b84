"""What runs a training: DDP, FSDP or DeepSpeed, compiled or not; and what a trainer cannot do under each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import transformers
from accelerate.utils import DynamoBackend
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dllm.models.moe import RoutedExperts
from dllm.utils.parsing import InputError


def shards_weights(trainer: transformers.Trainer) -> bool:
    """Whether each rank holds a part of the weights only and gathers a layer when it is called: FSDP and ZeRO-3."""
    return trainer.is_fsdp_enabled or _is_zero3(trainer)


def _is_zero3(trainer: transformers.Trainer) -> bool:
    plugin = trainer.accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


@contextlib.contextmanager
def inner_backward(model: nn.Module) -> Iterator[None]:
    """A block in which backward passes are parts of a forward of `model` that still runs; FSDP2 must know.

    It would take the first of them for the end of the step and free what it gathered, under the feet of the forward and
    of the graphs that are still to be gone through.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_is_last_backward(False)
    model.set_reshard_after_backward(False)
    try:
        yield
    finally:
        model.set_reshard_after_backward(True)
        model.set_is_last_backward(True)


def call_all_experts(trainer: transformers.Trainer, model: nn.Module) -> None:
    """Makes every rank call every routed expert under ZeRO-3, also those without a token; nothing under other engines.

    ZeRO-3 gathers the weights of an expert when it is called, and waits forever where two ranks call different ones.
    """
    if _is_zero3(trainer):
        for module in model.modules():
            if isinstance(module, RoutedExperts):
                module.calls_all = True


def refuse_fsdp1(trainer: transformers.Trainer, what: str) -> None:
    """Nothing, unless the trainer runs under the first version of FSDP.

    Raises:
        InputError: it does; `what` needs hooks and parameters that it flattens away.
    """
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
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
