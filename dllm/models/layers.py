"""Building blocks that the families share: norm, rotary positions, SwiGLU, attention.

Shapes: B rows, L positions, P cached positions, S = P + L, D hidden, n_h heads, n_kv key heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class RMSNorm(nn.Module):
    """w * cast(x / sqrt(mean(x^2) + eps)): statistics in float32 or wider, cast to the dtype of x, then the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RotaryEmbedding(nn.Module):
    """cos and sin of pos * theta^(-2i / dim), i = 0 .. dim/2 - 1, twice along the last axis: two tensors [B, L, dim].

    The frequencies are computed in every forward and kept in no buffer: so `model.to(bfloat16)` cannot round them, and
    nothing is left uninitialised by loading on the meta device.

    Args:
        dim: number of rotated dimensions of a head, even.
        theta: base of the frequencies.
        full_precision: return float32 whatever the dtype of the hidden state.
    """

    def __init__(self, dim: int, theta: float, full_precision: bool = False) -> None:
        super().__init__()
        self.dim, self.theta, self.full_precision = dim, theta, full_precision

    @torch.no_grad()
    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        exponents = torch.arange(0, self.dim, 2, device=hidden.device, dtype=wide) / self.dim
        angles = position_ids[..., None].to(wide) / self.theta**exponents  # [B, L, dim / 2]
        angles = torch.cat((angles, angles), dim=-1)  # [B, L, dim]
        dtype = wide if self.full_precision else hidden.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, theta={self.theta}"


def plain_rope_theta(given: dict[str, Any]) -> float | None:
    """The base of the frequencies that `rope_parameters` among the keys of a configuration name, None if there are
    none. Takes `rope_parameters` and `rope_scaling` out of `given`.

    Raises:
        ValueError: frequencies that are scaled.
    """
    if given.pop("rope_scaling", None):
        raise ValueError("rope_scaling is not supported: remove it from the configuration")
    parameters = given.pop("rope_parameters", None) or {}
    if parameters.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters of type {parameters['rope_type']!r} are not supported: only 'default' is")
    return parameters.get("rope_theta")


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x * cos + cat(-x2, x1) * sin on the first d_r dimensions of `x` [B, n, L, d], x1 and x2 being their halves.

    cos, sin: [B, L, d_r] with d_r <= d; the other dimensions pass through. The result has the dtype of `x`.
    """
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    turned = (turned * cos[:, None] + swapped * sin[:, None]).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def pick(x: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    """x [B, L, D] at the flat positions `wanted` [R, n] into [B * L]: [R, n, D]; `x` itself for None."""
    if wanted is None:
        return x
    return x.flatten(0, 1).index_select(0, wanted.flatten()).view(*wanted.shape, -1)


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj x) * up_proj x): [..., D] -> [..., D], without biases."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T * scaling + mask) v in plain products: ([B, L, n_h, d], weights [B, n_h, L, S]).

    query [B, n_h, L, d]; key, value [B, n_kv, S, d]; attention_mask additive, broadcast to [B, n_h, L, S], or None.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = F.dropout(scores.softmax(-1, dtype=wide).to(value.dtype), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class AttentionMixin:
    """What transformers' attention functions read from the module they are given, and the call itself.

    A class that uses it calls `set_attention` in its constructor.
    """

    is_causal = False
    config: PreTrainedConfig
    layer_idx: int
    head_dim: int
    scaling: float
    num_key_value_groups: int
    attention_dropout: float
    training: bool

    def set_attention(
        self, config: PreTrainedConfig, layer_idx: int, head_dim: int, groups: int, dropout: float
    ) -> None:
        """Sets the fields above; `groups` query heads share one key head."""
        self.config, self.layer_idx, self.head_dim = config, layer_idx, head_dim
        self.scaling = head_dim**-0.5
        self.num_key_value_groups = groups
        self.attention_dropout = dropout

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, n * d] -> [B, n, L, d]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | BlockMask | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """Rotates, appends to the cache and attends: [B, L, n_h * d].

        query: [B, n_h, L, d]; key, value: [B, n_kv, L, d].
        """
        query, key = (apply_rotary(x, *position_embeddings) for x in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation or "eager"
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        output, _ = function(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            is_causal=False,
        )
        return output.flatten(2)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Gives every dropout of `model` (attention, residual, embedding) this probability; its configuration stays."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        if isinstance(module, AttentionMixin):
            module.attention_dropout = probability
