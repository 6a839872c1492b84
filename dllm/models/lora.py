"""LoRA matrices on a model: new ones, or those of a PEFT adapter on disk."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from dllm.models.backbone import unwrap
from dllm.models.checkpoint import find_file, some_of
from dllm.models.relay_norm import RELAY_FILE, RELAY_NORM, load_relay_keys, relay_keys
from dllm.models.spec import spec_of
from dllm.utils.parsing import InputError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoraSettings:
    """What LoRA to add.

    r: rank, at least 1.
    alpha: scale numerator, above 0; the product is scaled by alpha / r.
    dropout: on the input of A, in [0, 1).
    target_modules: all-linear (every linear of the layers; never head or router), or comma-separated names of linears.
    bias: which biases are trained as well: none, all or lora_only (those of the targets).
    """

    r: int = 32
    alpha: float = 64
    dropout: float = 0.05
    target_modules: str = ALL_LINEAR
    bias: str = "none"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InputError(f"LoRA rank r is {self.r} but must be at least 1")
        if self.alpha <= 0:
            raise InputError(f"LoRA alpha is {self.alpha} but must be above 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"LoRA dropout is {self.dropout} but must be in [0, 1)")
        if self.bias not in BIASES:
            raise InputError(f"LoRA bias {self.bias!r} is unknown; allowed: {', '.join(BIASES)}")


def add_lora(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """`model` with new LoRA matrices (A random, B zero: the same outputs as before), everything else frozen.

    Args:
        model: an unwrapped model of this library, 4-bit or not.
        settings: see LoraSettings.
        seed: of the random A; the global random state is left as it was.

    Raises:
        InputError: a target that is no linear of the layers; the allowed ones are listed.
    """
    targets = lora_targets(model, settings.target_modules)
    head = spec_of(model).head
    config = LoraConfig(
        task_type=None,
        r=settings.r,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType] (a number; PEFT only multiplies with it)
        lora_dropout=settings.dropout,
        target_modules=targets,
        # The head of dense LLaDA has the leaf name of a linear in every block.
        exclude_modules=[head] if head.rpartition(".")[2] in targets else None,
        bias=settings.bias,  # pyright: ignore[reportArgumentType] (checked in LoraSettings)
        # Small, new and at the bottom of everything: it is trained and saved whole.
        modules_to_save=[RELAY_NORM] if has_relay_norm(model) else None,
    )
    with _seeded(seed):
        return _with_adapter(_prepared(model, is_trainable=True), config)


def load_adapter(model: PreTrainedModel, adapter_name_or_path: str, is_trainable: bool) -> PeftModel:
    """`model` with the adapter in a folder or Hub repository.

    PeftModel.from_pretrained is not used: it only warns where weights are missing, and it puts dispatch hooks on a
    model whose 4-bit weights are on the CPU.

    Args:
        model: the unwrapped base.
        adapter_name_or_path: folder or Hub name with adapter_config.json and adapter_model.safetensors.
        is_trainable: go on training it; False freezes it and the model is in eval mode.

    Raises:
        InputError: a file is missing or damaged, the adapter is no kind that sits in the layers, or it was made for
            another base (unknown module names, other shapes, missing or superfluous tensors).
    """
    config = read_adapter_config(adapter_name_or_path)
    weights = find_file(adapter_name_or_path, ADAPTER_WEIGHTS)
    if weights is None:
        raise InputError(f"{adapter_name_or_path} has no {ADAPTER_WEIGHTS}: fetch or copy it again")
    _add_relay_norm(model, adapter_name_or_path, config)
    config.inference_mode = not is_trainable
    config.base_model_name_or_path = model.name_or_path  # where the base is now; PEFT warns of a difference
    misfit = f"the adapter {adapter_name_or_path} does not fit {model.name_or_path or type(model).__name__}"
    fix = "give the base that it was trained on"
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{weights} is cut short or damaged ({error}): fetch or copy it again") from error
    try:
        with _seeded(0):  # what is drawn is overwritten; the global random state stays as it was
            wrapped = _with_adapter(_prepared(model, is_trainable), config)
    except ValueError as error:
        raise InputError(f"{misfit}: {str(error).partition('. ')[0]}; {fix}") from error
    try:
        result = set_peft_model_state_dict(wrapped, tensors)
    except RuntimeError as error:
        raise InputError(f"{misfit} ({_last_line(error)}); {fix}") from error
    missing = sorted(name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name)
    if missing or result.unexpected_keys:
        wrong = [f"lacks {some_of(missing)}"] if missing else []
        wrong += [f"has {some_of(sorted(result.unexpected_keys))} too much"] if result.unexpected_keys else []
        raise InputError(f"{misfit}: it {' and '.join(wrong)}; {fix}")
    return wrapped if is_trainable else wrapped.eval()


def has_relay_norm(model: PreTrainedModel) -> bool:
    """Whether the backbone of `model` has the norm of a relay."""
    return unwrap(model).backbone.relay_layer_norm is not None


def _add_relay_norm(model: PreTrainedModel, adapter: str, config: PeftConfig) -> None:
    """Gives the base the relay norm that the adapter brings, if it brings one.

    Raises:
        InputError: the adapter has one and no file that says how it is used, or the base uses its own in another way.
    """
    if RELAY_NORM not in (config.to_dict().get("modules_to_save") or []):
        return
    path = find_file(adapter, RELAY_FILE)
    if path is None:
        raise InputError(
            f"the adapter {adapter} brings {RELAY_NORM} and no {RELAY_FILE}: fetch or copy it again, or write it with "
            "dllm.models.relay_norm.save_relay_keys"
        )
    keys, own = load_relay_keys(path), relay_keys(model.config)
    if own is None:
        unwrap(model).backbone.add_relay_norm(keys)
    elif own != replace(keys, gate=own.gate):
        raise InputError(
            f"{path} and config.json of {model.name_or_path} describe different relays: give the right base"
        )


def read_adapter_config(adapter_name_or_path: str) -> PeftConfig:
    """The adapter's configuration.

    Raises:
        InputError: there is none, it cannot be read, or it is of a kind outside the layers (prompt tuning, ...).
    """
    path = find_file(adapter_name_or_path, ADAPTER_CONFIG)
    if path is None:
        raise InputError(f"{adapter_name_or_path} has no {ADAPTER_CONFIG}: give the folder of a PEFT adapter")
    try:
        config = PeftConfig.from_pretrained(str(path.parent))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} cannot be read ({_last_line(error)}): fetch or copy it again") from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise InputError(f"{adapter_name_or_path} is a {config.peft_type} adapter: only kinds like LoRA can be loaded")
    return config


def lora_targets(model: PreTrainedModel, wanted: str) -> list[str]:
    """Leaf names for PEFT: what was asked for, each of them checked to be a linear of the layers.

    Args:
        model: an unwrapped model of this library.
        wanted: as `LoraSettings.target_modules`.

    Raises:
        InputError: no linear of the layers has such a name; the allowed ones are listed.
    """
    layers = model.get_submodule(spec_of(model).layers)
    linears = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    leaves = sorted({name.rpartition(".")[2] for name in linears})
    if wanted == ALL_LINEAR:
        return leaves
    targets = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in targets if not any(f".{linear}".endswith(f".{name}") for linear in linears)]
    if unknown or not targets:
        raise InputError(
            f"target_modules {', '.join(unknown) or repr(wanted)}: no linear of the layers has that name; allowed: "
            f"{ALL_LINEAR}, {', '.join(leaves)}"
        )
    return targets


def _prepared(model: PreTrainedModel, is_trainable: bool) -> PreTrainedModel:
    """A 4-bit model made ready for training as PEFT does it: frozen, and what is not quantised in float32.

    Activation checkpointing stays the trainer's knob (PEFT would switch on the reentrant form, under which
    autograd.grad fails).
    """
    if is_trainable and model.__dict__.get("is_loaded_in_4bit"):
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def _with_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)  # PeftMixedModel only on request
    return wrapped


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws inside come from `seed`; afterwards every generator is where it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2].strip()


def is_adapter(model_name_or_path: str) -> bool:
    """Whether a folder or Hub repository holds an adapter and no model of its own."""
    if pathlib.Path(model_name_or_path).is_file():
        return False
    return find_file(model_name_or_path, "config.json") is None and (
        find_file(model_name_or_path, ADAPTER_CONFIG) is not None
    )
