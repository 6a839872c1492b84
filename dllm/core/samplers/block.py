"""BlockSampler: decode block by block with a block-causal model, an exact KV cache and token editing (LLaDA2.0, arXiv
2512.15745; LLaDA2.1, arXiv 2602.08676; with shifted logits Fast-dLLM v2, arXiv 2509.26328).

A position sees its own block and the blocks before it. So the keys and values of a block are final as soon as its
tokens are: they are computed once more with the final tokens (where the last step changed anything) and then only read.
Blocks are counted from a row's first token; every row goes at its own pace.

Where the logit at a place predicts the token of that place, that forward also is the first step of the next block.
With shifted logits (`logit_shift` 1) it stands alone, over the finished block: its last logit predicts the first token
of the next one, which is committed at once, the steps of that block then see the block alone, and place i is predicted
at place i - 1 of it. A row at such a forward and a row at a step share a forward: their windows are equally wide.
Shapes: B rows, L columns (a row's tokens begin in column 0), s block size, W window of a forward, n candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dllm.core.reveal import (
    choose_above,
    choose_positions,
    earliest_part,
    get_num_transfer_tokens,
    mix_keys,
    propose,
)
from dllm.core.samplers.base import BaseSampler, BaseSamplerConfig, BaseSamplerOutput, Observer, Prompt, Visit
from dllm.core.samplers.block_config import BLOCK_PRESETS, BlockSamplerConfig
from dllm.core.samplers.block_rows import Rows, columns_from
from dllm.core.samplers.cache import RowCache
from dllm.models.spec import block_size_of
from dllm.utils.parsing import InputError

PREFILL_COLUMNS = 1024  # of one forward that fills the cache


class BlockSampler(BaseSampler):
    """Decodes with a block-causal model; every row goes from block to block at its own pace.

    A step proposes a token for each masked position of the row's block (with `sub_block_size`: of its earliest
    sub-block with masks) and fills in the max(min_transfer, share of the block's masks) surest, with `threshold` also
    all others that are surer than that. With shifted logits the first token of a block is not part of this. With
    `editing_threshold` a step also replaces tokens of the block that an earlier one filled in, where another token is
    proposed with more confidence than that; after the last mask such steps go on until one edits nothing, at most
    `max_post_steps`. The last block of an answer is decoded whole and then cut to `max_new_tokens`. With early_stop a
    row is done as soon as an end token stands in its answer with no mask before it; with editing, as soon as the block
    that holds it is. The host looks once per step which rows are done.
    """

    config_class = BlockSamplerConfig
    presets = BLOCK_PRESETS

    def block_size(self, config: BlockSamplerConfig) -> int:
        """The block size that `config` means (`dllm.models.spec.block_size_of`)."""
        return block_size_of(self.lm, config.block_size)

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
        device = self.lm.backbone.device
        state = Rows.at_first_blocks(ids, is_masked, length, prompt_length, size, settings.use_cache, device)
        if settings.temperature > 0:
            state.keys = self.row_keys(settings.seed, seeds, rows)
        ends = state.prompt_length + settings.max_new_tokens

        def cut() -> torch.Tensor:
            behind = torch.arange(width, device=ends.device)[None] >= ends[:, None]
            return state.ids.masked_fill(behind, self.pad_token_id)[:, : int(prompt_length.max()) + new]

        new = settings.max_new_tokens
        histories = self._decode(state, settings, on_step, cut)
        answers = state.ids.gather(1, columns_from(state.prompt_length, new))  # [B, G]
        committed = torch.full_like(state.nfe, new)
        if settings.early_stop:
            behind = self.behind_the_end(answers)
            answers = answers.masked_fill(behind, self.pad_token_id)
            committed = (~behind).sum(dim=1)
            ends = state.prompt_length + committed
        return _output(state, cut(), answers, committed, histories)

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
        masked, first = torch.nn.functional.pad(is_masked, missing), is_masked.int().argmax(dim=1)
        device = self.lm.backbone.device
        state = Rows.at_first_blocks(padded, masked, real.sum(dim=1), first, size, settings.use_cache, device)
        if settings.temperature > 0:
            state.keys = self.row_keys(
                settings.seed, seeds, [row[own].tolist() for row, own in zip(ids, real, strict=True)]
            )

        def cut() -> torch.Tensor:
            return state.ids[:, :width].clone()

        histories = self._decode(state, settings, on_step, cut)
        return _output(state, cut(), None, is_masked.sum(dim=1).to(device), histories)

    def _settings(self, config: BaseSamplerConfig | None) -> tuple[BlockSamplerConfig, int]:
        settings = self.checked_config(config)
        assert isinstance(settings, BlockSamplerConfig)
        self.check_fit(settings)
        return settings, self.block_size(settings)

    def check_fit(self, config: BlockSamplerConfig) -> None:
        """Nothing, if the model can be decoded with these settings.

        Raises:
            InputError: sub-blocks that do not fit (`BlockSamplerConfig.check_parts`); editing where logits are shifted.
        """
        config.check_parts(self.block_size(config))
        if self.spec.logit_shift and config.editing_threshold is not None:
            raise InputError(
                f"{self.spec.name} predicts a token where the one before it stands, so the first token of a block "
                "cannot be edited: drop editing_threshold"
            )

    def _decode(
        self, rows: Rows, settings: BlockSamplerConfig, on_step: Observer | None, shown: Callable[[], torch.Tensor]
    ) -> list[torch.Tensor] | None:
        """Decodes all rows to their ends; the states after each step, if asked for."""
        histories: list[torch.Tensor] | None = [] if settings.histories else None
        cache = RowCache(len(self.lm.backbone.layers), rows.ids.shape[1]) if rows.is_cached else None
        table = get_num_transfer_tokens(torch.arange(rows.size + 1), settings.steps_per_block or rows.size)
        table = table.clamp(min=settings.min_transfer).to(rows.ids.device)  # [s + 1, S]
        banned = self.banned(settings)
        self.begin(*rows.ids.shape)
        if cache is not None:
            self._prefill(rows, cache)
        while True:
            plan = self._plan(rows, settings)
            if plan is None:
                return histories
            logits = self._logits(rows, cache, plan)
            self._step(rows, settings, plan, table, banned, logits)
            if histories is not None:
                histories.append(shown())
            if on_step is not None:
                on_step(shown())

    def _leads(self, rows: Rows) -> torch.Tensor:
        """Which rows take their next forward over the block before theirs, bool [B]; see the top of this file."""
        if not self.spec.logit_shift:
            return torch.zeros_like(rows.active)
        return rows.active & (rows.masked[:, 0] | rows.is_stale)

    def _prefill(self, rows: Rows, cache: RowCache) -> None:
        """Keys and values of the blocks before each row's first forward, some blocks at a time: masks stay small."""
        before = torch.where(rows.active, rows.start - rows.size * self._leads(rows), 0)  # [B]
        chunk = prefill_columns(rows.size)
        nothing = torch.zeros(0, dtype=torch.int64, device=rows.ids.device)
        nobody = torch.zeros_like(rows.active)
        end = int(before.max())
        for low in range(0, end, chunk):
            high = min(low + chunk, end)
            columns = torch.arange(low, high, device=rows.ids.device).expand(len(rows.ids), -1)
            self._run(rows, cache, columns, high, nothing, nobody, same_for_all=True, reveals=False)
        rows.cache_forwards += -(-before // chunk)

    def _plan(self, rows: Rows, settings: BlockSamplerConfig) -> _Plan | None:
        """The next forward; None if no row has anything left to do."""
        masked, leads = rows.masked, self._leads(rows)
        may_fill = masked if settings.sub_block_size is None else earliest_part(masked, settings.sub_block_size)
        if self.spec.logit_shift:
            is_first = torch.arange(rows.size, device=masked.device) == 0
            may_fill = torch.where(leads[:, None], masked & is_first, may_fill)
        may_edit = torch.zeros_like(masked) if settings.editing_threshold is None else rows.filled_in
        wanted = may_fill | may_edit
        counts = wanted.sum(dim=1)
        first = rows.start - rows.size * leads
        # The one question to the device: is anything left, and what is the next forward to look like?
        others = torch.where(rows.active, first, first.max()).min()
        asked = [rows.active.any(), (rows.active & rows.is_stale).any(), others, first.max(), counts.max()]
        is_left, any_stale, lowest, highest, most = torch.stack([x.long() for x in asked]).tolist()
        if not is_left:
            return None
        order = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]  # [B, n]
        # The block before, with its final tokens, and this one. Where it was final already nothing changes.
        restates = bool(any_stale) and highest > 0 and not self.spec.logit_shift
        return _Plan(
            order=order,
            may_fill=may_fill.gather(1, order),
            may_edit=may_edit.gather(1, order),
            had_masks=masked.any(dim=1),
            leads=leads,
            # Blocks of one token have no forward but those that lead.
            reveals=rows.active & (~leads | (rows.size == 1)) & (counts > 0),
            first=(first - rows.size).clamp(min=0) if restates else first,
            width=2 * rows.size if restates else rows.size,
            end=highest + rows.size,
            together=lowest == highest,
        )

    def _logits(self, rows: Rows, cache: RowCache | None, plan: _Plan) -> torch.Tensor:
        """Logits [B * n, V] that predict the tokens at the places `plan.order` of each row's block."""
        if cache is None:
            window = torch.arange(plan.end, device=plan.order.device).expand(len(plan.order), -1)
        else:
            window = columns_from(plan.first, plan.width)
        width = window.shape[1]
        # Clamped for places that are there only because another row has more of them.
        within = rows.start[:, None] + plan.order - window[:, :1] - self.spec.logit_shift
        flat = torch.arange(len(plan.order), device=window.device)[:, None] * width + within.clamp(0, width - 1)
        rows.nfe += plan.reveals
        rows.cache_forwards += rows.active & ~plan.reveals
        rows.batch_forwards += plan.reveals.any()
        # A window that is the last block of what is seen sees everything.
        unmasked = plan.together and width == rows.size and not rows.hides
        return self._run(
            rows,
            cache,
            window,
            plan.end,
            flat.flatten(),
            plan.reveals,
            same_for_all=cache is None,
            unmasked=unmasked,
        )

    def _run(
        self,
        rows: Rows,
        cache: RowCache | None,
        columns: torch.Tensor,
        end: int,
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
            mask = keys // rows.size <= queries[..., None] // rows.size  # [B or 1, W, end]
            if rows.hides:
                mask = mask & (keys < rows.length[:, None, None])
            mask = mask[:, None]
        visit = Visit(columns, active, rows.start, rows.ids.shape[1], reveals, columns < rows.start[:, None])
        output = self.run_model(
            visit,
            input_ids=rows.ids.gather(1, columns),
            attention_mask=mask,
            position_ids=columns,
            past_key_values=None if cache is None else cache.window(columns, end),
            logit_positions=logit_positions,
        )
        assert output.logits is not None
        return output.logits

    def _step(
        self,
        rows: Rows,
        settings: BlockSamplerConfig,
        plan: _Plan,
        table: torch.Tensor,
        banned: torch.Tensor,
        logits: torch.Tensor,
    ) -> None:
        """Fills in and edits; rows whose block is done go on to the next one."""
        columns = rows.start[:, None] + plan.order  # [B, n]
        keys = None
        if rows.keys is not None:
            keys = mix_keys(mix_keys(rows.keys, rows.step)[:, None], columns).flatten()
        tokens, scores = propose(
            logits, "low_confidence", settings.temperature, keys, banned, settings.top_k, settings.top_p
        )
        tokens, scores, current = tokens.view_as(columns), scores.view_as(columns), rows.ids.gather(1, columns)
        # A row that leads has one candidate or none.
        count = table[rows.num_masked, rows.step.clamp(max=table.shape[1] - 1)]  # [B]
        chosen = choose_positions(scores, plan.may_fill, count)
        if settings.threshold is not None:
            chosen = chosen | choose_above(scores, plan.may_fill, settings.threshold)
        if settings.editing_threshold is not None:
            is_surer = scores > settings.editing_threshold
            chosen = chosen | (plan.may_edit & is_surer & (tokens != current))
        chosen = chosen & rows.active[:, None]
        rows.ids.scatter_(1, columns, torch.where(chosen, tokens, current))
        rows.is_masked.scatter_(1, columns, rows.is_masked.gather(1, columns) & ~chosen)
        changed, masked = chosen.any(dim=1), rows.masked
        rows.is_stale = torch.zeros_like(rows.is_stale)
        rows.step += ~plan.leads
        rows.post_steps += ~plan.had_masks
        rows.num_masked = torch.where(plan.leads, masked.sum(dim=1), rows.num_masked)
        is_done = rows.active & ~masked.any(dim=1)
        if settings.editing_threshold is not None:
            is_done = is_done & (~changed | (rows.post_steps >= settings.max_post_steps))
        if settings.early_stop:
            # As long as edits may follow in the block, its end token may still give way.
            may_end = rows.active if settings.editing_threshold is None else is_done
            ended = may_end & self.is_complete(rows.ids, rows.is_masked, rows.prompt_length)
            rows.is_masked &= ~ended[:, None]
            is_done = is_done | ended
        self._advance(rows, is_done, changed | plan.leads)

    def _advance(self, rows: Rows, goes_on: torch.Tensor, changed: torch.Tensor) -> None:
        """Rows `goes_on` [B] leave their block: for the next one, or, without any mask left, for good.

        Args:
            rows: all of them.
            goes_on: which ones.
            changed: rows whose block got other tokens than its last forward saw, or saw no forward at all; bool [B].
        """
        rows.leave(goes_on)
        rows.retire(goes_on)
        if rows.is_cached:
            rows.is_stale = goes_on & rows.active & (changed | self.carries_state)


@dataclass(frozen=True)
class _Plan:
    """The next forward and what it is to decide; [B, n] places of each row's block, [B] rows."""

    order: torch.Tensor  # [B, n] int64, places whose tokens are predicted; a row's own ones come first
    may_fill: torch.Tensor  # [B, n] bool, masks that may be filled in
    may_edit: torch.Tensor  # [B, n] bool, tokens that may give way
    had_masks: torch.Tensor  # [B] bool, whether the block has masks
    leads: torch.Tensor  # [B] bool, see BlockSampler._leads
    reveals: torch.Tensor  # [B] bool, rows for which this is a denoising step
    first: torch.Tensor  # [B] int64, first column of the window
    width: int  # W
    end: int  # columns that are read
    together: bool  # whether the windows of all active rows are the same


def prefill_columns(block_size: int) -> int:
    """Columns of one forward that fills the cache with a prompt: whole blocks, at least one."""
    return max(1, PREFILL_COLUMNS // block_size) * block_size


def _output(
    rows: Rows,
    sequences: torch.Tensor,
    answers: torch.Tensor | None,
    num_committed: torch.Tensor,
    histories: list[torch.Tensor] | None,
) -> BaseSamplerOutput:
    return BaseSamplerOutput(
        sequences=sequences,
        answers=answers,
        nfe=rows.nfe,
        cache_forwards=rows.cache_forwards,
        batch_forwards=rows.batch_forwards,
        num_committed=num_committed,
        histories=histories,
    )
