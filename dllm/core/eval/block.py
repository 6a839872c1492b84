"""The harness over `BlockSampler`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from dllm.core.eval.config import BaseEvalConfig, argument, check_least
from dllm.core.eval.harness import BaseEvalHarness
from dllm.core.samplers import BaseSamplerConfig, BlockSampler, BlockSamplerConfig
from dllm.core.samplers.block import prefill_columns
from dllm.utils.parsing import InputError


@dataclass
class BlockEvalConfig(BaseEvalConfig):
    """Model arguments of `BlockEvalHarness`; which value counts is decided as in `MDLMEvalConfig`."""

    sampler_class = BlockSampler
    sampler_fields = {
        "steps": "steps_per_block",
        "block_size": "block_size",
        "temperature": "temperature",
        "top_k": "top_k",
        "top_p": "top_p",
        "sub_block_size": "sub_block_size",
        "threshold": "threshold",
        "min_transfer": "min_transfer",
        "editing_threshold": "editing_threshold",
        "max_post_steps": "max_post_steps",
        "use_cache": "use_cache",
        "seed": "seed",
    }

    steps: int | None = argument(
        None, "Steps over which the masks of a block are spread, at least 1. None: one mask per step."
    )
    block_size: int | None = argument(
        None, "Positions of a block, at least 1; also of likelihoods. None: the model's own."
    )
    sub_block_size: int | None = argument(
        None, "Only the earliest sub-block with masks may be filled in; a divisor of the block size. None: no parts."
    )
    top_k: int | None = argument(None, "Draw among this many likeliest tokens; needs a temperature.")
    top_p: float | None = argument(None, "Draw among the likeliest tokens of this share, in (0, 1); likewise.")
    threshold: float | None = argument(None, "Fill in every token surer than this as well, in (0, 1].")
    min_transfer: int | None = argument(None, "Masks that a step fills in at least, at least 1. None: 1.")
    editing_threshold: float | None = argument(
        None, "Tokens of the present block give way to others surer than this, in [0, 1]. None: never."
    )
    max_post_steps: int | None = argument(
        None, "Editing steps after the last mask of a block, at least 0; needs editing_threshold. None: 16."
    )
    use_cache: bool = argument(True, "Keep keys and values of finished blocks; the answers are the same without.")
    cfg: float | None = argument(None, "Accepted at 0, because published scripts pass it: there is no guidance here.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, steps=1)  # the sampler has another name for it
        if self.cfg:
            raise InputError(f"cfg={self.cfg}: decoding block by block has no classifier-free guidance; drop it")
        self.check_sampling()


class BlockEvalHarness(BaseEvalHarness):
    """lm-eval's view of a block-causal LM that `BlockSampler` decodes.

    So LLaDA2.0 and LLaDA2.1; and families with bidirectional attention, where `block_size` (or a preset) says that they
    were trained by block diffusion.

    Raises:
        InputError: such a family without a block size; settings that do not fit the model; a `max_length` beyond the
            model's; and those of `BaseEvalHarness`.
    """

    config_class = BlockEvalConfig
    config: BlockEvalConfig
    sampler: BlockSampler

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        spec, most = self.sampler.spec, self.lm.config.max_position_embeddings
        if spec.attention != "block_causal" and self._settings().block_size is None:
            raise InputError(
                f"{spec.name} attends {spec.attention}: only training by block diffusion makes it decode block by "
                "block; if it was so trained, name its block_size, else use the adapter llada (MDLMEvalHarness)"
            )
        self.sampler.check_fit(self._settings())
        if self.max_length > most:
            raise InputError(f"max_length={self.max_length} exceeds the model's {most} positions: lower it")

    def _settings(self) -> BlockSamplerConfig:
        """The sampler's settings where a request says nothing."""
        config = self.sampler_config({"temperature": 1.0})
        assert isinstance(config, BlockSamplerConfig)
        return config

    def room(self, config: BaseSamplerConfig) -> int:
        """Most tokens of prompt and answer together: whole blocks are decoded, so as many as whole blocks hold.

        Raises:
            InputError: not one block fits.
        """
        assert isinstance(config, BlockSamplerConfig)
        size = self.sampler.block_size(config)
        if size > self.max_length:
            raise InputError(f"max_length={self.max_length} has no room for a block of {size}: raise it")
        return self.max_length // size * size

    def decoding_cost(self, config: BaseSamplerConfig, prompt_length: int) -> tuple[int, int]:
        """(forwards, token-forwards) of decoding a row, both at most.

        With editing a block takes max_post_steps more than `_most_steps`. With the cache the blocks of the prompt are
        computed once, every step computes its own block, and each finished block once more: together with the first
        step of the next one, or with shifted logits by a forward of its own, which fills in the first mask of the next
        one. Without, a forward computes all that it sees.
        """
        assert isinstance(config, BlockSamplerConfig)
        size, shift = self.sampler.block_size(config), self.sampler.spec.logit_shift
        end, first = prompt_length + config.max_new_tokens, prompt_length // size * size
        post_steps = 0 if config.editing_threshold is None else config.max_post_steps
        before = 0
        if config.use_cache:
            before = first - size * (shift and first == prompt_length)  # the last one as a finished block
        forwards, work = -(-before // prefill_columns(size)), before
        for start in range(first, end, size):
            places = range(max(start, prompt_length), start + size)
            leads = bool(shift and start >= prompt_length)
            steps = _most_steps(places[leads:], start, config, size) + post_steps
            restated = size if leads or (start > first and not shift) else 0
            forwards += steps + leads
            work += steps * size + restated if config.use_cache else steps * (start + size) + leads * start
        return forwards, work

    @property
    def scoring_block_size(self) -> int | None:
        """Positions of a block."""
        return self.sampler.block_size(self._settings())


def _most_steps(masks: range, start: int, config: BlockSamplerConfig, size: int) -> int:
    """Steps that the `masks` of a block that begins at `start` take at most: min(steps, ceil(m / min_transfer)) of m
    masks; with sub-blocks one after the other ceil(m / max(min_transfer, share of a step))."""
    wanted = config.steps_per_block or size
    if config.sub_block_size is None:
        return min(wanted, -(-len(masks) // config.min_transfer))
    share = max(config.min_transfer, len(masks) // wanted)
    parts = Counter((place - start) // config.sub_block_size for place in masks)
    return sum(-(-count // share) for count in parts.values())
