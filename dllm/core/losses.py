"""The loss: token NLL on gathered positions, its weights and its normaliser. The only place that weighs and normalises.

Shapes: B rows, L positions, N loss positions of the whole batch (flat indices into [B * L]), V vocabulary.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F

from dllm.core.schedulers import BaseAlphaScheduler

WeightType = Literal["scheduler", "uniform"]
NormType = Literal["token", "sequence", "batch"]


# Logits that one chunk of positions may hold. What is computed element by element on a CPU should stay in its cache; on
# an accelerator a chunk should be small beside the model.
CPU_CHUNK_LOGITS, DEVICE_CHUNK_LOGITS = 2**19, 2**27


def chunk_rows(vocabulary: int, device: torch.device, cpu_logits: int | None = None) -> int:
    """How many positions with `vocabulary` logits each to work on at a time, at least 1; on a CPU those that hold
    `cpu_logits` (None: CPU_CHUNK_LOGITS)."""
    on_cpu = CPU_CHUNK_LOGITS if cpu_logits is None else cpu_logits
    return max(1, (on_cpu if device.type == "cpu" else DEVICE_CHUNK_LOGITS) // vocabulary)


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target] per position, computed in float32: float32 [N].

    A chunk of positions at a time, which is faster on a CPU and needs no second copy of all logits; the values are the
    same.

    Args:
        logits: [N, V], any floating dtype (float64 stays float64).
        targets: int64 [N].
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = chunk_rows(logits.shape[-1], logits.device)
    chunks = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([F.cross_entropy(part.to(wide), target, reduction="none") for part, target in chunks])


def loss_weights(t: torch.Tensor, scheduler: BaseAlphaScheduler, weight_type: WeightType) -> torch.Tensor:
    """Weight of each row's masked positions, [B]: w(t) of the schedule, or 1 for "uniform"."""
    if weight_type == "scheduler":
        return scheduler.weight(t)
    if weight_type == "uniform":
        return torch.ones_like(t)
    raise ValueError(f"unknown loss_weight_type {weight_type!r}: choose one of {', '.join(get_args(WeightType))}")


def normaliser(counts: torch.Tensor, norm_type: NormType) -> torch.Tensor:
    """Factor that multiplies every term of row b, float64 [..., B], so that the sum of all terms is the wanted mean.

    With n_b = counts[b]: "token" 1 / sum_b n_b; "sequence" 1 / (n_b * B); "batch" 1 / B. A count of 0 is read as 1:
    such a row has no terms, and the loss stays 0 instead of 0 / 0.

    Args:
        counts: int or float [..., B], leading dimensions being batches of their own; maskable positions in the outer
            loss, positions of the loss mask in the inner loss.
    """
    counts, rows = counts.double(), counts.shape[-1]
    if norm_type == "token":
        return (1 / counts.sum(dim=-1, keepdim=True).clamp(min=1)).expand_as(counts)
    if norm_type == "sequence":
        return 1 / (counts.clamp(min=1) * rows)
    if norm_type == "batch":
        return torch.full_like(counts, 1 / rows)
    raise ValueError(f"unknown loss_norm_type {norm_type!r}: choose one of {', '.join(get_args(NormType))}")


def normalise(
    nll: torch.Tensor,
    positions: torch.Tensor,
    length: int,
    row_weights: torch.Tensor,
    counts: torch.Tensor,
    norm_type: NormType,
) -> torch.Tensor:
    """Weighted, normalised loss: sum_i nll_i * w[row_i] * normaliser(counts)[row_i], a scalar.

    Args:
        nll: float [N].
        positions: int64 [N], flat indices into [B * L] (row = position // L).
        length: L.
        row_weights: w, float [B] (see `loss_weights`).
        counts: [B] (see `normaliser`).
        norm_type: "token", "sequence" or "batch".
    """
    per_row = row_weights * normaliser(counts, norm_type).to(row_weights.dtype)  # [B]
    return (nll * per_row[positions // length]).sum()


def row_sums(nll: torch.Tensor, positions: torch.Tensor, length: int, row_weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of each row's terms, in the dtype of the weights, [B]: row_weights[b] * sum of nll_i over row b.

    With the schedule's weights, an estimate of each row's negative log-likelihood in nats. Arguments as in `normalise`.
    """
    return torch.zeros_like(row_weights).index_add(0, positions // length, nll.to(row_weights.dtype)) * row_weights
