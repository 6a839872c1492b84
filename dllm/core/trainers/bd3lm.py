"""BD3LMTrainer: block diffusion on top of the masked-diffusion trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dllm.core.attention import has_two_halves, in_two_halves, two_halves_inputs
from dllm.core.losses import NormType
from dllm.core.trainers.mdlm import MDLMConfig, MDLMTrainer
from dllm.data.collators import Batch, BlockPaddingCollator, TimePer
from dllm.models.spec import block_size_of
from dllm.utils.parsing import InputError
from dllm.utils.tokens import token_id


@dataclass
class BD3LMConfig(MDLMConfig):
    """Settings of the block-diffusion objective, on top of those of the masked-diffusion one."""

    block_size: int | None = field(
        default=None,
        metadata={"help": "Positions of a block, at least 1. None: the checkpoint's or the family's own, or 32."},
    )
    time_per: TimePer = field(
        default="block",
        metadata={"help": "Draw one diffusion time per block (the lower variance) or one per row (as LLaDA2 does)."},
    )
    train_on_fill: bool = field(
        default=True,
        metadata={
            "help": "Train on the end-of-text tokens that fill up a row's last block. False: they are never masked, as "
            "in the published runs of Fast-dLLM v2 and Relay."
        },
    )
    complementary_masks: bool = field(
        default=False,
        metadata={
            "help": "Train on each row twice in one step, with its masks and with their complement, so that every "
            "response token is masked exactly once (Fast-dLLM v2). Needs --loss_weight_type uniform; doubles the batch."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None and (not isinstance(self.block_size, int) or self.block_size < 1):
            raise InputError(f"block_size must be at least 1 and a whole number, got {self.block_size!r}")
        if self.time_per not in ("block", "row"):
            raise InputError(f"time_per is {self.time_per!r}: choose block or row")
        if not self.complementary_masks:
            return
        if self.loss_weight_type != "uniform":
            raise InputError(
                "complementary_masks asks for every token once, whereas w(t) weighs them unevenly: add "
                "--loss_weight_type uniform"
            )
        if self.edit_ratio:
            raise InputError("complementary_masks and edit_ratio exclude each other: drop one")


class BD3LMTrainer(MDLMTrainer):
    """`MDLMTrainer` for block diffusion (BD3-LM, arXiv 2503.09573, equation 8): a block is denoised given the clean
    blocks before it.

    All blocks are trained at once on the input [x_t ; x_0] under `dllm.core.attention.two_halves_mask`. Blocks are
    counted from a row's first token, prompt included; prompt tokens are never masked. The loss and its normaliser are
    those of `MDLMTrainer`, each masked position with the w(t) of its block. Rows of a single block need no clean half:
    they are full-sequence diffusion. A row's last block may be shorter with a data collator that leaves it so; the
    default one fills it up (`BlockPaddingCollator`).

    In a family with a logit shift, position p is predicted by the logit at p - 1 of the noised half: for the first
    position of a block that of the block before it (Fast-dLLM v2, arXiv 2509.26328).

    With `complementary_masks` a batch of B rows goes through the network as 2B, the second B masked where the first are
    visible; the loss is the sum over both, divided as that of B rows: with loss_norm_type token the mean over all
    maskable tokens. The likelihood of an evaluation is estimated from the first B alone.

    Overrides
        make_padding, make_collator's settings  whole blocks, a time per block, complements
        network_inputs, network_positions       the two halves
        forward_loss_positions                  the complements below the rows
        weighted_loss, row_nll                  what they count for

    Router losses, where the configuration asks for them, count the tokens of both halves.

    Raises:
        InputError: those of `MDLMTrainer`; a data collator together with train_on_fill False, which is for the default
            one.
    """

    takes_packed_rows = False

    args: BD3LMConfig
    block_size: int

    def __init__(self, model=None, args: BD3LMConfig | None = None, data_collator=None, **kwargs: Any) -> None:
        if data_collator is not None and args is not None and not args.train_on_fill:
            raise InputError("train_on_fill has no effect on a data collator of your own: drop one of the two")
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)

    def make_padding(self, args: BD3LMConfig, tokenizer) -> Callable[[list[Batch]], Batch]:
        """What pads rows if no data collator is given: up to whole blocks."""
        size = block_size_of(self.lm, args.block_size)
        return BlockPaddingCollator(token_id(tokenizer, "pad_token"), size, args.train_on_fill)

    def _noising_settings(self, args: BD3LMConfig, tokenizer, stream: str) -> dict[str, Any]:
        self.block_size = block_size_of(self.lm, args.block_size)
        settings = super()._noising_settings(args, tokenizer, stream)
        blocks = {"block_size": self.block_size, "time_per": args.time_per}
        return {**settings, **blocks, "complementary": args.complementary_masks}

    def network_inputs(self, inputs: Batch) -> dict[str, Any]:
        """[x_t ; x_0] with its mask and positions; x_t alone for rows of a single block."""
        noised_ids, padding = inputs["noised_ids"], inputs.get("attention_mask")
        length = noised_ids.shape[1]
        if not has_two_halves(length, self.block_size):
            return super().network_inputs(inputs)
        implementation = self.lm.config._attn_implementation
        layout = two_halves_inputs(implementation, length, self.block_size, padding, noised_ids.device)
        return {"input_ids": torch.cat([noised_ids, inputs["input_ids"]], dim=1), **layout}

    def network_positions(self, inputs: Batch, positions: torch.Tensor) -> torch.Tensor:
        """The places of flat `positions` into [B * L] in the noised half of [B * 2L]."""
        length = inputs["noised_ids"].shape[1]
        return in_two_halves(positions, length) if has_two_halves(length, self.block_size) else positions

    def forward_loss_positions(self, model, inputs: Batch):
        """As in `MDLMTrainer`; with complements the logits of their loss positions come behind those of the rows."""
        return super().forward_loss_positions(model, _with_complements(inputs))

    def weighted_loss(self, logits: torch.Tensor, inputs: Batch, norm_type: NormType) -> torch.Tensor:
        """As in `MDLMTrainer`; a position of a complement counts for its row."""
        if "complement" in inputs:
            merged = {
                name: torch.cat([inputs[name], inputs["complement"][name]]) for name in ("loss_positions", "loss_t")
            }
            inputs = {**inputs, **merged}
        return super().weighted_loss(logits, inputs, norm_type)

    def row_nll(self, logits: torch.Tensor, inputs: Batch) -> torch.Tensor:
        """As in `MDLMTrainer`, without complements: no schedule draws their masks."""
        return super().row_nll(logits[: len(inputs["loss_positions"])], inputs)


def _with_complements(inputs: Batch) -> Batch:
    """The batch with its complements as B further rows, for the network; itself if it has none."""
    if "complement" not in inputs:
        return inputs
    complement, num_places = inputs["complement"], inputs["input_ids"].numel()
    twice = {name: torch.cat([inputs[name]] * 2) for name in ("input_ids", "attention_mask") if name in inputs}
    return {
        **inputs,
        **twice,
        "noised_ids": torch.cat([inputs["noised_ids"], complement["noised_ids"]]),
        "loss_positions": torch.cat([inputs["loss_positions"], complement["loss_positions"] + num_places]),
    }
