"""Inner trajectories: the denoising states that the fast weights are fitted to, cut from the true tokens.

A trajectory is a pure function of masks and uniform noise; it runs in the collator, on the CPU. Shapes: B rows,
L positions, K inner steps. An entry in `TRAJECTORIES` adds one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from memdlm.memory.config import PROGRESSIVE_START_RATIO, MemoryConfig


@dataclass(frozen=True)
class InnerState:
    """One state of the inner trajectory, as masks over the true tokens."""

    is_masked: torch.Tensor  # [B, L] bool
    next_is_masked: torch.Tensor | None  # [B, L] bool, mask of the state that follows; None: nothing follows
    t: torch.Tensor  # [B] float32, the state's time


# (maskable [B, L], anchor [B, L], t [B], noise [B, L], config) -> states
#   maskable: positions that may be masked, bool.
#   anchor: the outer mask M, bool, inside `maskable`.
#   t: time of the outer state, float32.
#   noise: uniform draws in [0, 1).
Trajectory = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, MemoryConfig], list[InnerState]]


def pmc(
    maskable: torch.Tensor, anchor: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, config: MemoryConfig
) -> list[InnerState]:
    """Progressive, ends exactly at the outer anchor (MemDLM, arXiv 2603.22241, "anchor-consistent" trajectory).

    Per row, with m maskable positions and the anchor mask M, r = |M| / m: the first state masks M and random further
    positions, up to int(m * min(1, max(s * r, r))) in all. Of the n extra positions still masked with k steps left, the
    next state reveals ceil(n / k); the last state is the anchor. K = 1 is the first state alone. The time of a state is
    its share of masked positions. Extras are masked in ascending order of their noise, the last of them revealed first.
    """
    num_extra, rank = _extras(maskable, anchor, noise, config)
    masks = []
    for step in range(config.num_inner_steps):
        masks.append(anchor | (rank < num_extra[:, None]))
        steps_left = config.num_inner_steps - 1 - step
        if steps_left > 0:
            num_extra = num_extra - -(-num_extra // steps_left)  # minus ceil(n / k)
    return _chain(masks, [_share(mask, maskable) for mask in masks])


def pre_only(
    maskable: torch.Tensor, anchor: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, config: MemoryConfig
) -> list[InnerState]:
    """The first state of `pmc` alone, followed by the anchor: a teacher sees the anchor."""
    num_extra, rank = _extras(maskable, anchor, noise, config)
    mask = anchor | (rank < num_extra[:, None])
    return [InnerState(mask, anchor, _share(mask, maskable))]


def no_progressive(
    maskable: torch.Tensor, anchor: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, config: MemoryConfig
) -> list[InnerState]:
    """The anchor state alone, at the outer time."""
    return [InnerState(anchor, None, t)]


def progressive_memory(
    maskable: torch.Tensor, anchor: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, config: MemoryConfig
) -> list[InnerState]:
    """K states that reveal true tokens, whatever the anchor is: position p is masked in state k where noise_p < r_k.

    r_k falls in equal steps from 0.8 to `prompt_mask_ratio`; K = 1 is the state at `prompt_mask_ratio`. The time of a
    state is r_k.
    """
    last = config.prompt_mask_ratio
    first = PROGRESSIVE_START_RATIO if config.num_inner_steps > 1 else last
    ratios = torch.linspace(first, last, config.num_inner_steps).tolist()
    return _chain([maskable & (noise < ratio) for ratio in ratios], [torch.full_like(t, ratio) for ratio in ratios])


def disjoint(
    maskable: torch.Tensor, anchor: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, config: MemoryConfig
) -> list[InnerState]:
    """States that never show a token of the outer mask M: each masks M and a fresh random share of what is visible.

    Of the n visible maskable positions of a row, each state masks floor(n * (1 - 1/s)), at least one, and asks for
    those alone. The states do not follow each other: the next of each is the outer state. Their time is their share of
    masked positions.

    Args:
        noise: [K, B, L], fresh draws for every state.
    """
    visible = maskable & ~anchor
    num_visible = visible.sum(dim=1)  # [B]
    # n - ceil(n / s): the division is exact where the result is whole, n * (1 - 1/s) is not.
    kept = torch.ceil(num_visible.double() / config.progressive_consistent_start_scale).long()
    num_asked = (num_visible - kept).clamp(min=1)[:, None]  # [B, 1]; a row with nothing visible has no candidates
    masks = [anchor | (_rank(visible, draws) < num_asked) for draws in noise]
    return [InnerState(mask, anchor, _share(mask, maskable)) for mask in masks]


def loss_mask(state: InnerState, mode: str) -> torch.Tensor:
    """Positions of a step's inner loss, bool [B, L].

    "student_masked": all masked ones. "newly_revealed": those that the next state reveals; where nothing follows, all
    masked ones. A row may have none: it then has no part in that step.
    """
    if mode == "newly_revealed" and state.next_is_masked is not None:
        return state.is_masked & ~state.next_is_masked
    return state.is_masked


def _extras(
    maskable: torch.Tensor, anchor: torch.Tensor, noise: torch.Tensor, config: MemoryConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many positions the first pmc state masks beside the anchor, [B], and the rank in which it takes them."""
    num_anchor = anchor.sum(dim=1)  # [B]
    # int(m * min(1, s * n / m)) without the division: m cancels, and no rounding error can push the floor one down.
    scaled = (num_anchor.double() * config.progressive_consistent_start_scale).long()
    num_first = torch.minimum(scaled, maskable.sum(dim=1))
    return num_first - num_anchor, _rank(maskable & ~anchor, noise)


def _rank(candidates: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """[B, L]: 0 for the candidate of its row with the smallest noise, 1 for the next, ...; L for other positions."""
    order = torch.where(candidates, noise, torch.inf).argsort(dim=1, stable=True)
    return order.argsort(dim=1).masked_fill(~candidates, candidates.shape[1])


def _share(mask: torch.Tensor, maskable: torch.Tensor) -> torch.Tensor:
    return mask.sum(dim=1) / maskable.sum(dim=1).clamp(min=1)  # [B] float32


def _chain(masks: list[torch.Tensor], times: list[torch.Tensor]) -> list[InnerState]:
    return [InnerState(*each) for each in zip(masks, [*masks[1:], None], times, strict=True)]


TRAJECTORIES: dict[str, Trajectory] = {
    "pmc": pmc,
    "pre_only": pre_only,
    "no_progressive": no_progressive,
    "progressive_memory": progressive_memory,
}
