"""Which masked positions a denoising step commits: how many, by which confidence. No loops over rows, no draws without
a generator.

Shapes: B rows, L positions, V vocabulary, S steps.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

Remasking = Literal["low_confidence", "random", "margin", "entropy"]


def get_num_transfer_tokens(num_masked: torch.Tensor, steps: int) -> torch.Tensor:
    """How many tokens each row commits at each step: int64 [B, S], row sums equal `num_masked`, earlier steps take the
    remainder.

    Args:
        num_masked: int64 [B].
        steps: S, at least 1.

    Raises:
        ValueError: steps below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    share = num_masked // steps  # [B]
    rest = num_masked % steps  # [B]
    extra = torch.arange(steps, device=num_masked.device)[None, :] < rest[:, None]  # [B, S]
    return share[:, None] + extra


def add_gumbel_noise(
    logits: torch.Tensor, temperature: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Logits whose argmax is a sample from softmax(logits / temperature); the logits themselves at temperature 0
    (nothing is drawn).

    Computed in float64: in lower precision the noise of the maximum is distorted and sampling collapses (arXiv
    2409.02908).
    """
    if temperature == 0:
        return logits
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float64)
    # -log(u) must be positive: u = 0 would give an infinite Gumbel value.
    gumbel = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))
    return logits.double() / temperature + gumbel


def confidence(
    logits: torch.Tensor, tokens: torch.Tensor, remasking: Remasking, generator: torch.Generator | None = None
) -> torch.Tensor:
    """How sure the model is of each proposed token, higher is surer: float [..., ].

    "low_confidence" p(token); "margin" p of the best minus p of the second; "entropy" minus the entropy of p; "random"
    a uniform draw.

    Args:
        logits: [..., V].
        tokens: int64 [...].
        remasking: which of the four.
        generator: needed by "random".
    """
    if remasking == "random":
        return torch.rand(tokens.shape, generator=generator, device=tokens.device)
    probabilities = torch.softmax(logits.float(), dim=-1)
    if remasking == "low_confidence":
        return probabilities.gather(-1, tokens[..., None])[..., 0]
    if remasking == "margin":
        best = probabilities.topk(2, dim=-1).values
        return best[..., 0] - best[..., 1]
    if remasking == "entropy":
        return (probabilities * torch.log(probabilities.clamp(min=1e-20))).sum(dim=-1)
    raise ValueError(f"unknown remasking {remasking!r}: choose one of {', '.join(get_args(Remasking))}")


def choose_positions(scores: torch.Tensor, allowed: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The `counts[b]` allowed positions of row b with the highest scores: bool [B, L]; ties go to the lower position.

    Rows with fewer allowed positions than their count give all of them.

    Args:
        scores: float [B, L].
        allowed: bool [B, L].
        counts: int64 [B].
    """
    ranked = torch.where(allowed, scores, torch.full_like(scores, -torch.inf))
    order = ranked.argsort(dim=1, descending=True, stable=True)  # [B, L]
    rank = order.argsort(dim=1)  # [B, L], 0 for the best position
    return allowed & (rank < counts[:, None])


def choose_above(scores: torch.Tensor, allowed: torch.Tensor, threshold: float) -> torch.Tensor:
    """Allowed positions whose score exceeds `threshold`, and in every row at least the best allowed one: bool [B,
    L]."""
    best = choose_positions(scores, allowed, torch.ones(scores.shape[0], dtype=torch.int64, device=scores.device))
    return best | (allowed & (scores > threshold))
