"""The inner loop: plain SGD on the fast weights over the states of a trajectory.

    phi_k = phi_{k-1} - lr * clip(grad_phi L_inner(phi_{k-1}, state_k)),   k = 1..K     (MemDLM, arXiv 2603.22241)

First order: phi_K is a constant for the outer loss. Only phi gets gradients (torch.autograd.grad), the slow weights get
none. Nothing here reads a number back from the device.
Shapes: B rows, L positions, N loss positions of a step, P numbers in phi, S inner steps done (K times epochs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dllm.core.losses import loss_weights, normalise
from dllm.core.schedulers import BaseAlphaScheduler
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.objectives import OBJECTIVES

CLIP_EPSILON = 1e-12  # keeps the clip factor finite for a zero gradient


@dataclass(frozen=True)
class InnerStep:
    """What one inner step needs, on the device."""

    loss_positions: torch.Tensor  # [N] int64, flat indices into [B * L]
    t: torch.Tensor  # [B] float32
    noised_ids: torch.Tensor  # [B, L] int64
    is_anchor: bool  # the state is the outer one


@dataclass(frozen=True)
class InnerReport:
    """What happened in each inner step; tensors [S] on the device."""

    losses: torch.Tensor
    grad_norms: torch.Tensor  # of the whole gradient, before the clip
    skipped: torch.Tensor  # 1 where the step was left out: nothing to predict, or not finite
    change: torch.Tensor  # 0-dim, |phi_S - phi_0|


def inner_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    step: InnerStep,
    config: MemoryConfig,
    scheduler: BaseAlphaScheduler,
) -> torch.Tensor:
    """Mean objective over the step's loss positions, weighted by the step's t and normalised by their number: a scalar.

    A row whose loss is not finite is left out.

    Args:
        logits: [N, V] at the loss positions.
        targets: true tokens, int64 [N].
        step: positions and times.
        config: objective, weight and normaliser.
        scheduler: gives the weight w(t).
    """
    losses = OBJECTIVES[config.inner_loss_type](logits, targets)  # [N]
    num_rows, length = step.noised_ids.shape
    rows = step.loss_positions // length  # [N]
    bad = torch.zeros(num_rows, device=logits.device).index_add(0, rows, (~losses.detach().isfinite()).float())  # [B]
    keep = (bad == 0)[rows]  # [N]
    counts = torch.zeros(num_rows, device=logits.device).index_add(0, rows, keep.float())  # [B]
    weights = loss_weights(step.t, scheduler, config.loss_weight_type)
    kept = torch.where(keep, losses, torch.zeros_like(losses))
    return normalise(kept, step.loss_positions, length, weights, counts, config.loss_norm_type)


def clip_gradient(gradient: torch.Tensor, sizes: Sequence[int], max_norm: float, kind: str) -> torch.Tensor:
    """`gradient` [P] scaled by min(1, max_norm / norm), per tensor of `sizes` ("tensor") or as a whole ("global"): [P].

    max_norm 0 turns the clip off.
    """
    if max_norm == 0:
        return gradient
    if kind == "global":
        return gradient * (max_norm / (gradient.norm() + CLIP_EPSILON)).clamp(max=1)
    parts = gradient.split(list(sizes))
    # Two kernels for hundreds of matrices: all norms at once, and one product with each matrix's factor repeated.
    norms = torch.stack(torch._foreach_norm(parts))  # pyright: ignore[reportPrivateImportUsage]
    factors = (max_norm / (norms + CLIP_EPSILON)).clamp(max=1)
    lengths = torch.tensor(sizes).to(gradient.device, non_blocking=True)
    return gradient * factors.repeat_interleave(lengths, output_size=len(gradient))


def fit(
    fast: FastWeights,
    initial: torch.Tensor,
    steps: Sequence[InnerStep],
    readout: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    config: MemoryConfig,
    scheduler: BaseAlphaScheduler,
    reduce_gradient: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> InnerReport:
    """Runs the inner loop and leaves phi_K in place in `fast`, detached.

    Args:
        fast: attached fast weights.
        initial: phi_0, flat float32 [P].
        steps: the trajectory.
        readout: index of a step -> (logits [N, V], true tokens int64 [N]) at its loss positions, computed with the fast
            weights in place.
        config: learning rate, clip, epochs, and what `inner_loss` reads.
        scheduler: gives the weight w(t).
        reduce_gradient: averages a flat gradient [P] over data-parallel ranks; None keeps each rank's own.
    """
    phi = initial
    losses, norms, skipped = [], [], []
    for _ in range(config.num_inner_epochs):
        for index, step in enumerate(steps):
            loss, gradient = _loss_and_gradient(fast, phi, step, lambda k=index: readout(k), config, scheduler)
            if reduce_gradient is not None:
                gradient = reduce_gradient(gradient)
            finite = gradient.isfinite().all()
            clipped = clip_gradient(gradient, fast.sizes, config.inner_grad_clip, config.clip_kind)
            # where, not a product: 0 * nan is nan.
            phi = torch.where(finite, phi - config.inner_lr * clipped, phi)
            losses.append(loss)
            norms.append(gradient.norm())
            skipped.append((~finite).float() if len(step.loss_positions) else torch.ones_like(loss))
    fast.set(phi)
    return InnerReport(torch.stack(losses), torch.stack(norms), torch.stack(skipped), (phi - initial).norm())


def _loss_and_gradient(fast, phi, step, readout, config, scheduler) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, its gradient with respect to phi [P]), detached; zeros for a step with nothing to predict."""
    if len(step.loss_positions) == 0:
        return torch.zeros((), device=phi.device), torch.zeros_like(phi)
    with torch.enable_grad():
        leaf = phi.detach().requires_grad_()
        fast.set(leaf)
        logits, targets = readout()
        loss = inner_loss(logits, targets, step, config, scheduler)
        # Not backward(): that would add to the gradients of the slow weights.
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient
