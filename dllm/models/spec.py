"""ModelSpec: what the framework must know about a family, as data; and the table of families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from dllm.models.relay_norm import relay_keys, with_present_names

DEFAULT_BLOCK_SIZE = 32  # for families that name none

ROLES = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelSpec:
    """A family of models.

    name: short name, as in `--family`.
    model_types: values of `model_type` in config.json that mean this family, the configuration class's own first.
    architectures: values of `architectures` that mean it; they are looked at first, since model types are shared.
    config_class, backbone_class, model_class: the classes (the last with head).
    mask_token, end_of_turn_token, pad_token, bos_token, eos_token: for tokenizers that do not name them.
    special_tokens: every special token of the family, for a tokenizer made from scratch.
    chat_template: used when the checkpoint brings none.
    logit_shift: 0, or 1 where the logit at position p - 1 predicts token p.
    attention: which positions see each other; `block_size` is set for block_causal.
    block_size_field: field of the configuration in which a checkpoint names its own block size.
    layers, final_norm, head, embedding: dotted names, seen from the model with head.
    linear_roles: role (see ROLES) -> leaf module name of the linears that play it.
    fast_weight_targets: roles that fast weights attach to by default.
    exact_block_cache: whether cached keys and values of finished blocks are what a full forward would compute.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config_class: type[PreTrainedConfig]
    backbone_class: type[PreTrainedModel]
    model_class: type[PreTrainedModel]
    mask_token: str
    end_of_turn_token: str
    pad_token: str
    bos_token: str
    eos_token: str
    special_tokens: tuple[str, ...]
    chat_template: str
    layers: str
    final_norm: str
    head: str
    embedding: str
    linear_roles: Mapping[str, str] = field(hash=False)
    logit_shift: int = 0
    attention: Literal["bidirectional", "block_causal"] = "bidirectional"
    block_size: int | None = None
    block_size_field: str | None = None
    fast_weight_targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    exact_block_cache: bool = False

    def __post_init__(self) -> None:
        if self.logit_shift not in (0, 1):
            raise ValueError(f"logit_shift must be 0 or 1, got {self.logit_shift}")
        if (self.attention == "block_causal") != (self.block_size is not None):
            raise ValueError("block_size is given with attention='block_causal', and only then")
        unknown = [role for role in (*self.linear_roles, *self.fast_weight_targets) if role not in ROLES]
        if unknown:
            raise ValueError(f"unknown linear roles {', '.join(unknown)}: choose from {', '.join(ROLES)}")


_SPECS: dict[str, ModelSpec] = {}


def register_spec(spec: ModelSpec) -> None:
    """Adds a family to the table and its classes to transformers' Auto tables; the same name again replaces it.

    Raises:
        ValueError: another family claims one of the architectures.
    """
    for other in _SPECS.values():
        shared = set(other.architectures) & set(spec.architectures)
        if shared and other.name != spec.name:
            raise ValueError(f"architecture {min(shared)} belongs to the family {other.name!r}: register another name")
    _SPECS[spec.name] = spec
    # exist_ok: a module imported twice (reload, two import paths) must not fail, and where a later transformers brings
    # a class for the same model_type ours goes on serving, since only ours has the split point.
    AutoConfig.register(spec.model_types[0], spec.config_class, exist_ok=True)
    AutoModel.register(spec.config_class, spec.backbone_class, exist_ok=True)
    AutoModelForCausalLM.register(spec.config_class, spec.model_class, exist_ok=True)
    AutoModelForMaskedLM.register(spec.config_class, spec.model_class, exist_ok=True)


def registered_specs() -> tuple[ModelSpec, ...]:
    """All known families."""
    return tuple(_SPECS.values())


def get_spec(name: str) -> ModelSpec:
    """The family called `name`.

    Raises:
        ValueError: unknown; the known ones are listed.
    """
    if name not in _SPECS:
        raise ValueError(f"unknown model family {name!r}: choose from {', '.join(_SPECS)}")
    return _SPECS[name]


def find_spec(config: PreTrainedConfig | Mapping[str, Any]) -> ModelSpec:
    """The family of a configuration (object, or contents of a config.json): by `architectures`, then by `model_type`.

    Raises:
        ValueError: no family fits; the known ones are listed.
    """
    raw = config.to_dict() if isinstance(config, PreTrainedConfig) else config
    architectures = raw.get("architectures") or []
    for spec in _SPECS.values():
        if any(name in spec.architectures for name in architectures):
            return spec
    model_type = raw.get("model_type")
    for spec in _SPECS.values():
        if model_type in spec.model_types:
            return spec
    known = "; ".join(
        f"{spec.name} (architectures {', '.join(spec.architectures)}; model_type {', '.join(spec.model_types)})"
        for spec in _SPECS.values()
    )
    raise ValueError(
        f"no model family fits architectures={list(architectures)}, model_type={model_type!r}; known: {known}"
    )


def spec_of(model: PreTrainedModel) -> ModelSpec:
    """The family of an unwrapped model.

    Raises:
        ValueError: it belongs to none.
    """
    # From the model's own class upwards: a family may build on the classes of another.
    for cls in type(model).__mro__:
        for spec in _SPECS.values():
            if cls in (spec.model_class, spec.backbone_class):
                return spec
    raise ValueError(f"{type(model).__name__} belongs to no known family: choose from {', '.join(_SPECS)}")


def block_size_of(model: PreTrainedModel, asked: int | None = None) -> int:
    """Positions of a block: `asked`, else what the configuration of `model` names, else its family's, else 32.

    Args:
        model: an unwrapped model of a known family.
        asked: what the user wants, at least 1; None: no wish.

    Raises:
        ValueError: the model belongs to no known family.
    """
    if asked is not None:
        return asked
    spec = spec_of(model)
    own = None if spec.block_size_field is None else getattr(model.config, spec.block_size_field)
    return own or spec.block_size or DEFAULT_BLOCK_SIZE


def load_config(
    model_name_or_path: str | Path, trust_remote_code: bool = False, **hub_options: Any
) -> tuple[PreTrainedConfig, ModelSpec | None]:
    """(configuration, family) of a checkpoint, read from its config.json as published: nobody edits a file.

    The file is read raw and the family's own class is built from it, because published checkpoints of different
    families share a model_type. With `trust_remote_code` an unknown family gives (the configuration transformers
    makes, None).

    Args:
        model_name_or_path: folder, config.json or Hub name.
        trust_remote_code: allow families that are not in the table.
        hub_options: revision, cache_dir, token, local_files_only, subfolder, ... of transformers.

    Raises:
        OSError: there is no config.json.
        ValueError: no family fits and trust_remote_code is off; or the configuration is not supported.
    """
    raw, _ = PreTrainedConfig.get_config_dict(model_name_or_path, **hub_options)
    raw = with_present_names(raw)
    relay_keys(raw)  # checks them
    try:
        spec = find_spec(raw)
    except ValueError:
        if not trust_remote_code:
            raise
        return AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=True, **hub_options), None
    raw = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")}
    config = spec.config_class.from_dict(raw)
    config.name_or_path = str(model_name_or_path)
    return config, spec
