"""What runs a training: DDP, FSDP or DeepSpeed, compiled or not; and what a trainer cannot do under each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import transformers
from accelerate.utils import DynamoBackend, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dllm.core.trainers.checkpointing import CheckpointingTrainer
from dllm.models.moe import RoutedExperts
from dllm.utils.parsing import InputError


def shards_weights(trainer: CheckpointingTrainer) -> bool:
    """Whether each rank holds a part of the weights only and gathers a layer when it is called: FSDP and ZeRO-3."""
    return trainer.engine in ("fsdp", "fsdp2", "zero3")


def will_shard(args: transformers.TrainingArguments) -> bool:
    """Whether a trainer with these arguments will share out the weights over the ranks: as `shards_weights`, asked
    before there is a trainer. The model is best loaded on the CPU then: whole, it may not fit on one device."""
    return bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP") or is_deepspeed_zero3_enabled()


@contextlib.contextmanager
def gathered(*weights: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The whole of weights that an engine may have sharded, to be read inside the block; all ranks must take part."""
    if is_deepspeed_zero3_enabled():
        import deepspeed  # an extra: importing this module must work without it

        with deepspeed.zero.GatheredParameters(list(weights)):
            yield weights
    else:
        yield tuple(weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights)


@contextlib.contextmanager
def inner_backward(model: nn.Module) -> Iterator[None]:
    """A block in which backward passes are parts of a forward of `model` that still runs; FSDP2 must know.

    By itself it frees what it gathered when a backward pass ends, though the forward and graphs that are still to be
    gone through need it, and forgets in which order it is to gather for the step's own backward.
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


def call_all_experts(trainer: CheckpointingTrainer, model: nn.Module) -> None:
    """Makes every rank call every routed expert under ZeRO-3, also those without a token; nothing under other engines.

    ZeRO-3 gathers the weights of an expert when it is called, and waits forever where two ranks call different ones.
    """
    if trainer.engine == "zero3":
        for module in model.modules():
            if isinstance(module, RoutedExperts):
                module.calls_all = True


def refuse_fsdp1(trainer: CheckpointingTrainer, what: str) -> None:
    """Nothing, unless the trainer runs under the first version of FSDP.

    Raises:
        InputError: it does; `what` needs hooks and parameters that it flattens away.
    """
    if trainer.engine == "fsdp":
        raise InputError(
            f"{what} and FSDP1 cannot be combined: use FSDP2 (scripts/accelerate_configs/fsdp2.yaml, fsdp_version: 2)"
        )


def refuse_torch_compile(trainer: CheckpointingTrainer, what: str) -> None:
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
