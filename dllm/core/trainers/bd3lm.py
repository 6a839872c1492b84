"""BD3LMTrainer: block diffusion on top of the masked-diffusion trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dllm.core.attention import has_two_halves, in_two_halves, two_halves_inputs
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None and (not isinstance(self.block_size, int) or self.block_size < 1):
            raise InputError(f"block_size must be at least 1 and a whole number, got {self.block_size!r}")
        if self.time_per not in ("block", "row"):
            raise InputError(f"time_per is {self.time_per!r}: choose block or row")


class BD3LMTrainer(MDLMTrainer):
    """`MDLMTrainer` for block diffusion (BD3-LM, arXiv 2503.09573, equation 8): a block is denoised given the clean
    blocks before it.

    All blocks are trained at once on the input [x_t ; x_0] under `dllm.core.attention.two_halves_mask`. Blocks are
    counted from a row's first token, prompt included; prompt tokens are never masked. The loss and its normaliser are
    those of `MDLMTrainer`, each masked position with the w(t) of its block. Rows of a single block need no clean half:
    they are full-sequence diffusion. A row's last block may be shorter with a data collator that leaves it so; the
    default one fills it up (`BlockPaddingCollator`). Overrides
        make_padding, make_collator's settings  whole blocks, a time per block
        network_inputs, network_positions       the two halves

    Router losses, where the configuration asks for them, count the tokens of both halves.

    Raises:
        InputError: a family whose logits are shifted; those of `MDLMTrainer`.
    """

    args: BD3LMConfig
    block_size: int

    def make_padding(self, args: BD3LMConfig, tokenizer) -> Callable[[list[Batch]], Batch]:
        """What pads rows if no data collator is given: up to whole blocks."""
        return BlockPaddingCollator(token_id(tokenizer, "pad_token"), block_size_of(self.lm, args.block_size))

    def _noising_settings(self, args: BD3LMConfig, tokenizer, stream: str) -> dict[str, Any]:
        if self.spec.logit_shift:
            raise InputError(
                f"block diffusion needs logits that predict their own position, {self.spec.name} predicts the next "
                "one: use MDLMTrainer"
            )
        self.block_size = block_size_of(self.lm, args.block_size)
        settings = super()._noising_settings(args, tokenizer, stream)
        return {**settings, "block_size": self.block_size, "time_per": args.time_per}

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
