"""The sizes of a model that memory and communication depend on, read off the model itself on the meta device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from dllm.models.backbone import unwrap
from dllm.models.checkpoint import one_line
from dllm.models.layers import RMSNorm
from dllm.models.lora import lora_targets
from dllm.models.moe import GroupRouter, RoutedExperts
from dllm.models.spec import load_config, spec_of
from dllm.utils.args import resolve_with_base_env
from dllm.utils.parsing import InputError

IN_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LinearShape:
    """A linear of a layer.

    inputs, outputs: its widths.
    role: see `dllm.models.spec.ROLES`.
    is_routed: whether it belongs to an expert that sees only the tokens sent to it.
    copies: how many such linears a layer has (the number of experts, else 1).
    has_lora: whether LoRA is put on it.
    """

    inputs: int
    outputs: int
    role: str
    is_routed: bool
    copies: int
    has_lora: bool

    @property
    def weights(self) -> int:
        """Numbers in all copies."""
        return self.copies * self.inputs * self.outputs


@dataclass(frozen=True)
class LayerShape:
    """A layer: x += attention(norm x), x += feed-forward(norm x), the latter gated, routed or both.

    query, key: widths n_h * d and n_kv * d.
    heads: n_h.
    has_qk_norm, has_fused_qkv: how queries and keys are made.
    num_experts, top_k: E and k; 0: no routed experts.
    routes_in_float32: whether the router casts its input to float32.
    linears: each shape once.
    num_parameters: of the layer.
    """

    query: int
    key: int
    heads: int
    has_qk_norm: bool
    has_fused_qkv: bool
    num_experts: int
    top_k: int
    routes_in_float32: bool
    linears: tuple[LinearShape, ...]
    num_parameters: int


@dataclass(frozen=True)
class ModelShape:
    """A model.

    name: its family.
    hidden, vocabulary: D and V.
    layers: from the lowest up.
    num_parameters: of the whole model.
    num_outside: of what is not in a layer: embedding, final norm, head.
    """

    name: str
    hidden: int
    vocabulary: int
    layers: tuple[LayerShape, ...]
    num_parameters: int
    num_outside: int

    @property
    def num_linear(self) -> int:
        """Weights of the linears of the layers: what 4-bit quantises."""
        return sum(linear.weights for layer in self.layers for linear in layer.linears)

    def num_low_rank(self, rank: int) -> int:
        """Numbers in LoRA matrices of this rank: the sum of rank * (inputs + outputs) over the linears with LoRA."""
        adapted = [linear for layer in self.layers for linear in layer.linears if linear.has_lora]
        return sum(linear.copies * rank * (linear.inputs + linear.outputs) for linear in adapted)

    def num_fast(self, rank: int, fraction: float, roles: tuple[str, ...]) -> int:
        """Numbers in fast weights of this rank on the linears with `roles` in the last layers: those from
        int(layers * (1 - fraction)) on."""
        adapted = [linear for layer in self.layers[self.first_fast(fraction) :] for linear in layer.linears]
        return sum(x.copies * rank * (x.inputs + x.outputs) for x in adapted if x.role in roles)

    def first_fast(self, fraction: float) -> int:
        """Index of the first layer with fast weights."""
        return max(0, int(len(self.layers) * (1 - fraction)))


def read_shape(model_name_or_path: str, target_modules: str | None = None) -> ModelShape:
    """The sizes of the model that a config.json describes; no weights are read or made.

    Args:
        model_name_or_path: folder, config.json or Hub name.
        target_modules: linears with LoRA, as in `LoraSettings`; None: no LoRA.

    Raises:
        InputError: no such folder, no config.json, an unknown family, or one whose layers are not of the kind above;
            unknown targets.
    """
    path = resolve_with_base_env(model_name_or_path, "BASE_MODELS_DIR")
    # A Hub name has one slash at most, and not in front.
    if not os.path.exists(path) and (path.startswith((".", "~", os.sep)) or path.count("/") > 1):
        raise InputError(f"there is no folder {path}: give one with a config.json, the file itself, or a Hub name")
    try:
        config, spec = load_config(path)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"config.json of {path}: {one_line(error)}") from error
    assert spec is not None  # without trust_remote_code an unknown family is an error
    with torch.device("meta"):
        model = spec.model_class(config)
    return shape_of(model, target_modules)


def shape_of(model: PreTrainedModel, target_modules: str | None = None) -> ModelShape:
    """The sizes of a model of this library, without adapters on it; see `read_shape`."""
    lm, spec = unwrap(model), spec_of(model)
    if not {"gate_proj", "up_proj", "down_proj"} <= set(spec.linear_roles):
        raise InputError(f"{spec.name} has no gated feed-forward part: its memory is not estimated")
    targets = () if target_modules is None else tuple(lora_targets(model, target_modules))
    roles = {leaf: role for role, leaf in spec.linear_roles.items()}
    layers = tuple(_layer(layer, lm.config, roles, targets) for layer in lm.backbone.layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = lm.backbone.embedding
    return ModelShape(
        name=spec.name,
        hidden=embedding.embedding_dim,
        vocabulary=embedding.num_embeddings,
        layers=layers,
        num_parameters=total,
        num_outside=total - sum(layer.num_parameters for layer in layers),
    )


def _layer(layer: nn.Module, config: Any, roles: dict[str, str], targets: tuple[str, ...]) -> LayerShape:
    routed = [part for part in layer.modules() if isinstance(part, RoutedExperts)]
    found: dict[tuple[int, int, str, bool, bool], int] = {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            leaf = name.rpartition(".")[2]
            has_lora = any(f".{name}".endswith(f".{target}") for target in targets)
            key = (module.in_features, module.out_features, roles[leaf], ".experts." in f".{name}", has_lora)
            found[key] = found.get(key, 0) + 1
    linears = tuple(
        LinearShape(inputs, outputs, role, is_routed, copies, has_lora)
        for (inputs, outputs, role, is_routed, has_lora), copies in found.items()
    )
    widths = {linear.role: linear for linear in linears if linear.role in IN_ATTENTION}
    query, fused = widths["o_proj"].inputs, "qkv_proj" in widths
    key = (widths["qkv_proj"].outputs - query) // 2 if fused else widths["k_proj"].outputs
    block: Any = routed[0] if routed else None
    return LayerShape(
        query=query,
        key=key,
        heads=config.num_attention_heads,
        # Two norms stand before attention and feed-forward; two more are those of queries and keys.
        has_qk_norm=sum(isinstance(part, RMSNorm) for part in layer.modules()) > 2,
        has_fused_qkv=fused,
        num_experts=0 if block is None else len(block.experts),
        top_k=0 if block is None else block.top_k,
        routes_in_float32=block is not None and isinstance(block.gate, GroupRouter),
        linears=linears,
        num_parameters=sum(parameter.numel() for parameter in layer.parameters()),
    )
