"""Mixture of experts: router, experts, dispatch and the load-balancing loss.

Shapes: B rows, L positions, T = B * L tokens, D hidden, E experts, k chosen experts per token, F expert width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from dllm.models.layers import SwiGLU

RouterScores = Literal["softmax", "sigmoid"]


class RouterRecorder:
    """Collects what the routers of one forward did: layer index -> (logits [T, E], chosen experts [T, k]).

    The first record of a layer counts and a closed recorder takes none: the second run of a checkpointed layer adds
    nothing.
    """

    def __init__(self) -> None:
        self._records: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._open = True

    def record(self, layer: int, logits: torch.Tensor, chosen: torch.Tensor) -> None:
        """Notes the router of `layer`."""
        if self._open and layer not in self._records:
            self._records[layer] = (logits, chosen)

    def close(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """(logits, chosen experts), one tensor per MoE layer from the lowest up; later records are ignored."""
        self._open = False
        records = [self._records[layer] for layer in sorted(self._records)]
        return tuple(logits for logits, _ in records), tuple(chosen for _, chosen in records)


class Router(nn.Module):
    """Logits x W^T, [T, E].

    Not an nn.Linear, so that quantisation and LoRA leave it alone: a rounded router sends tokens elsewhere.
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


def run_experts(
    experts: nn.ModuleList,
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    rows: int | None = None,
    calls_all: bool = False,
) -> torch.Tensor:
    """y_i = sum_j weights[i, j] * experts[chosen[i, j]](x_i), [T, D], in the dtype of `x`.

    Tokens are sorted by expert, every expert gets one contiguous chunk, and the results are gathered back: no
    scatter-add, so the sum has one order. The device is waited for once (the chunk sizes).

    Args:
        experts: E modules [n, D] -> [n, D]; with `rows` [B, n, D] -> [B, n, D].
        x: tokens [T, D].
        weights: mixing weights [T, k].
        chosen: expert indices, int64 [T, k].
        rows: B, where token i is of row i // (T / B). Row b of an expert's chunk then holds its tokens of row b in
            their order and zeros behind them, n being its most tokens in one row. None: chunks without a row axis
            and without padding.
        calls_all: call experts without a token too; they are always called where gradients are taken.

    Raises:
        ValueError: the rows cannot have equally many tokens.
    """
    num_tokens, top_k = chosen.shape
    num_rows = 1 if rows is None else rows
    if num_tokens % num_rows:
        raise ValueError(f"{num_tokens} tokens are not {num_rows} rows of one length")
    bins = chosen.flatten()  # [T * k], the expert, or the expert and row: expert * B + row
    if rows is not None:
        bins = bins * rows + torch.arange(len(bins), device=x.device) // (len(bins) // rows)
    order = bins.argsort(stable=True)
    place = order.argsort()  # [T * k], where each token goes for each of its experts
    ends = torch.searchsorted(bins[order], torch.arange(len(experts) * num_rows, device=x.device), right=True)
    sizes = ends.diff(prepend=ends.new_zeros(1))  # [E * B]
    caps = sizes.view(-1, num_rows).amax(1)  # [E], n of every expert
    lengths = caps.tolist()
    if rows is None:
        chunks = x[order // top_k].split(lengths)
    else:
        widths = caps.repeat_interleave(rows)
        place = place + (widths.cumsum(0) - widths - (ends - sizes))[bins]
        # A copy to distinct places: its backward is a gather, where gathering one zero row for all the padding would
        # add up as many gradients in that row.
        padded = x.new_zeros(rows * sum(lengths), x.shape[1]).index_copy(0, place, x.repeat_interleave(top_k, 0))
        chunks = padded.split([rows * length for length in lengths])
        chunks = [chunk.view(rows, n, x.shape[1]) for chunk, n in zip(chunks, lengths, strict=True)]
    # Under gradients the empty experts run too: DDP waits for a gradient of every parameter.
    keep_empty = calls_all or torch.is_grad_enabled()
    parts = [expert(chunk) for expert, chunk in zip(experts, chunks, strict=True) if keep_empty or chunk.numel()]
    gathered = torch.cat([part.flatten(0, -2) for part in parts])[place].view(*chosen.shape, -1)  # [T, k, D]
    return (gathered * weights.to(gathered.dtype)[..., None]).sum(1).to(x.dtype)


class RoutedExperts(nn.Module):
    """A block that sends every token of [B, L, D] to some of its experts (see `run_experts`).

    Attributes:
        by_row: False: an expert sees its tokens of all rows as [n, D]. True: as [B, n, D], with zeros behind the
            tokens of the shorter rows; set while a memory with one set of weights per row is in place, whose hooks on
            the experts' linears tell the rows apart by the leading axis.
        calls_all: see `run_experts`; set where an engine gathers the weights of an expert on all ranks at once.
    """

    by_row: bool = False
    calls_all: bool = False


class SparseMoE(RoutedExperts):
    """Routed experts of LLaDA-MoE: the top k of p = softmax(x Wg^T) (+ expert_bias), mixed by p, not renormalised.

    Args:
        hidden_size: D.
        width: F.
        num_experts: E.
        top_k: k.
        layer_idx: index of the layer, for the recorder.
        expert_bias: whether there is a bias per expert; it enters the choice and the mixing weight.
    """

    def __init__(
        self, hidden_size: int, width: int, num_experts: int, top_k: int, layer_idx: int, expert_bias: bool
    ) -> None:
        super().__init__()
        self.gate = Router(hidden_size, num_experts)
        self.experts = nn.ModuleList(SwiGLU(hidden_size, width) for _ in range(num_experts))
        self.expert_bias: torch.Tensor | None
        self.register_buffer("expert_bias", torch.zeros(num_experts) if expert_bias else None)
        self.top_k, self.layer_idx = top_k, layer_idx

    def forward(self, hidden: torch.Tensor, recorder: RouterRecorder | None = None) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]; the router's logits and choices go to `recorder`."""
        x = hidden.flatten(0, -2)  # [T, D]
        logits = self.gate(x)
        scores = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        weights, chosen = scores.topk(self.top_k, dim=-1)  # [T, k]
        if recorder is not None:
            recorder.record(self.layer_idx, logits, chosen)
        rows = hidden.shape[0] if self.by_row else None
        return run_experts(self.experts, x, weights, chosen, rows, self.calls_all).view_as(hidden)


