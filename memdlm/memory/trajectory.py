"""Inner trajectories: the denoising states that the fast weights are fitted to, cut from the true tokens.

A trajectory is a pure function of clean tokens, the outer anchor mask and uniform noise; it runs in the collator, on
the CPU. Shapes: B rows, L positions, K inner steps. An entry in `TRAJECTORIES` adds one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dllm.core.noising import apply_mask
from memdlm.memory.config import MemoryConfig


@dataclass(frozen=True)
class InnerState:
    """One state of the inner trajectory."""

    noised_ids: torch.Tensor  # [B, L] int64
    is_masked: torch.Tensor  # [B, L] bool
    next_is_masked: torch.Tensor | None  # [B, L] bool, mask of the state that follows; None at the last state
    t: torch.Tensor  # [B] float32, share of the maskable positions that are masked
    is_anchor: bool  # whether this is the outer state itself


Trajectory = Callable[..., list[InnerState]]


def pmc(
    input_ids: torch.Tensor,
    maskable: torch.Tensor,
    anchor: torch.Tensor,
    *,
    noise: torch.Tensor,
    mask_token_id: int,
    config: MemoryConfig,
) -> list[InnerState]:
    """Progressive, ends exactly at the outer anchor (MemDLM, arXiv 2603.22241, "anchor-consistent" trajectory).

    Per row, with m maskable positions and the anchor mask M, r = |M| / m: the first state masks M and random further
    positions, up to int(m * min(1, max(s * r, r))) in all. Of the n extra positions still masked with k steps left, the
    next state reveals ceil(n / k); the last state is the anchor. K = 1 is the first state alone.

    Args:
        input_ids: clean tokens, int64 [B, L].
        maskable: bool [B, L].
        anchor: M, bool [B, L], inside `maskable`.
        noise: uniform draws, [B, L]; extras are masked in ascending order of their noise, and the last of them revealed
            first.
        mask_token_id: id of the mask token.
        config: `num_inner_steps` K and `progressive_consistent_start_scale` s are read.
    """
    num_steps, scale = config.num_inner_steps, config.progressive_consistent_start_scale
    num_maskable = maskable.sum(dim=1)  # [B]
    num_anchor = anchor.sum(dim=1)  # [B]
    # int(m * min(1, s * n / m)) without the division: m cancels, and no rounding error can push the floor one down.
    num_first = torch.minimum((num_anchor.double() * scale).long(), num_maskable)
    num_extra = num_first - num_anchor  # [B]

    candidates = maskable & ~anchor
    order = torch.where(candidates, noise, torch.inf).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)  # [B, L], 0 for the candidate with the smallest noise

    masks = []
    for step in range(num_steps):
        masks.append(anchor | (candidates & (rank < num_extra[:, None])))
        steps_left = num_steps - 1 - step
        if steps_left > 0:
            num_extra = num_extra - -(-num_extra // steps_left)  # minus ceil(n / k)
    return [
        InnerState(
            noised_ids=apply_mask(input_ids, mask, mask_token_id),
            is_masked=mask,
            next_is_masked=masks[step + 1] if step + 1 < num_steps else None,
            t=mask.sum(dim=1) / num_maskable.clamp(min=1),
            is_anchor=num_steps > 1 and step == num_steps - 1,
        )
        for step, mask in enumerate(masks)
    ]


def loss_mask(state: InnerState, mode: str) -> torch.Tensor:
    """Positions of a step's inner loss, bool [B, L].

    "student_masked": all masked ones. "newly_revealed": those that the next state reveals; at the last state, which has
    no next, all masked ones. A row may have none: it then has no part in that step.
    """
    if mode == "newly_revealed" and state.next_is_masked is not None:
        return state.is_masked & ~state.next_is_masked
    return state.is_masked


TRAJECTORIES: dict[str, Trajectory] = {"pmc": pmc}
