"""The inner loop: plain SGD on the fast weights over the states of a trajectory.

    phi_k = phi_{k-1} - lr * clip(grad_phi L_inner(phi_{k-1}, state_k)),   k = 1..K     (MemDLM, arXiv 2603.22241)

First order: phi_K is a constant for the outer loss. Only phi gets gradients (torch.autograd.grad), the slow weights get
none. Nothing here reads a number back from the device.
Shapes: B rows, L positions, N loss positions of a step, D hidden, P numbers in one phi, G memories (1 for scope batch,
B for scope row), S inner steps done (K times epochs).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from dllm.core.losses import NormType, chunk_rows, loss_weights, normaliser
from dllm.core.schedulers import BaseAlphaScheduler
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights, repeat_each
from memdlm.memory.objectives import OBJECTIVES, Readout
from memdlm.memory.plan import InnerPlan, InnerStep

CLIP_EPSILON = 1e-12  # keeps the clip factor finite for a zero gradient
# On a CPU the product with the head wants more positions at a time than the loss does (`dllm.core.losses.chunk_rows`).
HEAD_CPU_CHUNK_LOGITS = 2**22


@dataclass(frozen=True)
class Network:
    """The model as the inner loop sees it, with the fast weights in place.

    hidden_at: (index of a state, flat positions [N]) -> hidden states after the final norm that predict the tokens
        there, [N, D].
    head: hidden states [n, D] -> logits [n, V].
    vocabulary: V.
    lockstep: the ranks of a run share out the weights and gather them call by call, so that every rank must make the
        same calls: one with nothing to predict goes through them all the same, and the head is called once for all
        positions.
    """

    hidden_at: Callable[[int, torch.Tensor], torch.Tensor]
    head: Callable[[torch.Tensor], torch.Tensor]
    vocabulary: int
    lockstep: bool = False


@dataclass(frozen=True)
class InnerReport:
    """What happened in each inner step; tensors on the device."""

    losses: torch.Tensor  # [S, G]
    grad_norms: torch.Tensor  # [S, G], of the whole gradient, before the clip
    changes: torch.Tensor  # [S, G], |phi_k - phi_{k-1}|
    skipped: torch.Tensor  # [S, G], 1 where the memory did not move: nothing to predict, not finite, or no slope
    empty_rows: torch.Tensor  # [S], rows with nothing to predict
    bad_rows: torch.Tensor  # [S], rows left out because their loss is not finite
    left_out: torch.Tensor  # [S, B], 1 where it was this row
    change: torch.Tensor  # [G], |phi_S - phi_0|


def fit(
    fast: FastWeights,
    initial: torch.Tensor,
    plan: InnerPlan,
    network: Network,
    config: MemoryConfig,
    scheduler: BaseAlphaScheduler,
    reduce_gradient: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> InnerReport:
    """Runs the inner loop and leaves phi_K in place in `fast`, detached.

    A memory whose loss or gradient is not finite in a step keeps its value in that step.

    Args:
        fast: attached fast weights.
        initial: phi_0, float32 [G, P].
        plan: states and steps.
        network: the model.
        config: objective, weight, normaliser, learning rate, clip, epochs.
        scheduler: gives the weight w(t).
        reduce_gradient: averages a gradient [G, P] over data-parallel ranks; None keeps each rank's own.
    """
    phi = initial
    trace = []
    for _ in range(config.num_inner_epochs):
        for step in plan.steps:
            gradient, loss, num_empty, left_out = _gradient(fast, phi, plan, step, network, config, scheduler)
            if reduce_gradient is not None:
                gradient = reduce_gradient(gradient)
            # A memory with nothing to predict has a zero gradient, unless other ranks had something.
            norm = gradient.norm(dim=-1)
            moves = norm.isfinite() & (norm > 0)  # [G]
            update = config.inner_lr * clip_gradient(gradient, fast.sizes, config.inner_grad_clip, config.clip_kind)
            update.masked_fill_(~moves[:, None], 0)
            phi = phi - update
            counts = num_empty, left_out.sum(), left_out
            trace.append((loss, norm, update.norm(dim=-1), (~moves).float(), *counts))
    fast.set(phi)
    columns = [torch.stack(column) for column in zip(*trace, strict=True)]
    return InnerReport(*columns, change=(phi - initial).norm(dim=-1))


def clip_gradient(gradient: torch.Tensor, sizes: tuple[int, ...], max_norm: float, kind: str) -> torch.Tensor:
    """`gradient` [G, P] with each row scaled by min(1, max_norm / norm), per tensor of `sizes` ("tensor") or as a whole
    ("global"): [G, P].

    max_norm 0 turns the clip off.
    """
    if max_norm == 0:
        return gradient
    if kind == "global":
        return gradient * (max_norm / (gradient.norm(dim=-1, keepdim=True) + CLIP_EPSILON)).clamp(max=1)
    if len(gradient) == 1:  # two kernels for hundreds of matrices: all norms at once, one product
        norms = torch.stack(torch._foreach_norm(gradient[0].split(sizes)))[None]  # pyright: ignore
    else:
        norms = torch.stack([part.norm(dim=-1) for part in gradient.split(sizes, dim=-1)], dim=-1)  # [G, matrices]
    return gradient * repeat_each((max_norm / (norms + CLIP_EPSILON)).clamp(max=1), sizes)


@contextlib.contextmanager
def no_autocast_cache() -> Iterator[None]:
    """A block in which autocast keeps no low-precision copies of weights.

    A copy made without gradients and used again by the outer forward would cut that weight off from its gradient.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _gradient(
    fast: FastWeights,
    phi: torch.Tensor,
    plan: InnerPlan,
    step: InnerStep,
    network: Network,
    config: MemoryConfig,
    scheduler: BaseAlphaScheduler,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient [G, P], losses [G], number of rows with nothing to predict, rows left out [B]), detached."""
    positions = step.loss_positions
    if len(positions) == 0:
        if network.lockstep:
            # The result is thrown away.
            first = positions.new_zeros(1)
            _gradient(fast, phi, plan, replace(step, loss_positions=first, targets=first), network, config, scheduler)
        none = torch.zeros(plan.num_rows, device=phi.device)
        return torch.zeros_like(phi), torch.zeros_like(phi[:, 0]), (none + 1).sum(), none
    with torch.enable_grad():
        leaf = phi.detach().requires_grad_()
        fast.set(leaf)
        student = network.hidden_at(step.student, positions)  # [N, D]
    with torch.no_grad(), no_autocast_cache():
        teacher = None if step.teacher is None else network.hidden_at(step.teacher, positions)
    losses, slopes = _losses_and_slopes(student.detach(), teacher, step.targets, network, config)
    rows = positions // plan.length  # [N]
    weights = loss_weights(step.t, scheduler, config.loss_weight_type)
    keep, factors, num_empty, left_out = _row_factors(losses, rows, weights, len(phi), config.loss_norm_type)
    slopes = torch.where(keep[:, None], slopes * factors[:, None].to(slopes.dtype), torch.zeros_like(slopes))
    # Not backward(): that would add to the gradients of the slow weights.
    (gradient,) = torch.autograd.grad(student, leaf, slopes)
    terms = torch.where(keep, losses * factors, torch.zeros_like(losses))
    memories = rows * len(phi) // plan.num_rows  # which memory a position belongs to: its row, or the only one
    loss = torch.zeros(len(phi), dtype=terms.dtype, device=phi.device).index_add(0, memories, terms)
    return gradient, loss, num_empty, left_out


def _losses_and_slopes(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    targets: torch.Tensor,
    network: Network,
    config: MemoryConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective at each position, [N], and its derivative with respect to that position's hidden state, [N, D].

    A chunk of positions at a time, forward and backward: the logits of all of them are never held at once.
    """
    objective = OBJECTIVES[config.inner_loss_type].function
    size = chunk_rows(network.vocabulary, student.device, HEAD_CPU_CHUNK_LOGITS)
    if network.lockstep:
        size = len(student)

    @torch.no_grad()
    def fixed_head(hidden: torch.Tensor) -> torch.Tensor:
        with no_autocast_cache():
            return network.head(hidden)

    losses, slopes = [], []
    for start in range(0, len(student), size):
        part = slice(start, start + size)
        wanted = None if teacher is None else Readout(teacher[part], fixed_head)
        with torch.enable_grad():
            leaf = student[part].requires_grad_()
            loss = objective(Readout(leaf, network.head), wanted, targets[part], config)
            (slope,) = torch.autograd.grad(loss.sum(), leaf)
        losses.append(loss.detach())
        slopes.append(slope)
    return torch.cat(losses), torch.cat(slopes)


def _row_factors(
    losses: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, num_memories: int, norm_type: NormType
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each position's loss is multiplied by: (whether it counts, bool [N]; factors [N]; number of rows without
    positions; 1 at rows left out, [B]).

    A row with a loss that is not finite is left out, and the others are normalised without it. Each memory normalises
    over its own rows.

    Args:
        losses: [N].
        rows: row of each position, [N].
        weights: weight of each row, [B].
        num_memories: G.
        norm_type: see `dllm.core.losses.normaliser`.
    """
    none = torch.zeros_like(weights)  # [B]
    asked = none.index_add(0, rows, torch.ones_like(losses).to(weights.dtype))
    bad = none.index_add(0, rows, (~losses.isfinite()).to(weights.dtype)) > 0
    counts = torch.where(bad, none, asked)
    norms = normaliser(counts.view(num_memories, -1), norm_type).flatten().to(weights.dtype)  # [B]
    return ~bad[rows], (weights * norms)[rows], (asked == 0).sum().float(), bad.float()
