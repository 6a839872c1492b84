"""Editing: visible tokens that are wrong and must be put right (the token-to-token objective of LLaDA2.1, arXiv
2602.08676), beside the masked ones.

Shapes: B rows, L positions, N loss positions of the batch, M wrong tokens among them, V vocabulary, A ids that may
stand in as wrong tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase

from dllm.core.noising import draw_noise, flat_positions
from dllm.utils.parsing import InputError

EditSource = Literal["random", "model"]
MASKED, CORRUPTED, KEPT = 0, 1, 2  # kinds of loss positions

# purpose -> one CPU generator per row
Generators = Callable[[str], Sequence[torch.Generator]]


@dataclass
class EditSettings:
    """Settings of the editing objective; all of them are without effect at `edit_ratio` 0."""

    edit_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Editing: share of the visible response tokens that are replaced by wrong ones and must be "
            "restored, in [0, 1). 0: no editing."
        },
    )
    edit_source: EditSource = field(
        default="random",
        metadata={
            "help": "Where wrong tokens come from: random = the vocabulary; model = what the model itself holds for "
            "likeliest there, the true token aside (one more forward per step, without gradients)."
        },
    )
    edit_loss_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of a replaced or kept position in the loss, above 0; masked ones weigh w(t)."},
    )
    edit_keep_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Share of the visible response tokens that stay right and are in the loss all the same, in [0, 1): "
            "the model learns to leave what is right. 0: none."
        },
    )

    def check_editing(self) -> None:
        """Nothing, if the settings are good.

        Raises:
            InputError: a value out of its range, or one that can have no effect.
        """
        rules = (
            ("edit_ratio", 0 <= self.edit_ratio < 1, "in [0, 1)"),
            ("edit_keep_ratio", 0 <= self.edit_keep_ratio < 1, "in [0, 1)"),
            ("edit_loss_weight", 0 < self.edit_loss_weight < float("inf"), "above 0 and finite"),
            ("edit_source", self.edit_source in get_args(EditSource), f"one of {', '.join(get_args(EditSource))}"),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        if self.edit_ratio + self.edit_keep_ratio > 1:
            raise InputError("edit_ratio and edit_keep_ratio are shares of the same tokens: together at most 1")
        for name in ("edit_source", "edit_loss_weight", "edit_keep_ratio"):
            if self.edit_ratio == 0 and getattr(self, name) != getattr(EditSettings, name):
                raise InputError(f"{name} has no effect without --edit_ratio above 0: drop it")


def replacement_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """The ids that may stand in as wrong tokens, ascending int64 [A]: all of tokenizer and model but special tokens.

    Args:
        tokenizer: names the special tokens, the mask token among them.
        vocab_size: V of the model, which may have fewer or more rows than the tokenizer has tokens.

    Raises:
        InputError: fewer than two are left: there is no wrong token to every true one.
    """
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    allowed = torch.ones(min(len(tokenizer), vocab_size), dtype=torch.bool)
    allowed[[index for index in special if index < len(allowed)]] = False
    ids = flat_positions(allowed)
    if len(ids) < 2:
        raise InputError("editing needs two or more tokens that are not special: use the tokenizer of the model")
    return ids


def draw_wrong_tokens(
    generators: Sequence[torch.Generator], input_ids: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """A token of `allowed` other than the true one for every position, all of them equally likely: int64 [B, L].

    Args:
        generators: one per row; the draws of a row's first positions do not depend on L.
        input_ids: true tokens, int64 [B, L].
        allowed: ascending int64 [A], A at least 2.
    """
    rows = [torch.rand(input_ids.shape[1], generator=g, dtype=torch.float64) for g in generators]
    uniform = torch.stack(rows)  # [B, L]; float64: float32 has too few steps for large vocabularies
    rank = torch.searchsorted(allowed, input_ids).clamp(max=len(allowed) - 1)
    has_rank = allowed[rank] == input_ids  # whether the true token is one of them
    drawn = (uniform * (len(allowed) - has_rank.long())).long()
    return allowed[drawn + (has_rank & (drawn >= rank)).long()]


def plan_edits(
    batch: dict[str, Any],
    times: torch.Tensor,
    settings: EditSettings,
    generators: Generators,
    allowed: torch.Tensor,
    mask_token_id: int,
) -> dict[str, Any]:
    """What differs in a noised batch under the editing objective; made on the CPU.

    Of the visible maskable positions a share `edit_ratio` (each with this probability) gets a wrong token, and a share
    `edit_keep_ratio` keeps its own; both join the masked ones in the loss. The result holds
        noised_ids           int64 [B, L]  with the wrong tokens; with edit_source model, masks where they will stand
        loss_positions       int64 [N]     masked, corrupted and kept positions, flat and ascending
        loss_t               float32 [N]   their times (of no meaning where nothing is masked)
        loss_kind            int64 [N]     MASKED, CORRUPTED or KEPT
        corrupted_positions  int64 [M]     flat and ascending

    Args:
        batch: input_ids, noised_ids, maskable and is_masked of a `NoisingCollator`.
        times: time of every position, float32 [B, L].
        settings: ratios and source.
        generators: the rows' own, by purpose.
        allowed: see `replacement_ids`.
        mask_token_id: id of the mask token.
    """
    input_ids, is_masked = batch["input_ids"], batch["is_masked"]
    noise = draw_noise(generators("edit"), input_ids.shape[1])  # [B, L]
    visible = batch["maskable"] & ~is_masked
    corrupted = visible & (noise < settings.edit_ratio)
    kept = visible & ~corrupted & (noise < settings.edit_ratio + settings.edit_keep_ratio)
    positions = flat_positions(is_masked | corrupted | kept)
    kinds = corrupted * CORRUPTED + kept * KEPT
    wrong = torch.full_like(input_ids, mask_token_id)
    if settings.edit_source == "random":
        wrong = draw_wrong_tokens(generators("edit tokens"), input_ids, allowed)
    return {
        "noised_ids": torch.where(corrupted, wrong, batch["noised_ids"]),
        "loss_positions": positions,
        "loss_t": times.reshape(-1)[positions],
        "loss_kind": kinds.reshape(-1)[positions],
        "corrupted_positions": flat_positions(corrupted),
    }


def likeliest_wrong_tokens(logits: torch.Tensor, targets: torch.Tensor, is_allowed: torch.Tensor) -> torch.Tensor:
    """The likeliest token that may stand in and is not the true one, by `logits` [M, V]: int64 [M].

    Args:
        targets: true tokens, int64 [M].
        is_allowed: bool [V].
    """
    scores = logits.masked_fill(~is_allowed, -torch.inf).scatter(1, targets[:, None], -torch.inf)
    return scores.argmax(dim=-1)
