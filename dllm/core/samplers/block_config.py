"""Settings of BlockSampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dllm.core.samplers.base import BaseSamplerConfig, check_count
from dllm.utils.parsing import InputError


@dataclass
class BlockSamplerConfig(BaseSamplerConfig):
    """Settings of `BlockSampler`; `block_size` None is the model's own (or 32), `steps` must stay None.

    Raises:
        InputError: a value out of its range, or a pair that cannot take effect together.
    """

    # Only the earliest sub-block of this many positions that has masks may be filled in; a divisor of the block size.
    # A step fills in one at most: min_transfer must not be larger, steps_per_block not less than the sub-blocks.
    sub_block_size: int | None = None  # None: the whole block
    steps_per_block: int | None = None  # a block's masks are spread over this many steps; None: one mask per step
    min_transfer: int = 1  # masks that a step fills in at least, at least 1
    threshold: float | None = None  # in (0, 1]: a step also fills in whatever is surer than this
    top_k: int | None = None  # draw among this many likeliest tokens, at least 1; needs a temperature
    top_p: float | None = None  # draw among the likeliest tokens that hold this share, in (0, 1); needs a temperature
    editing_threshold: float | None = None  # in [0, 1]: tokens give way to others surer than this; None: never
    max_post_steps: int = 16  # steps after the last mask of a block, at least 0; needs editing_threshold
    use_cache: bool = True  # keep keys and values of finished blocks; False computes all of them in every step

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None:
            raise InputError("steps has no effect on block decoding: give steps_per_block")
        for name in ("sub_block_size", "steps_per_block", "top_k"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_count("min_transfer", self.min_transfer)
        check_count("max_post_steps", self.max_post_steps, least=0)
        rules = (
            ("threshold", self.threshold is None or 0 < self.threshold <= 1, "in (0, 1]"),
            ("top_p", self.top_p is None or 0 < self.top_p < 1, "in (0, 1)"),
            ("editing_threshold", self.editing_threshold is None or 0 <= self.editing_threshold <= 1, "in [0, 1]"),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise InputError("top_k and top_p have no effect at temperature 0: drop them or raise the temperature")
        if self.editing_threshold is None and self.max_post_steps != type(self).max_post_steps:
            raise InputError("max_post_steps has no effect without editing_threshold: drop it")
        if self.block_size is not None:
            self.check_parts(self.block_size)

    def check_parts(self, block_size: int) -> None:
        """Nothing, if the sub-blocks fit into blocks of this size and the other settings act on them.

        Raises:
            InputError: they do not divide the block; a step would fill in more than a sub-block.
        """
        part = self.sub_block_size
        if part is None:
            return
        if block_size % part:
            raise InputError(f"sub_block_size={part} does not divide block_size={block_size}: choose a divisor")
        if self.min_transfer > part:
            raise InputError(
                f"min_transfer={self.min_transfer} has no effect beyond sub_block_size={part}, which a step stays in: "
                "lower it or drop sub_block_size"
            )
        if self.steps_per_block is not None and self.steps_per_block < block_size // part:
            raise InputError(
                f"steps_per_block={self.steps_per_block} cannot be kept with sub_block_size={part}: a step stays in "
                f"one of {block_size // part} sub-blocks; give at least as many steps or drop sub_block_size"
            )


# Published settings by name; every other field has its default.
BLOCK_PRESETS: dict[str, dict[str, Any]] = {
    # The two modes that the model card of LLaDA2.1 recommends.
    "quality": {"block_size": 32, "threshold": 0.7, "editing_threshold": 0.5, "max_post_steps": 16},
    "speed": {"block_size": 32, "threshold": 0.5, "editing_threshold": 0.0, "max_post_steps": 16},
    # Stock decoding of Fast-dLLM v2.
    "fast_dllm_v2": {"block_size": 32, "sub_block_size": 8, "threshold": 0.9},
    # Of the same model with a relay, and of those that it is compared with (arXiv 2605.22967).
    "relay": {"block_size": 32, "sub_block_size": 8, "threshold": 0.85},
}
