"""The collator of memory training: the outer noised batch plus the inner loop's plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dllm.core.attention import has_two_halves
from dllm.core.noising import derive_seed
from dllm.data.collators import Batch, NoisingCollator, is_inside
from dllm.utils.parsing import InputError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.plan import PLANS, InnerPlan, Rows


def refuse_packing(config: MemoryConfig) -> None:
    """Nothing, if a memory with these settings can be written from packed rows.

    Raises:
        InputError: one memory per row, which packed documents would share, or settings of padding.
    """
    if config.scope == "row":
        raise InputError("mem_scope=row and packing exclude each other (documents share a row): use mem_scope=batch")
    if config.pad_unmask_mode != "none":
        raise InputError("mem_pad_unmask_mode has no effect with packing, which has no padding: drop one of them")


class MemoryCollator(NoisingCollator):
    """A `NoisingCollator` whose batch also holds `memory_plan`: an `InnerPlan` as nested dicts.

    The outer draws are those of `NoisingCollator` to the bit; the plan draws from generators of its own. Under block
    diffusion the states have the clean half behind them. Wrong tokens of the editing objective stand in none of them.

    Args:
        pad: see `NoisingCollator`.
        config: inner target, trajectory, number of steps, loss-mask mode, padding.
        settings: the other arguments of `NoisingCollator`.

    Raises:
        InputError: `pad` does not pad on the right, where a setting must know what is padding.
    """

    def __init__(self, pad, *, config: MemoryConfig, **settings: Any) -> None:
        super().__init__(pad, **settings)
        self.config = config

    def find_maskable(self, rows: Sequence[Batch], padded: Batch) -> torch.Tensor:
        """As in `NoisingCollator`, less the padding with `pad_unmask_mode` both."""
        maskable = super().find_maskable(rows, padded)
        return maskable & ~self._find_padding(rows, padded) if self.config.pad_unmask_mode == "both" else maskable

    def check_packing(self) -> None:
        """As in `NoisingCollator`.

        Raises:
            InputError: also for one memory per row, which packed documents would share, and for settings of padding.
        """
        super().check_packing()
        refuse_packing(self.config)

    def collate(self, rows: Sequence[Batch], packed: bool = False) -> Batch:
        """As in `NoisingCollator`, with `memory_plan`."""
        batch = super().collate(rows, packed)
        example_id, input_ids = batch["example_id"], batch["input_ids"]
        is_corrupted, is_asked = torch.zeros_like(batch["is_masked"]), batch["is_masked"].clone()
        if "edit" in batch:
            is_corrupted.view(-1)[batch["edit"]["corrupted_positions"]] = True
            is_asked.view(-1)[batch["edit"]["loss_positions"]] = True
        plan = make_plan(
            Rows(
                input_ids=input_ids,
                maskable=batch["maskable"],
                is_masked=batch["is_masked"],
                noised_ids=batch["noised_ids"],
                is_corrupted=is_corrupted,
                is_asked=is_asked,
                t=batch["t"],
                is_padding=self._find_padding(rows, batch),
                attention_mask=batch.get("attention_mask"),
                row_seeds=[derive_seed(self.stream, self.epoch, int(example)) for example in example_id],
                generators=lambda purpose: self.row_generators(example_id, purpose),
                mask_token_id=self.mask_token_id,
                logit_shift=self.logit_shift,
            ),
            self.config,
            self.block_size,
        )
        return {**batch, "memory_plan": plan.as_batch()}

    def _find_padding(self, rows: Sequence[Batch], padded: Batch) -> torch.Tensor:
        """What `pad` added behind each row, bool [B, L]; found by place: a row may end with the pad token itself."""
        ids = padded["input_ids"]
        if self.config.pad_unmask_mode == "none" and self.config.inner_target != "prompt":
            return torch.zeros_like(ids, dtype=torch.bool)
        return ~is_inside(rows, ids)


def make_plan(rows: Rows, config: MemoryConfig, block_size: int | None) -> InnerPlan:
    """The plan that `config.inner_target` asks for, on the CPU; under block diffusion with the clean half behind its
    states.

    Args:
        rows: what it is made from.
        config: see `MemoryCollator`.
        block_size: positions of a block; None: no block diffusion.
    """
    plan = PLANS[config.inner_target](rows, config)
    if block_size is not None and has_two_halves(rows.input_ids.shape[1], block_size):
        plan = plan.with_clean_half(rows.input_ids, block_size)
    return plan


def inner_plan(batch: Batch) -> InnerPlan:
    """The plan of a `MemoryCollator` batch, wherever its tensors have been moved; of packed rows with their layout."""
    plan = InnerPlan.from_batch(batch["memory_plan"])
    # Prompts alone are rows of their own.
    return plan if plan.apart else replace(plan, packing=batch.get("packing"))
