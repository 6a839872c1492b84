"""MDLMSampler: commit the surest tokens of the masked positions, block by block and step by step (arXiv 2502.09992,
algorithms 4 and 5).

Shapes: B rows, L columns, V vocabulary, n candidates of a row (masked positions of the present block), W window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from dllm.core.reveal import (
    Remasking,
    choose_above,
    choose_positions,
    choose_within,
    get_num_transfer_tokens,
    mix_keys,
    propose,
)
from dllm.core.samplers.base import BaseSampler, BaseSamplerConfig, BaseSamplerOutput, Observer, Prompt, Visit
from dllm.core.samplers.cache import CacheKind, WindowCache
from dllm.utils.parsing import InputError


@dataclass
class MDLMSamplerConfig(BaseSamplerConfig):
    """Settings of `MDLMSampler`.

    Raises:
        InputError: a value out of its range, or a pair that cannot take effect together.
    """

    remasking: Remasking = "low_confidence"  # which proposals are committed first (see dllm.core.reveal.confidence)
    threshold: float | None = None  # in (0, 1]: a step also commits whatever is surer than this; None: only its share
    max_uncertainty: float | None = None  # above 0: a step also commits the surest while their 1 - p add up to less
    cfg_scale: float = 0.0  # classifier-free guidance, at least 0: logits u + (1 + scale) (c - u); 0 turns it off
    cache: CacheKind = "none"  # approximate reuse of keys and values (see dllm.core.samplers.cache)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("remasking", get_args(Remasking)), ("cache", get_args(CacheKind))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if not 0 <= self.cfg_scale < math.inf:
            raise InputError(f"cfg_scale must be at least 0 and finite, got {self.cfg_scale}")
        if self.threshold is not None:
            self._check_threshold()
        if self.max_uncertainty is not None:
            self._check_max_uncertainty()

    def _check_threshold(self) -> None:
        assert self.threshold is not None
        if not 0 < self.threshold <= 1:
            raise InputError(f"threshold must be in (0, 1], got {self.threshold}")
        if self.remasking not in ("low_confidence", "margin"):
            raise InputError(
                f"threshold compares probabilities, remasking={self.remasking} has none: use low_confidence or margin"
            )

    def _check_max_uncertainty(self) -> None:
        assert self.max_uncertainty is not None
        if not 0 < self.max_uncertainty < math.inf:
            raise InputError(f"max_uncertainty must be above 0 and finite, got {self.max_uncertainty}")
        if self.threshold is not None:
            raise InputError("max_uncertainty and threshold are two rules for the same choice: give one of them")
        if self.remasking != "low_confidence":
            raise InputError(
                f"max_uncertainty adds up 1 - p(token), remasking={self.remasking} has none: use low_confidence"
            )


# Published settings by name; every other field has its default.
MDLM_PRESETS: dict[str, dict[str, Any]] = {
    # LLaDA's own sampling script: one pass over the whole answer.
    "llada": {"max_new_tokens": 128, "steps": 128, "block_size": 128},
    # Its chat script, and the model card of LLaDA-MoE.
    "llada_chat": {"max_new_tokens": 128, "steps": 128, "block_size": 32},
    # Its evaluation of the base model.
    "llada_eval": {"max_new_tokens": 1024, "steps": 1024, "block_size": 1024},
    # Fast-dLLM, parallel decoding with dual cache.
    "fast_dllm": {"max_new_tokens": 256, "block_size": 32, "threshold": 0.9, "cache": "dual"},
}


@dataclass
class _Canvas:
    """What is being filled in, on the model's device."""

    ids: torch.Tensor  # [B, L] int64
    is_masked: torch.Tensor  # [B, L] bool, positions still to be filled in
    attention_mask: torch.Tensor | None  # [B, L]
    position_ids: torch.Tensor | None  # [B, L]; None: the column
    blocks: list[tuple[int, int]]  # columns [start, end) of every block
    num_masked: torch.Tensor  # [B, number of blocks] int64 on the CPU, masks at the beginning
    to_output: torch.Tensor | None  # [B, L] column of each output column; None: the same
    keys: torch.Tensor | None  # [B] int64, seeds of the rows' draws; None: nothing is drawn
    first_new: int | None  # first column of the answers; None: `infill`


