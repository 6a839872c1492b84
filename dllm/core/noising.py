"""Masking: the only place that turns clean tokens into a noised state.

Shapes: B rows, L positions. `maskable` marks the positions that may be masked (label != -100).
Nothing here draws from a global generator: a row's draws come from (seed, epoch, example id), so masks do not depend on
the batch a row sits in, on the device, on the number of processes or on a resumption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dllm.core.schedulers import BaseAlphaScheduler


@dataclass(frozen=True)
class NoisedBatch:
    """A noised state of a batch."""

    noised_ids: torch.Tensor  # [B, L] int64, the mask token where `is_masked`
    is_masked: torch.Tensor  # [B, L] bool
    t: torch.Tensor  # float32, diffusion time of each row, [B], or of each position, [B, L]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a fixed function of `parts`: equal parts, equal seed, on every machine and Python."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` seeded with `derive_seed(*parts)`."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))


def draw_times(generators: Sequence[torch.Generator], time_epsilon: float) -> torch.Tensor:
    """One time t ~ U(time_epsilon, 1) per row, from that row's generator: float32 [B]."""
    u = torch.cat([torch.rand(1, generator=g) for g in generators])  # [B]
    return time_epsilon + (1 - time_epsilon) * u


def block_times(
    first: torch.Tensor, generators: Sequence[torch.Generator], time_epsilon: float, length: int, block_size: int
) -> torch.Tensor:
    """The time of every position where each block has its own t ~ U(time_epsilon, 1): float32 [B, length].

    A row's first block has the time that it is given, so that rows of one block are rows of full-sequence diffusion.

    Args:
        first: float32 [B].
        generators: of the other blocks' times, one per row.
        time_epsilon: smallest time.
        length: L; the last block may be shorter.
        block_size: positions of a block.
    """
    num_others = -(-length // block_size) - 1
    others = time_epsilon + (1 - time_epsilon) * draw_noise(generators, num_others)
    times = torch.cat([first[:, None], others], dim=1)  # [B, blocks]
    return times.repeat_interleave(block_size, dim=1)[:, :length]


def draw_noise(generators: Sequence[torch.Generator], length: int) -> torch.Tensor:
    """Uniform noise in [0, 1), float32 [B, length], row b from generators[b].

    The first k columns do not depend on `length`, so padding a row does not change the draws of its tokens.
    """
    return torch.stack([torch.rand(length, generator=g) for g in generators])


def mask_tokens(
    input_ids: torch.Tensor,
    maskable: torch.Tensor,
    t: torch.Tensor,
    *,
    noise: torch.Tensor,
    scheduler: BaseAlphaScheduler,
    mask_token_id: int,
) -> NoisedBatch:
    """The state x_t in which each maskable position is masked with probability 1 - alpha(t).

    A position is masked where `maskable & (noise < 1 - alpha(t))`; everything else keeps its token.

    Args:
        input_ids: clean tokens, int64 [B, L].
        maskable: bool [B, L].
        t: float [B], or [B, L] for a time of each position.
        noise: uniform draws in [0, 1), float [B, L] (see `draw_noise`).
        scheduler: the masking schedule.
        mask_token_id: id of the mask token.
    """
    times = t[:, None] if t.dim() == 1 else t
    is_masked = maskable & (noise < 1 - scheduler.alpha(times))  # [B, L]
    return NoisedBatch(apply_mask(input_ids, is_masked, mask_token_id), is_masked, t)


def apply_mask(input_ids: torch.Tensor, is_masked: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """`input_ids` with the mask token at the masked positions: int64 [B, L]."""
    return input_ids.masked_fill(is_masked, mask_token_id)


def flat_positions(selected: torch.Tensor) -> torch.Tensor:
    """Indices into [B * L] of the True entries of `selected` [B, L], ascending: int64 [N]. Call it on the CPU: it
    counts."""
    return selected.reshape(-1).nonzero(as_tuple=True)[0]
