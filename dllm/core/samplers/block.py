"""BlockSampler: decode block by block with a block-causal model, an exact KV cache and token editing (LLaDA2.0, arXiv
2512.15745; LLaDA2.1, arXiv 2602.08676).

A position sees its own block and the blocks before it. So the keys and values of a block are final as soon as its
tokens are: they are computed once more with the final tokens (together with the next block's first step, where the last
step changed anything) and then only read. Blocks are counted from a row's first token; every row goes at its own pace.
Shapes: B rows, L columns (a row's tokens begin in column 0), s block size, W window of a forward, n candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dllm.core.reveal import choose_above, choose_positions, get_num_transfer_tokens, mix_keys, propose
from dllm.core.samplers.base import BaseSampler, BaseSamplerConfig, BaseSamplerOutput, Observer, Prompt, Visit
from dllm.core.samplers.cache import RowCache
from dllm.utils.parsing import InputError

DEFAULT_BLOCK_SIZE = 32  # for families that name none
PREFILL_COLUMNS = 1024  # of one forward that fills the cache


@dataclass
class BlockSamplerConfig(BaseSamplerConfig):
    """Settings of `BlockSampler`; `block_size` None is the family's own (or 32), `steps` must stay None.

    Raises:
        InputError: a value out of its range, or a pair that cannot take effect together.
    """

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
        rules = (
            ("steps_per_block", self.steps_per_block is None or self.steps_per_block >= 1, "at least 1"),
            ("min_transfer", self.min_transfer >= 1, "at least 1"),
            ("threshold", self.threshold is None or 0 < self.threshold <= 1, "in (0, 1]"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p < 1, "in (0, 1)"),
            ("editing_threshold", self.editing_threshold is None or 0 <= self.editing_threshold <= 1, "in [0, 1]"),
            ("max_post_steps", self.max_post_steps >= 0, "at least 0"),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise InputError("top_k and top_p have no effect at temperature 0: drop them or raise the temperature")
        if self.editing_threshold is None and self.max_post_steps != type(self).max_post_steps:
            raise InputError("max_post_steps has no effect without editing_threshold: drop it")


# The two modes that the model card of LLaDA2.1 recommends.
BLOCK_PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"block_size": 32, "threshold": 0.7, "editing_threshold": 0.5, "max_post_steps": 16},
    "speed": {"block_size": 32, "threshold": 0.5, "editing_threshold": 0.0, "max_post_steps": 16},
}


@dataclass
class _Rows:
    """What is being decoded, on the model's device; [B] unless a line says otherwise.

    A row that is done is moved to block 0, where its forwards disturb nobody.
    """

    ids: torch.Tensor  # [B, L] int64
    is_masked: torch.Tensor  # [B, L] bool, positions still to be filled in
    given: torch.Tensor  # [B, L] bool, tokens that no edit may touch: all but the masks
    length: torch.Tensor  # int64, columns that exist in a row: those behind are in nobody's sight
    prompt_length: torch.Tensor  # int64
    start: torch.Tensor  # int64, first column of the block that the row is in
    num_masked: torch.Tensor  # int64, masks of that block when it was entered
    step: torch.Tensor  # int64, steps taken in that block
    post_steps: torch.Tensor  # int64, those of them that found no mask
    is_stale: torch.Tensor  # bool, whether the block before changed after its keys were computed
    active: torch.Tensor  # bool, False once a row is done
    nfe: torch.Tensor  # int64
    keys: torch.Tensor | None  # int64, seeds of the rows' draws; None: nothing is drawn
    hides: bool  # whether columns are hidden inside a block: the last block of a row is cut short


class BlockSampler(BaseSampler):
    """Decodes with a block-causal model; every row goes from block to block at its own pace.

    A step proposes a token for each masked position of the row's block and fills in the max(min_transfer, share of the
    block's masks) surest, with `threshold` also all others that are surer than that. With `editing_threshold` it also
    replaces tokens of the block that an earlier step filled in, where another token is proposed with more confidence
    than that; after the last mask such steps go on until one edits nothing, at most `max_post_steps`. An answer ends at
    the end of a block (early_stop looks there); its last block is decoded whole and then cut to `max_new_tokens`.
    The host looks once per step which rows are done.
    """

    config_class = BlockSamplerConfig
    presets = BLOCK_PRESETS

    def block_size(self, config: BlockSamplerConfig) -> int:
        """The block size that `config` means: its own, else the family's, else 32."""
        return config.block_size or self.spec.block_size or DEFAULT_BLOCK_SIZE

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        config: BaseSamplerConfig | None = None,
        *,
        seeds: Sequence[int] | None = None,
        on_step: Observer | None = None,
    ) -> BaseSamplerOutput:
        """See `BaseSampler.sample`.

        Raises:
            InputError: no prompt, or an empty one; no room for whole blocks behind a prompt.
        """
        settings, size = self._settings(config)
        rows = self.token_lists(prompts)
        prompt_length = torch.tensor([len(row) for row in rows])
        length = -((prompt_length + settings.max_new_tokens) // -size) * size  # whole blocks
        width = int(length.max())
        self.check_seeds(seeds, len(rows))
        self.check_room(width, f"prompt and answer, in whole blocks of {size},")
        ids = torch.tensor([row + [self.mask_token_id] * (width - len(row)) for row in rows])
        columns = torch.arange(width)[None]
        is_masked = (columns >= prompt_length[:, None]) & (columns < length[:, None])
        state = self._enter(ids, is_masked, length, prompt_length, size)
        if settings.temperature > 0:
            state.keys = self.row_keys(settings.seed, seeds, rows)
        ends = state.prompt_length + settings.max_new_tokens

        def cut() -> torch.Tensor:
            behind = torch.arange(width, device=ends.device)[None] >= ends[:, None]
            return state.ids.masked_fill(behind, self.pad_token_id)[:, : int(prompt_length.max()) + new]

        new = settings.max_new_tokens
        histories = self._decode(state, settings, size, on_step, cut)
        answers = state.ids.gather(1, _columns(state.prompt_length, new))  # [B, G]
        committed = torch.full_like(state.nfe, new)
        if settings.early_stop:
            behind = self.behind_the_end(answers)
            answers = answers.masked_fill(behind, self.pad_token_id)
            committed = (~behind).sum(dim=1)
            ends = state.prompt_length + committed
        return BaseSamplerOutput(cut(), answers, state.nfe, committed, histories)

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
        """See `BaseSampler.infill`; a token sees no later block, so what stands behind a mask's block does not help."""
        settings, size = self._settings(config)
        ids, real, is_masked = (x.cpu() for x in self.checked_infill(noised_ids, attention_mask, settings))
        self.check_seeds(seeds, len(ids))
        width = ids.shape[1]
        missing = (0, -width % size)
        padded = torch.nn.functional.pad(ids, missing, value=self.pad_token_id)
        first = is_masked.int().argmax(dim=1)
        state = self._enter(padded, torch.nn.functional.pad(is_masked, missing), real.sum(dim=1), first, size)
        if settings.temperature > 0:
            state.keys = self.row_keys(
                settings.seed, seeds, [row[own].tolist() for row, own in zip(ids, real, strict=True)]
            )

        def cut() -> torch.Tensor:
            return state.ids[:, :width].clone()

        histories = self._decode(state, settings, size, on_step, cut)
        return BaseSamplerOutput(cut(), None, state.nfe, is_masked.sum(dim=1).to(state.nfe.device), histories)

    def _settings(self, config: BaseSamplerConfig | None) -> tuple[BlockSamplerConfig, int]:
        settings = self.checked_config(config)
        assert isinstance(settings, BlockSamplerConfig)
        return settings, self.block_size(settings)

    def _enter(
        self, ids: torch.Tensor, is_masked: torch.Tensor, length: torch.Tensor, first: torch.Tensor, size: int
    ) -> _Rows:
        """The rows at their first blocks, those of the columns `first` [B]; all arguments on the CPU."""
        device = self.lm.backbone.device
        active = is_masked.any(dim=1)
        start = torch.where(active, first // size * size, 0)
        nothing = torch.zeros_like(length)
        return _Rows(
            ids=ids.to(device, copy=True),
            is_masked=is_masked.to(device, copy=True),
            given=(~is_masked).to(device),
            length=length.to(device),
            prompt_length=first.to(device),
            start=start.to(device),
            num_masked=_in_block(is_masked, start, size).sum(dim=1).to(device),
            step=nothing.to(device, copy=True),
            post_steps=nothing.to(device, copy=True),
            is_stale=torch.zeros_like(active).to(device),
            active=active.to(device),
            nfe=nothing.to(device, copy=True),
            keys=None,
            hides=bool((length % size).any()),
        )

    def _decode(
        self,
        state: _Rows,
        settings: BlockSamplerConfig,
        size: int,
        on_step: Observer | None,
        shown: Callable[[], torch.Tensor],
    ) -> list[torch.Tensor] | None:
        """Decodes all rows to their ends; the states after each step, if asked for."""
        histories: list[torch.Tensor] | None = [] if settings.histories else None
        cache = RowCache(len(self.lm.backbone.layers), state.ids.shape[1]) if settings.use_cache else None
        table = get_num_transfer_tokens(torch.arange(size + 1), settings.steps_per_block or size)
        table = table.clamp(min=settings.min_transfer).to(state.ids.device)  # [s + 1, S]
        banned = self.banned(settings)
        self.begin(*state.ids.shape)
        if cache is not None:
            self._prefill(state, cache, size)
        while True:
            masked = _in_block(state.is_masked, state.start, size)
            editable = torch.zeros_like(masked)
            if settings.editing_threshold is not None:
                editable = ~masked & ~_in_block(state.given, state.start, size)
            # The one question to the device: is anything left, and what is the next forward to look like?
            stale = state.active & state.is_stale & (state.step == 0)
            others = torch.where(state.active, state.start, state.start.max()).min()
            counts = (masked | editable).sum(dim=1)
            active = state.active & (counts > 0)
            asked = [state.active.any(), stale.any(), others, state.start.max(), counts.max()]
            is_left, any_stale, lowest, highest, most = torch.stack([x.long() for x in asked]).tolist()
            if not is_left:
                return histories
            order = (~(masked | editable)).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]  # [B, n]
            logits = self._logits(state, cache, size, order, active, bool(any_stale), lowest, highest)
            self._step(state, settings, size, table, banned, logits, order, masked, editable)
            if histories is not None:
                histories.append(shown())
            if on_step is not None:
                on_step(shown())

    def _prefill(self, state: _Rows, cache: RowCache, size: int) -> None:
        """Keys and values of the blocks before each row's first one, some blocks at a time: masks stay small."""
        end = int(state.start.max())
        chunk = max(1, PREFILL_COLUMNS // size) * size
        nothing = torch.zeros(0, dtype=torch.int64, device=state.ids.device)
        nobody = torch.zeros_like(state.active)
        for low in range(0, end, chunk):
            high = min(low + chunk, end)
            columns = torch.arange(low, high, device=state.ids.device).expand(len(state.ids), -1)
            self._run(state, cache, columns, high, size, nothing, nobody, same_for_all=True, reveals=False)
        state.nfe += (state.start > 0) & state.active

    def _logits(
        self,
        state: _Rows,
        cache: RowCache | None,
        size: int,
        order: torch.Tensor,
        active: torch.Tensor,
        any_stale: bool,
        lowest: int,
        highest: int,
    ) -> torch.Tensor:
        """Logits [B * n, V] that predict the tokens at the places `order` [B, n] of each row's block."""
        end, together = highest + size, lowest == highest
        if cache is None:
            window = torch.arange(end, device=order.device).expand(len(order), -1)
        elif highest > 0 and (any_stale or self.spec.logit_shift):
            # The block before, with its final tokens, and this one. Where it was final already nothing changes.
            window = _columns((state.start - size).clamp(min=0), 2 * size)
        else:
            window = _columns(state.start, size)
        within = state.start[:, None] + order - window[:, :1] - self.spec.logit_shift
        rows = torch.arange(len(order), device=order.device)[:, None] * window.shape[1]
        # A window that is the last block of what is seen sees everything.
        unmasked = together and window.shape[1] == size and not state.hides
        state.nfe += state.active
        wanted = (rows + within).flatten()
        return self._run(state, cache, window, end, size, wanted, active, same_for_all=cache is None, unmasked=unmasked)

    def _run(
        self,
        state: _Rows,
        cache: RowCache | None,
        columns: torch.Tensor,
        end: int,
        size: int,
        logit_positions: torch.Tensor,
        active: torch.Tensor,
        same_for_all: bool = False,
        unmasked: bool = False,
        reveals: bool = True,
    ) -> torch.Tensor:
        """One forward on the tokens at `columns` [B, W], which see columns [0, end) as far as they may."""
        mask = None
        if not unmasked:
            keys = torch.arange(end, device=columns.device)
            queries = columns[:1] if same_for_all else columns
            mask = keys // size <= queries[..., None] // size  # [B or 1, W, end]
            if state.hides:
                mask = mask & (keys < state.length[:, None, None])
            mask = mask[:, None]
        visit = Visit(columns, active, state.start, state.ids.shape[1], reveals, columns < state.start[:, None])
        output = self.run_model(
            visit,
            input_ids=state.ids.gather(1, columns),
            attention_mask=mask,
            position_ids=columns,
            past_key_values=None if cache is None else cache.window(columns, end),
            logit_positions=logit_positions,
        )
        assert output.logits is not None
        return output.logits

    def _step(
        self,
        state: _Rows,
        settings: BlockSamplerConfig,
        size: int,
        table: torch.Tensor,
        banned: torch.Tensor,
        logits: torch.Tensor,
        order: torch.Tensor,
        masked: torch.Tensor,
        editable: torch.Tensor,
    ) -> None:
        """Fills in and edits; rows whose block is done go on to the next one."""
        columns = state.start[:, None] + order  # [B, n]
        keys = None
        if state.keys is not None:
            keys = mix_keys(mix_keys(state.keys, state.step)[:, None], columns).flatten()
        tokens, scores = propose(
            logits, "low_confidence", settings.temperature, keys, banned, settings.top_k, settings.top_p
        )
        tokens, scores, current = tokens.view_as(order), scores.view_as(order), state.ids.gather(1, columns)
        candidates = masked.gather(1, order)
        count = table[state.num_masked, state.step.clamp(max=table.shape[1] - 1)]  # [B]
        chosen = choose_positions(scores, candidates, count)
        if settings.threshold is not None:
            chosen = chosen | choose_above(scores, candidates, settings.threshold)
        if settings.editing_threshold is not None:
            is_surer = scores > settings.editing_threshold
            chosen = chosen | (editable.gather(1, order) & is_surer & (tokens != current))
        chosen = chosen & state.active[:, None]
        state.ids.scatter_(1, columns, torch.where(chosen, tokens, current))
        state.is_masked.scatter_(1, columns, candidates & ~chosen)
        changed = chosen.any(dim=1)
        state.step += 1
        state.post_steps += ~masked.any(dim=1)
        is_done = ~(candidates & ~chosen).any(dim=1)
        if settings.editing_threshold is not None:
            is_done = is_done & (~changed | (state.post_steps >= settings.max_post_steps))
        self._advance(state, settings, size, is_done & state.active, changed)

    def _advance(
        self, state: _Rows, settings: BlockSamplerConfig, size: int, goes_on: torch.Tensor, changed: torch.Tensor
    ) -> None:
        """Rows `goes_on` [B] leave their block: for the next one, or for good."""
        state.start = state.start + size * goes_on
        if settings.early_stop:
            columns = torch.arange(state.ids.shape[1], device=state.ids.device)
            is_answer = (columns >= state.prompt_length[:, None]) & (columns < state.start[:, None])
            ended = goes_on & (self.is_end(state.ids) & is_answer).any(dim=1)
            state.is_masked &= ~ended[:, None]
        state.active = state.active & (~goes_on | state.is_masked.any(dim=1))
        state.start = torch.where(state.active, state.start, 0)
        state.is_stale = torch.where(goes_on, changed | self.carries_state, state.is_stale)
        state.step = torch.where(goes_on, 0, state.step)
        state.post_steps = torch.where(goes_on, 0, state.post_steps)
        entered = _in_block(state.is_masked, state.start, size).sum(dim=1)
        state.num_masked = torch.where(goes_on, entered, state.num_masked)


def _columns(start: torch.Tensor, width: int) -> torch.Tensor:
    """start[b], start[b] + 1, ...: int64 [B, width]."""
    return start[:, None] + torch.arange(width, device=start.device)


def _in_block(values: torch.Tensor, start: torch.Tensor, size: int) -> torch.Tensor:
    """values [B, L] in each row's block, [B, s]."""
    return values.gather(1, _columns(start, size))
