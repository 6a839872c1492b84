"""A written memory as a LoRA adapter of PEFT: low-rank fast weights on dense linears are nothing else.

Shapes: R rank.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from typing import TYPE_CHECKING

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from dllm.models.checkpoint import one_line
from dllm.models.lora import ADAPTER_WEIGHTS
from dllm.utils.parsing import InputError
from memdlm.memory.fast_weights import LowRank

if TYPE_CHECKING:
    from memdlm.memory.parametric import ParametricMemory


def export_adapter(memory: ParametricMemory, folder: str | os.PathLike[str]) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, the one memory in place being the adapter's weights.

    `PeftModel.from_pretrained(base, folder)` then computes what the base model computes with that memory:
    W x + (alpha / R) B A x. Modules are targeted by their full names, since a head may share the leaf name of a linear
    in the layers.

    Args:
        memory: attached, with one memory in place.
        folder: new or empty; it appears only when complete.

    Raises:
        InputError: no memory or several in place; the folder is taken; fast weights that are no LoRA of plain linears
            (dense ones, routed experts); a base under an adapter or quantised, of which plain PEFT would not make the
            same model.
    """
    value = memory.fast.value
    if value is None or len(value) != 1:
        raise InputError(
            f"an adapter holds one memory, {0 if value is None else len(value)} are in place: place([memory]) first, "
            "inside attached()"
        )
    adapter = _check(memory)
    target = pathlib.Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} holds something already: give a new folder")
    names = {id(module): name for name, module in memory.lm.named_modules()}
    modules = {name: names[id(module)] for name, module in memory.fast.targets.items()}  # as the model names them
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=memory.config.inner_alpha,  # pyright: ignore[reportArgumentType] (a number; PEFT only divides it)
        target_modules=list(modules.values()),
        base_model_name_or_path=memory.lm.name_or_path,
        inference_mode=True,
    )
    tensors = {}
    for name, matrix in memory.fast.named(value[0].detach().cpu()).items():
        linear, _, which = name.rpartition(".")
        tensors[f"base_model.model.{modules[linear]}.lora_{which}.weight"] = matrix  # A [R, in], B [out, R]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            config.save_pretrained(str(partial))
            save_file(tensors, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            (partial / ADAPTER_WEIGHTS).chmod(0o644)  # safetensors' files and mkdtemp's folders are private
            partial.chmod(0o755)
            partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target} cannot be written: {one_line(error)}") from error


def _check(memory: ParametricMemory) -> LowRank:
    """The adapter's form, if plain PEFT can hold it."""
    adapter = memory.fast.adapter
    if not isinstance(adapter, LowRank):
        raise InputError(
            "dense fast weights (mem_inner_adapter_type=full) are no LoRA adapter: write with mem_inner_adapter_type "
            "lora, or save() the memory"
        )
    routed = {id(part) for block in memory.fast.routed for part in block.modules()}
    if any(id(module) in routed for module in memory.fast.targets.values()):
        raise InputError(
            "fast weights on routed experts are not exported as a LoRA adapter (dense models only): save() the memory, "
            "or write with mem_inner_target_modules q_proj,k_proj,v_proj,o_proj"
        )
    if any(isinstance(part, BaseTunerLayer) for part in memory.lm.modules()):
        raise InputError(
            "the model has a PEFT adapter already, which the exported one would not contain: merge it into the "
            "weights first, or save() the memory"
        )
    if any(isinstance(part, nn.Linear) and type(part) is not nn.Linear for part in memory.backbone.layers.modules()):
        raise InputError(
            "the base is quantised, and on the plain weights an adapter gives other logits: write the memory on the "
            "model without load_in_4bit, or save() it"
        )
    return adapter
