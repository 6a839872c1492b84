"""4-bit weights: what is asked of bitsandbytes, and what must be set right afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import validate_bnb_backend_availability
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils.import_utils import is_bitsandbytes_available

from dllm.models.checkpoint import one_line
from dllm.models.spec import ModelSpec, spec_of
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError

logger = get_default_logger(__name__)


def nf4_config(compute_dtype: torch.dtype, spec: ModelSpec) -> BitsAndBytesConfig:
    """NF4 with double quantisation for every linear but the head.

    Raises:
        InputError: bitsandbytes is not installed, or supports no device of this machine; DeepSpeed ZeRO-3 is asked for.
    """
    if is_deepspeed_zero3_enabled():
        raise InputError("ZeRO-3 cannot shard 4-bit weights: use DDP, FSDP2 or ZeRO-2, or drop load_in_4bit")
    if not is_bitsandbytes_available():
        raise InputError(
            "4-bit needs bitsandbytes, which is not installed: pip install 'memdlm[quant]', or drop load_in_4bit"
        )
    try:
        validate_bnb_backend_availability(raise_exception=True)
    except RuntimeError as error:
        raise InputError(f"4-bit is not possible on this machine: {one_line(error)}") from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        # The full dotted name: transformers matches endings, and a bare ff_out would spare that linear in every block.
        llm_int8_skip_modules=[spec.head],
    )


def quantised_share(model: nn.Module) -> tuple[int, float]:
    """(number of 4-bit linears, their share of all weights in [0, 1]); LoRA matrices count among all weights."""
    linears = _linears_4bit(model)
    inside = sum(module.in_features * module.out_features for module in linears)
    packed = sum(module.weight.numel() for module in linears)
    total = sum(parameter.numel() for parameter in model.parameters()) - packed + inside
    return len(linears), inside / total


def _linears_4bit(model: nn.Module) -> list[Any]:
    if not is_bitsandbytes_available():
        return []
    from bitsandbytes.nn.modules import Linear4bit  # an extra: importing this module must work without it

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def _warn_of_widths(linears: list[Any]) -> None:
    """Says where bitsandbytes computes with other weights than it stored: on CPUs it unpacks row by row, also where the
    blocks that share a scale go on from one row to the next (0.50.2)."""
    wrong = [
        module
        for module in linears
        if module.weight.device.type == "cpu" and module.in_features % module.weight.blocksize != 0
    ]
    if wrong:
        logger.warning(
            f"4-bit on the CPU: bitsandbytes gives {len(wrong)} linears scales of wrong rows (input widths that are no "
            f"multiple of {wrong[0].weight.blocksize}): the quantised model is coarser than it would be on a GPU"
        )


def finish_4bit(model: PreTrainedModel) -> None:
    """Makes a model that was just loaded in 4-bit safe to train, and logs how much of it is 4-bit.

    Raises:
        InputError: a linear of the layers was left as it was.
    """
    linears = _linears_4bit(model)
    for module in linears:
        # Otherwise an evaluation on a CPU with avx512_bf16 repacks the weights for a kernel without gradients, and
        # training goes on with wrong ones.
        module.support_avx512bf16_for_cpu = False
    count, share = quantised_share(model)
    layers = model.get_submodule(spec_of(model).layers)
    if count == 0 or any(type(module) is nn.Linear for module in layers.modules()):
        raise InputError("not every linear of the layers became 4-bit: bitsandbytes cannot quantise this model")
    _warn_of_widths(linears)
    logger.info(f"4-bit NF4: {count} linears, {share:.1%} of the weights")