class GroupRouter(Router):
    """Router of LLaDA2 with a bias per expert, which is no gradient's business: it enters the choice alone."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts)
        self.expert_bias: torch.Tensor
        self.register_buffer("expert_bias", torch.zeros(num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))


class GroupedMoE(RoutedExperts):
    """Routed experts of LLaDA2: s = sigmoid(x Wg^T) in float32, the top k of r = s + expert_bias, mixed by s.

    The experts stand in `num_groups` equal groups; a token chooses among those of the `top_groups` groups with the
    largest sums of their two best r. The weights s are divided by their sum where k > 1, then times `scale`. A shared
    expert is added.

    Args:
        hidden_size: D.
        width: F.
        num_experts: E.
        top_k: k.
        layer_idx: index of the layer, for the recorder.
        num_groups, top_groups, scale: see above.
        shared_width: width of the shared expert; None: there is none.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        num_experts: int,
        top_k: int,
        layer_idx: int,
        *,
        num_groups: int,
        top_groups: int,
        scale: float,
        shared_width: int | None,
    ) -> None:
        super().__init__()
        self.gate = GroupRouter(hidden_size, num_experts)
        self.experts = nn.ModuleList(SwiGLU(hidden_size, width) for _ in range(num_experts))
        self.shared_experts = None if shared_width is None else SwiGLU(hidden_size, shared_width)
        self.top_k, self.layer_idx, self.scale = top_k, layer_idx, scale
        self.num_groups, self.top_groups = num_groups, top_groups

    def forward(self, hidden: torch.Tensor, recorder: RouterRecorder | None = None) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]; the router's logits and choices go to `recorder`."""
        x = hidden.flatten(0, -2)  # [T, D]
        logits = self.gate(x)
        scores = logits.sigmoid()
        chosen = self._choose(scores.detach() + self.gate.expert_bias)
        weights = scores.gather(1, chosen)
        if self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if recorder is not None:
            recorder.record(self.layer_idx, logits, chosen)
        rows = hidden.shape[0] if self.by_row else None
        mixed = run_experts(self.experts, x, weights * self.scale, chosen, rows, self.calls_all).view_as(hidden)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(hidden)

    def _choose(self, ranks: torch.Tensor) -> torch.Tensor:
        """Indices [T, k] of the best experts within the best groups, from r [T, E]."""
        grouped = ranks.unflatten(1, (self.num_groups, -1))  # [T, groups, E / groups]
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        best = group_scores.topk(self.top_groups, dim=-1).indices
        is_open = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best, True)
        return grouped.masked_fill(~is_open[..., None], -torch.inf).flatten(1).topk(self.top_k, dim=-1).indices


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    router_choices: tuple[torch.Tensor, ...],
    token_mask: torch.Tensor | None = None,
    scores: RouterScores = "softmax",
) -> torch.Tensor:
    """E * sum_e f_e * P_e over all layers and tokens, a float32 scalar; k where the experts share the tokens evenly.

    f_e is how often a token chose expert e (they sum to k), P_e the mean of p_e (Switch Transformer, arXiv 2101.03961,
    equation 4).

    Args:
        router_logits: one [T, E] per MoE layer.
        router_choices: one int64 [T, k] per MoE layer.
        token_mask: bool [T], False where a token is padding and does not count; None counts all.
        scores: p = softmax(logits), or sigmoid(logits) divided by its sum over the experts.
    """
    logits = torch.stack(router_logits).float()  # [layers, T, E]
    if scores == "softmax":
        probabilities = logits.softmax(-1)
    else:
        probabilities = logits.sigmoid()
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    num_experts = probabilities.shape[-1]
    chosen = torch.stack([F.one_hot(choice, num_experts).sum(1) for choice in router_choices])  # [layers, T, E]
    weight = torch.ones_like(probabilities[..., :1])
    if token_mask is not None:
        weight = weight * token_mask.to(weight)[None, :, None]
    total = weight.sum().clamp(min=1)
    share = (chosen * weight).sum((0, 1)) / total  # [E]
    mean = (probabilities * weight).sum((0, 1)) / total  # [E]
    return num_experts * (share * mean).sum()
