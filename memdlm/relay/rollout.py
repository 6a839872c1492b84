"""unroll(): K denoising forwards of a training step, each on what the one before revealed (arXiv 2605.22967, algorithm
1).

Shapes: B rows, L positions, N masked positions of the batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from dllm.core.losses import normalise, row_sums, token_nll
from dllm.core.noising import apply_mask, flat_positions, make_generator
from dllm.core.reveal import choose_above, choose_in_blocks, choose_within, propose
from dllm.models.backbone import DiffusionLMOutput
from dllm.utils.parsing import InputError
from memdlm.relay.channel import RelayChannel, RelayState
from memdlm.relay.config import RelayConfig

# step, noised_ids [B, L], is_masked [B, L], flat positions [N] -> output with logits [N, V] that predict them.
Network = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], DiffusionLMOutput]


@dataclass(frozen=True)
class RevealRule:
    """Which masked positions a training forward reveals: the decoder's rule (`RelayConfig.reveal`).

    Args:
        config: names the rule and its numbers.
        block_size: positions of a block; None: the row is one block.
        mask_token_id: never proposed.

    Raises:
        InputError: inner blocks that do not divide the block.
    """

    config: RelayConfig
    block_size: int | None
    mask_token_id: int

    def __post_init__(self) -> None:
        inner, size = self.config.inner_block_size, self.block_size
        if self.config.reveal == "aligned" and size is not None and size % inner:
            raise InputError(
                f"relay_inner_block_size={inner} does not divide the block size {size}: choose one of "
                f"{', '.join(str(n) for n in range(1, size + 1) if size % n == 0)}"
            )

    def __call__(
        self, logits: torch.Tensor, positions: torch.Tensor, is_masked: torch.Tensor, seed_parts: Sequence[int | str]
    ) -> torch.Tensor:
        """bool [B, L], among `is_masked`; of every row (and block) with masks at least one.

        Args:
            logits: [N, V], of the masked positions.
            positions: int64 [N], their flat indices into [B * L].
            is_masked: bool [B, L].
            seed_parts: of the draw that `tau_jitter` adds.
        """
        banned = torch.tensor([self.mask_token_id], device=logits.device)
        sure = propose(logits, banned=banned)[1]
        scores = sure.new_zeros(is_masked.numel()).index_put((positions,), sure).view_as(is_masked)
        return REVEALS[self.config.reveal](scores, is_masked, self, seed_parts)

    def tau(self, seed_parts: Sequence[int | str]) -> float:
        """The largest summed uncertainty of this forward: max(0, tau + tau_jitter * N(0, 1)), one draw for all rows."""
        if self.config.tau_jitter == 0:
            return self.config.tau
        draw = torch.randn((), generator=make_generator(*seed_parts, "tau"))
        return max(0.0, self.config.tau + self.config.tau_jitter * float(draw))


def _reveal_above(scores, is_masked, rule: RevealRule, seed_parts) -> torch.Tensor:
    return _in_blocks(scores, is_masked, rule, None)


def _reveal_aligned(scores, is_masked, rule: RevealRule, seed_parts) -> torch.Tensor:
    return _in_blocks(scores, is_masked, rule, rule.config.inner_block_size)


def _in_blocks(scores, is_masked, rule: RevealRule, part_size: int | None) -> torch.Tensor:
    def above(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return choose_above(scores, allowed, rule.config.threshold)

    size = rule.block_size
    if size is None:
        size = -(-scores.shape[1] // (part_size or 1)) * (part_size or 1)
    return choose_in_blocks(above, scores, is_masked, size, part_size)


def _reveal_within(scores, is_masked, rule: RevealRule, seed_parts) -> torch.Tensor:
    return choose_within(scores, is_masked, rule.tau(seed_parts))


# (scores [B, L], is_masked [B, L], rule, seed parts) -> bool [B, L]
REVEALS: dict[str, Callable[..., torch.Tensor]] = {
    "threshold": _reveal_above,
    "aligned": _reveal_aligned,
    "uncertainty": _reveal_within,
}


@dataclass
class Unrolled:
    """What K forwards made; entry s of the lists belongs to forward s."""

    loss: torch.Tensor  # L_1 + ... + L_K, a scalar with gradient
    losses: list[torch.Tensor]  # L_s: mean over the masked tokens of the micro-batch; 0 where there are none
    mask_ratios: list[torch.Tensor]  # share of the maskable positions that forward s saw masked
    num_revealed: list[torch.Tensor]  # tokens that forward s revealed, in all rows
    row_nll: list[torch.Tensor]  # [B], sum over each row's masked tokens of -log p_s
    row_counts: list[torch.Tensor]  # [B], how many those are
    aux_losses: list[torch.Tensor]  # router losses of the forwards, unweighted; empty without
    is_masked: torch.Tensor  # bool [B, L], what is masked after them
    hidden: torch.Tensor | None  # [B, L, D] of the last forward; None: nothing is carried
    gradients: GradientShare = field(default_factory=lambda: GradientShare())


class GradientShare:
    """How much of the gradient at the carried states comes through the relay: filled in by backward.

    With g_s the gradient of the loss with respect to h_s, and r_s the part of it that came through forward s + 1, the
    share is sum |r_s| / sum (|r_s| + |g_s - r_s|) over the states that were passed on with gradient; 0 without any.
    """

    def __init__(self) -> None:
        self.relay: list[torch.Tensor] = []
        self.own: list[torch.Tensor] = []

    def watch(self, taken: torch.Tensor, length: int) -> torch.Tensor:
        """The first `length` columns of `taken` [B, L or 2L, D] for the next forward, with an eye on what comes back
        through them."""
        passed = taken[:, :length]
        if not taken.requires_grad:
            return passed
        through: list[torch.Tensor] = []

        def total(gradient: torch.Tensor) -> None:
            if through:
                self.relay.append(through[0].norm())
                self.own.append((gradient.detach()[:, :length] - through[0]).norm())

        passed.register_hook(lambda gradient: through.append(gradient.detach()))
        taken.register_hook(total)
        return passed

    def value(self) -> torch.Tensor:
        """The share, a scalar; 0 before backward."""
        if not self.relay:
            return torch.zeros(())
        relay, own = torch.stack(self.relay).sum(), torch.stack(self.own).sum()
        return relay / (relay + own).clamp(min=torch.finfo(relay.dtype).tiny)


def unroll(
    network: Network,
    input_ids: torch.Tensor,
    maskable: torch.Tensor,
    is_masked: torch.Tensor,
    config: RelayConfig,
    rule: RevealRule,
    channel: RelayChannel | None = None,
    state: RelayState | None = None,
    seed_parts: Sequence[int | str] = (),
    watch_gradient: bool = False,
) -> Unrolled:
    """K forwards: forward s is asked for the true tokens under its masks, gives its state to forward s + 1, and what
    `rule` chooses on its (detached) logits is revealed with the true tokens.

        for s = 1 .. K:
            logits_s, h_s = network(x, R(h_{s-1}))            # h_{s-1} detached where s - 1 is a multiple of W
            L_s = mean over masked i of -log p_s(true token i)
            x[U_s] = true tokens,  U_s = rule(logits_s)

    Gradients so flow through at most W = config.window consecutive forwards. The host waits for the device once per
    forward, to count the masked positions.

    Args:
        network: one forward.
        input_ids: true tokens, int64 [B, L].
        maskable, is_masked: bool [B, L]; the state that forward 1 sees masks `is_masked`.
        config: K, W.
        rule: what is revealed.
        channel: carries the state; None: nothing is carried.
        state: what the channel gives to forward 1; None: what a first forward gets.
        seed_parts: of the rule's draws.
        watch_gradient: fill in `gradients` during backward.
    """
    rows, length = input_ids.shape
    ones = torch.ones(rows, device=input_ids.device)
    num_maskable = maskable.sum().clamp(min=1)
    losses, ratios, revealed, auxiliary = [], [], [], []
    row_nll, row_counts = [], []
    if channel is not None and state is None:
        state = channel.first(rows, length)
    gradients, hidden = GradientShare(), None
    for step in range(config.num_steps):
        positions = flat_positions(is_masked)
        noised_ids = apply_mask(input_ids, is_masked, rule.mask_token_id)
        if channel is None:
            output = network(step, noised_ids, is_masked, positions)
        else:
            assert state is not None
            if step % config.window == 0:
                state = replace(state, hidden=state.hidden.detach())
            with channel.passing(state):
                output = network(step, noised_ids, is_masked, positions)
            watched = gradients if watch_gradient and (step + 1) % config.window else None
            hidden, state = _handed_on(channel, state, length, watched)
        assert output.logits is not None
        nll = token_nll(output.logits, input_ids.reshape(-1)[positions])
        counts = is_masked.sum(dim=1)
        row_nll.append(row_sums(nll.detach(), positions, length, ones.to(nll.dtype)))
        row_counts.append(counts)
        losses.append(normalise(nll, positions, length, ones.to(nll.dtype), counts, "token"))
        if output.aux_loss is not None:
            auxiliary.append(output.aux_loss)
        ratios.append(counts.sum() / num_maskable)
        chosen = torch.zeros_like(is_masked)
        if config.states == "rollout":
            chosen = rule(output.logits.detach(), positions, is_masked, (*seed_parts, step))
        revealed.append(chosen.sum())
        is_masked = is_masked & ~chosen
    return Unrolled(
        loss=torch.stack(losses).sum(),
        losses=[loss.detach() for loss in losses],
        mask_ratios=ratios,
        num_revealed=revealed,
        row_nll=row_nll,
        row_counts=row_counts,
        aux_losses=auxiliary,
        is_masked=is_masked,
        hidden=hidden,
        gradients=gradients,
    )


def _handed_on(
    channel: RelayChannel, state: RelayState, length: int, watched: GradientShare | None
) -> tuple[torch.Tensor, RelayState]:
    """(state [B, L, D] that the forward left, what the next one gets); the channel keeps nothing of it alive."""
    taken, channel.taken = channel.taken, None
    assert taken is not None
    hidden = taken[:, :length]  # under block diffusion the noised half
    passed = hidden if watched is None else watched.watch(taken, length)
    return hidden, RelayState(passed, torch.ones_like(state.is_set))
