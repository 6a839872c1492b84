"""The collator of memory training: the outer noised batch plus the inner trajectory of every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dllm.core.noising import draw_noise, flat_positions
from dllm.data.collators import Batch, NoisingCollator
from memdlm.memory.config import MemoryConfig
from memdlm.memory.inner_loop import InnerStep
from memdlm.memory.trajectory import TRAJECTORIES, loss_mask


class MemoryCollator(NoisingCollator):
    """A `NoisingCollator` whose batch also holds `memory_steps`: one dict of `InnerStep` fields per state of the
    trajectory.

    The outer draws are those of `NoisingCollator` to the bit; the trajectory draws from generators of its own.

    Args:
        pad: see `NoisingCollator`.
        config: trajectory, number of steps and loss-mask mode.
        settings: the other arguments of `NoisingCollator`.
    """

    def __init__(self, pad, *, config: MemoryConfig, **settings: Any) -> None:
        super().__init__(pad, **settings)
        self.config = config

    def __call__(self, rows: Sequence[Batch]) -> Batch:
        batch = super().__call__(rows)
        generators = self.row_generators(batch["example_id"], "trajectory")
        states = TRAJECTORIES[self.config.masking_strategy](
            batch["input_ids"],
            batch["maskable"],
            batch["is_masked"],
            noise=draw_noise(generators, batch["input_ids"].shape[1]),
            mask_token_id=self.mask_token_id,
            config=self.config,
        )
        batch["memory_steps"] = [
            {
                "loss_positions": flat_positions(loss_mask(state, self.config.inner_loss_mask_mode)),
                "t": state.t,
                "noised_ids": state.noised_ids,
                "is_anchor": state.is_anchor,
            }
            for state in states
        ]
        return batch


def inner_steps(batch: Batch) -> list[InnerStep]:
    """The trajectory of a `MemoryCollator` batch, wherever its tensors have been moved."""
    return [InnerStep(**step) for step in batch["memory_steps"]]