class MDLMSampler(BaseSampler):
    """Decodes with a bidirectional model; the head runs only on the masked positions of the present block.

    Every block gets an equal share of `steps`. A step proposes a token for each masked position of the block and
    commits the ceil or floor of (masks / steps of the block) surest ones of each row (`get_num_transfer_tokens`), with
    `threshold` also all others that are surer than that, with `max_uncertainty` also as many of the surest as
    `dllm.core.reveal.choose_within` says. Where rows can be done early (these two, early_stop), the host looks once per
    step how many candidates are left; otherwise it waits for nothing.
    """

    config_class = MDLMSamplerConfig
    presets = MDLM_PRESETS

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        config: BaseSamplerConfig | None = None,
        *,
        seeds: Sequence[int] | None = None,
        on_step: Observer | None = None,
    ) -> BaseSamplerOutput:
        """See `BaseSampler.sample`. Shorter prompts are padded on the left, out of the others' sight."""
        settings = self._settings(config)
        rows = self.token_lists(prompts)
        self.check_seeds(seeds, len(rows))
        self.check_room(max(map(len, rows)) + settings.max_new_tokens, "prompt and answer")
        canvas = self._prompts_and_masks(rows, settings, seeds)
        return self._denoise(canvas, settings, on_step)

    @torch.no_grad()
    def infill(
        self,
        noised_ids: torch.Tensor,
        config: BaseSamplerConfig | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        seeds: Sequence[int] | None = None,
        on_step: Observer | None = None,
    ) -> BaseSamplerOutput:
        """See `BaseSampler.infill`."""
        settings = self._settings(config)
        ids, real, is_masked = self.checked_infill(noised_ids, attention_mask, settings)
        self.check_seeds(seeds, len(ids))
        blocks = _blocks(0, ids.shape[1], settings.block_size)
        canvas = _Canvas(
            ids=ids.clone(),
            is_masked=is_masked,
            attention_mask=None if attention_mask is None else real.long(),
            position_ids=None,
            blocks=blocks,
            num_masked=torch.stack([is_masked[:, start:end].sum(dim=1) for start, end in blocks], dim=1).cpu(),
            to_output=None,
            keys=self._keys(settings, seeds, lambda: [row[seen].tolist() for row, seen in zip(ids, real, strict=True)]),
            first_new=None,
        )
        return self._denoise(canvas, settings, on_step)

    def _settings(self, config: BaseSamplerConfig | None) -> MDLMSamplerConfig:
        settings = self.checked_config(config)
        assert isinstance(settings, MDLMSamplerConfig)
        return settings

    def _prompts_and_masks(
        self, rows: list[list[int]], settings: MDLMSamplerConfig, seeds: Sequence[int] | None
    ) -> _Canvas:
        """The prompts, right-aligned, and `max_new_tokens` masks behind them."""
        longest, new = max(map(len, rows)), settings.max_new_tokens
        length, padding = longest + new, torch.tensor([longest - len(row) for row in rows])[:, None]  # [B, 1]
        ids = torch.tensor(
            [[self.pad_token_id] * (longest - len(row)) + row + [self.mask_token_id] * new for row in rows]
        )
        columns = torch.arange(length)[None]  # [1, L]
        blocks = _blocks(longest, length, settings.block_size)
        widths = torch.tensor([end - start for start, end in blocks])
        padded = bool(padding.any())
        device = self.lm.backbone.device
        return _Canvas(
            ids=ids.to(device),
            is_masked=(columns >= longest).expand_as(ids).to(device, copy=True),
            attention_mask=(columns >= padding).long().to(device) if padded else None,
            position_ids=(columns - padding).clamp(min=0).to(device) if padded else None,
            blocks=blocks,
            num_masked=widths.expand(len(rows), -1),
            to_output=((columns + padding) % length).to(device) if padded else None,
            keys=self._keys(settings, seeds, lambda: rows),
            first_new=longest,
        )

    def _keys(
        self, settings: MDLMSamplerConfig, seeds: Sequence[int] | None, rows: Callable[[], list[list[int]]]
    ) -> torch.Tensor | None:
        if settings.temperature == 0 and settings.remasking != "random":
            return None
        return self.row_keys(settings.seed, seeds, rows())

    def _denoise(self, canvas: _Canvas, settings: MDLMSamplerConfig, on_step: Observer | None) -> BaseSamplerOutput:
        steps = _steps_per_block(canvas.num_masked, settings.steps)  # [B, number of blocks]
        given = ~canvas.is_masked
        self.begin(*canvas.ids.shape)
        nfe = torch.zeros(len(canvas.ids), dtype=torch.int64, device=canvas.ids.device)
        batch_forwards = torch.zeros_like(nfe[0])
        histories: list[torch.Tensor] | None = [] if settings.histories else None
        for block in range(len(canvas.blocks)):
            for needed in self._fill_block(canvas, block, steps[:, block], given, settings):
                nfe += needed
                batch_forwards += needed.max()
                if on_step is not None or histories is not None:
                    state = _laid_out(canvas.ids, canvas.to_output)
                    if histories is not None:
                        histories.append(state)
                    if on_step is not None:
                        on_step(state)
        num_committed = canvas.num_masked.sum(dim=1).to(nfe.device)
        answers = None
        if canvas.first_new is not None:
            answers = canvas.ids[:, canvas.first_new :]
            if settings.early_stop:
                behind = self.behind_the_end(answers)
                answers.masked_fill_(behind, self.pad_token_id)  # a view of canvas.ids
                num_committed = (~behind).sum(dim=1)
            answers = answers.clone()
        return BaseSamplerOutput(
            sequences=_laid_out(canvas.ids, canvas.to_output),
            answers=answers,
            nfe=nfe,
            cache_forwards=torch.zeros_like(nfe),  # the forward that fills a cache commits tokens as well
            batch_forwards=batch_forwards,
            num_committed=num_committed,
            histories=histories,
        )

    def _fill_block(
        self, canvas: _Canvas, block: int, steps: torch.Tensor, given: torch.Tensor, settings: MDLMSamplerConfig
    ) -> Iterator[torch.Tensor]:
        """Fills in one block of `canvas`; yields after every step how many forwards each row needed, [B]."""
        start, end = canvas.blocks[block]
        schedule = get_num_transfer_tokens(canvas.num_masked[:, block], steps)  # [B, S]
        left = (canvas.num_masked[:, block, None] - schedule.cumsum(dim=1) + schedule).amax(dim=0).tolist()
        schedule = schedule.to(canvas.ids.device)
        passes = self._passes(canvas, start, end, settings)
        banned = self.banned(settings)
        may_end_early = settings.early_stop or settings.threshold is not None or settings.max_uncertainty is not None
        for step, scheduled in enumerate(left):
            masked = canvas.is_masked[:, start:end]
            n = int(masked.sum(dim=1).max()) if may_end_early else scheduled
            if n == 0:
                return
            order = (~masked).to(torch.uint8).argsort(dim=1, stable=True)[:, :n]  # masked positions come first
            columns = start + order  # [B, n]
            candidates = masked.gather(1, order)  # [B, n], False where a row has fewer than n
            active = candidates.any(dim=1)
            logits = self._guided(passes, canvas, columns, active, given, settings.cfg_scale)
            keys = None if canvas.keys is None else _position_keys(canvas, columns, step)
            tokens, scores = propose(logits, settings.remasking, settings.temperature, keys, banned)
            tokens, scores = tokens.view_as(columns), scores.view_as(columns)
            chosen = choose_positions(scores, candidates, schedule[:, step])
            if settings.threshold is not None:
                chosen = chosen | choose_above(scores, candidates, settings.threshold)
            if settings.max_uncertainty is not None:
                chosen = chosen | choose_within(scores, candidates, settings.max_uncertainty)
            canvas.ids.scatter_(1, columns, torch.where(chosen, tokens, canvas.ids.gather(1, columns)))
            canvas.is_masked.scatter_(1, columns, candidates & ~chosen)
            if settings.early_stop:
                self._end_rows(canvas)
            yield active * len(passes)

    def _passes(self, canvas: _Canvas, start: int, end: int, settings: MDLMSamplerConfig) -> list[_Pass]:
        """The forwards of a step: one, and with guidance a second that does not see the given tokens."""
        count = 2 if settings.cfg_scale > 0 else 1
        length = canvas.ids.shape[1]
        if settings.cache == "none":
            return [_Pass(index, None, start, (0, length)) for index in range(count)]
        # A shifted model predicts the first token of the block one column before it.
        window = (max(0, start - self.spec.logit_shift), length if settings.cache == "prefix" else end)
        num_layers = len(self.lm.backbone.layers)
        return [_Pass(index, WindowCache(num_layers, *window), start, window) for index in range(count)]

    def _guided(
        self,
        passes: list[_Pass],
        canvas: _Canvas,
        columns: torch.Tensor,
        active: torch.Tensor,
        given: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Logits [B * n, V] that predict the tokens at `columns` [B, n]."""
        conditional = self._logits(passes[0], canvas, canvas.ids, columns, active)
        if len(passes) == 1:
            return conditional
        blank = torch.where(given, self.mask_token_id, canvas.ids)
        unconditional = self._logits(passes[1], canvas, blank, columns, active)
        return unconditional + (1 + scale) * (conditional - unconditional)

    def _logits(
        self, which: _Pass, canvas: _Canvas, ids: torch.Tensor, columns: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        cache, length = which.cache, ids.shape[1]
        # The first forward of a block sees all columns and fills the cache.
        fills = cache is not None and cache.get_seq_length() == 0
        low, high = (0, length) if cache is None or fills else which.window
        seen = torch.arange(low, high, device=ids.device)[None]  # [1, W]
        visit = Visit(
            columns=seen.expand(len(ids), -1),
            active=active,
            start=torch.full_like(active, which.start, dtype=torch.int64),
            width=length,
            settled=(seen < which.window[0]) | (seen >= which.window[1]) if fills else None,
            pass_index=which.index,
        )
        position_ids = canvas.position_ids
        if position_ids is None and cache is not None:
            position_ids = torch.arange(length, device=ids.device)[None]
        rows = torch.arange(len(ids), device=ids.device)[:, None] * (high - low)  # [B, 1]
        output = self.run_model(
            visit,
            input_ids=ids[:, low:high],
            attention_mask=canvas.attention_mask,
            position_ids=None if position_ids is None else position_ids[:, low:high],
            past_key_values=cache,
            logit_positions=(rows + columns - low - self.spec.logit_shift).flatten(),
        )
        assert output.logits is not None
        return output.logits

    def _end_rows(self, canvas: _Canvas) -> None:
        """Rows whose answers are complete are done: nothing of them is masked any more."""
        assert canvas.first_new is not None
        canvas.is_masked &= ~self.is_complete(canvas.ids, canvas.is_masked, canvas.first_new)[:, None]


@dataclass
class _Pass:
    """One of the forwards of a step.

    index: which one, 0 or 1.
    cache: keys and values of the block's first forward, or None.
    start: first column of the block.
    window: columns that later forwards compute anew.
    """

    index: int
    cache: WindowCache | None
    start: int
    window: tuple[int, int]


def _blocks(start: int, end: int, block_size: int | None) -> list[tuple[int, int]]:
    """[start, end) cut into blocks; the last one may be shorter."""
    size = block_size or max(1, end - start)
    return [(low, min(low + size, end)) for low in range(start, end, size)]


def _steps_per_block(num_masked: torch.Tensor, steps: int | None) -> torch.Tensor:
    """How many steps each row takes for each block, int64 [B, K], at least 1: as many as it has masks there, or an
    equal share of `steps` (earlier blocks take the remainder) if that is less.

    Raises:
        InputError: fewer steps than blocks with masks.
    """
    if steps is None:
        return num_masked.clamp(min=1)
    filled = num_masked > 0  # [B, K]
    count = filled.sum(dim=1, keepdim=True)  # [B, 1]
    if steps < int(count.max()):
        raise InputError(
            f"steps={steps} is less than the {int(count.max())} blocks: give more steps, or a larger block_size"
        )
    rank = filled.cumsum(dim=1) - 1
    share = steps // count.clamp(min=1) + (rank < steps % count.clamp(min=1))
    return torch.minimum(share, num_masked).clamp(min=1)


def _position_keys(canvas: _Canvas, columns: torch.Tensor, step: int) -> torch.Tensor:
    """Keys of the draws at `columns` [B, n] in this step of their block, int64 [B * n]; padding before a row does not
    change them."""
    assert canvas.keys is not None
    places = columns if canvas.position_ids is None else canvas.position_ids.gather(1, columns)
    return mix_keys(mix_keys(canvas.keys, step)[:, None], places).flatten()


def _laid_out(ids: torch.Tensor, to_output: torch.Tensor | None) -> torch.Tensor:
    """The state in the order of the output, a copy."""
    return ids.clone() if to_output is None else ids.gather(1, to_output)
