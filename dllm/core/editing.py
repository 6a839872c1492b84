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
from dllm.utils.tokens import token_id

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
    edit_keep_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of the visible response tokens that stay right and are in the loss all the same, in [0, 1): "
            "without any the model learns that whatever it sees is wrong. None: as many as are replaced. 0: none."
        },
    )

    @property
    def keep_share(self) -> float:
        """The share that `edit_keep_ratio` stands for."""
        return min(self.edit_ratio, 1 - self.edit_ratio) if self.edit_keep_ratio is None else self.edit_keep_ratio

    def check_editing(self) -> None:
        """Nothing, if the settings are good.

        Raises:
            InputError: a value out of its range, or one that can have no effect.
        """
        for name in ("edit_ratio", "edit_keep_ratio", "edit_loss_weight"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (int, float)):
                raise InputError(f"{name} must be a number, got {value!r}")
        rules = (
            ("edit_ratio", 0 <= self.edit_ratio < 1, "in [0, 1)"),
            ("edit_keep_ratio", 0 <= self.keep_share < 1, "in [0, 1)"),
            ("edit_loss_weight", 0 < self.edit_loss_weight < float("inf"), "above 0 and finite"),
            ("edit_source", self.edit_source in get_args(EditSource), f"one of {', '.join(get_args(EditSource))}"),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        if self.edit_ratio + self.keep_share > 1:
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


class EditPlanner:
    """Chooses the positions of the editing objective and draws wrong tokens, on the CPU.

    Of the visible maskable positions but padding a share `edit_ratio` (each with this probability) gets a wrong token,
    and a share `keep_share` keeps its own; both join the masked ones in the loss. (Padding is left out because wrong
    tokens in it are easily told: they would flatter the repair rate.)

    Args:
        settings: ratios and source.
        tokenizer: names the special tokens, which are never drawn, mask and padding among them.
        vocab_size: V of the model.

    Raises:
        InputError: see `replacement_ids`; or the tokenizer lacks a mask or pad token.
    """

    def __init__(self, settings: EditSettings, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self.ratio, self.share = settings.edit_ratio, settings.edit_ratio + settings.keep_share
        self.draws = settings.edit_source == "random"
        self.replacements = replacement_ids(tokenizer, vocab_size)
        self.mask_token_id = token_id(tokenizer, "mask_token")
        self.pad_token_id = token_id(tokenizer, "pad_token")

    def __call__(self, batch: dict[str, Any], times: torch.Tensor, generators: Generators) -> dict[str, Any]:
        """What differs in a noised batch under the editing objective:

            noised_ids           int64 [B, L]  with the wrong tokens; with edit_source model, masks where they will be
            loss_positions       int64 [N]     masked, corrupted and kept positions, flat and ascending
            loss_t               float32 [N]   their times (of no meaning where nothing is masked)
            loss_kind            int64 [N]     MASKED, CORRUPTED or KEPT
            corrupted_positions  int64 [M]     flat and ascending

        Args:
            batch: input_ids, noised_ids, maskable and is_masked of a `NoisingCollator`.
            times: time of every position, float32 [B, L].
            generators: the rows' own, by purpose.
        """
        input_ids, is_masked = batch["input_ids"], batch["is_masked"]
        noise = draw_noise(generators("edit"), input_ids.shape[1])  # [B, L]
        open_to_edits = batch["maskable"] & ~is_masked & (input_ids != self.pad_token_id)
        corrupted = open_to_edits & (noise < self.ratio)
        kept = open_to_edits & ~corrupted & (noise < self.share)
        positions = flat_positions(is_masked | corrupted | kept)
        kinds = corrupted * CORRUPTED + kept * KEPT
        wrong = torch.full_like(input_ids, self.mask_token_id)
        if self.draws:
            wrong = draw_wrong_tokens(generators("edit tokens"), input_ids, self.replacements)
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
