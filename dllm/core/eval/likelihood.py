"""How likely a masked-diffusion LM finds a continuation: an estimate over random masks, and what it says greedily.

Shapes: I items, S masked states of an item, T target tokens, R rows of a forward, L positions, N masked positions,
V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dllm.core.attention import block_causal_mask
from dllm.core.losses import chunk_rows, token_nll
from dllm.core.noising import flat_positions, make_generator
from dllm.core.reveal import choose_positions, propose
from dllm.models.backbone import DiffusionLM
from dllm.models.spec import spec_of


@dataclass(frozen=True)
class Scorer:
    """How logits are made.

    lm: the unwrapped model, in eval mode.
    mask_token_id, pad_token_id: ids of the special tokens.
    cfg_scale: classifier-free guidance, at least 0: logits u + (1 + scale) (c - u), u from a masked context; 0: c.
    batch_size: rows per forward, at least 1.
    block_size: positions see their own block of this many and those before it, counted from the first token of the
        context; None: they see each other.
    """

    lm: DiffusionLM
    mask_token_id: int
    pad_token_id: int
    cfg_scale: float = 0.0
    batch_size: int = 1
    block_size: int | None = None

    @property
    def forwards_per_row(self) -> int:
        """Forwards of the model that a masked state needs: 1, or 2 with guidance."""
        return 2 if self.cfg_scale > 0 else 1

    def run(self, ids: torch.Tensor, attention_mask: torch.Tensor | None, start: torch.Tensor) -> torch.Tensor:
        """Hidden states after the final norm, [R, L, D]: whatever asks the model does so here.

        Args:
            ids: int64 [R, L], masks among them.
            attention_mask: see `dllm.core.attention.prepare_mask`.
            start: int64 [R], first column of the block that is being filled in; 0 without blocks. A subclass that
                carries a state goes by it.
        """
        return self.lm.backbone(input_ids=ids, attention_mask=attention_mask).last_hidden_state


@dataclass(frozen=True)
class Item:
    """A continuation to score.

    context: token ids before it, at least one.
    target: its token ids.
    """

    context: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True)
class MaskPlan:
    """Which target tokens each state masks, and what its sum of log-probabilities counts.

    is_masked: bool [S, T].
    weights: float64 [S].
    """

    is_masked: torch.Tensor
    weights: torch.Tensor


def item_blocks(item: Item, block_size: int | None) -> list[Item]:
    """The item cut where blocks end: each part of its target, with all that stands before as context.

    A block-causal model decodes a block when those before it are done, so log p(target) is the sum over these parts.
    Blocks are counted from the first token of the context. No part for an empty target; the item itself with None.
    """
    if block_size is None:
        return [item] if item.target else []
    whole, start = item.context + item.target, len(item.context)
    borders = [start, *range((start // block_size + 1) * block_size, len(whole), block_size), len(whole)]
    return [Item(whole[:low], whole[low:high]) for low, high in itertools.pairwise(borders) if low < high]


def item_states(item: Item, mc_num: int, block_size: int | None) -> int:
    """How many masked states the estimate of an item looks at: `num_states` of each of its parts, added."""
    return sum(num_states(len(part.target), mc_num) for part in item_blocks(item, block_size))


def num_states(num_tokens: int, mc_num: int) -> int:
    """How many masked states `mask_plan` makes: min(mc_num, 2^T - 1), none for an empty target."""
    return min(mc_num, 2 ** min(num_tokens, 62) - 1)


def mask_plan(num_tokens: int, mc_num: int, generator: torch.Generator) -> MaskPlan:
    """The states of the estimate sum_s w_s * sum_(j masked in s) log p(x_j | what s shows).

    Its expectation is the bound of arXiv 2502.09992, equation 6 (one target of T tokens):

        mean over k = 1..T of  mean over the subsets m of k tokens of  (T / k) * sum_(j in m) log p(x_j | rest)

    Drawn: `mc_num` states; their k run through 1..T in equal strides from a random start (so each k is as likely as
    any other), which tokens are masked is uniform, w = T / (k * mc_num). Where all 2^T - 1 subsets are at most `mc_num`
    they are summed instead, w = 1 / (k * binomial(T, k)): the bound itself, nothing is drawn.

    Args:
        num_tokens: T, at least 1.
        mc_num: most states, at least 1.
        generator: on the CPU.
    """
    if num_states(num_tokens, mc_num) < mc_num or 2**num_tokens - 1 == mc_num:
        subsets = torch.arange(1, 2**num_tokens)  # [S]
        is_masked = (subsets[:, None] >> torch.arange(num_tokens)) % 2 == 1  # [S, T]
        weights = [1 / (k * math.comb(num_tokens, k)) for k in is_masked.sum(dim=1).tolist()]
        return MaskPlan(is_masked, torch.tensor(weights, dtype=torch.float64))
    start = torch.randint(num_tokens, (), generator=generator)
    counts = (start + torch.arange(mc_num) * num_tokens // mc_num) % num_tokens + 1  # [S]
    noise = torch.rand(mc_num, num_tokens, generator=generator)
    is_masked = noise.argsort(dim=1).argsort(dim=1) < counts[:, None]  # [S, T]
    return MaskPlan(is_masked, num_tokens / (counts.double() * mc_num))


@torch.no_grad()
def log_likelihoods(scorer: Scorer, items: Sequence[Item], mc_num: int, seed: int) -> list[float]:
    """The estimate of `mask_plan` for each item, in nats; 0 for an empty target.

    With a block size it is the sum over the parts of the target, each given the true tokens of the parts before it (see
    `item_blocks`). States of all items share forwards. An item's masks follow from `seed` and its tokens alone.

    Args:
        scorer: the model.
        items: what to score.
        mc_num: most states per item, or per part of it.
        seed: of the masks.
    """
    parts = [(index, part) for index, item in enumerate(items) for part in item_blocks(item, scorer.block_size)]
    sums = torch.zeros(len(items), dtype=torch.float64, device=scorer.lm.device)
    plans = []
    for _, part in parts:
        generator = make_generator("likelihood", seed, len(part.context), *part.context, *part.target)
        plans.append(mask_plan(len(part.target), mc_num, generator))
    for batch in _state_batches(plans, scorer.batch_size):
        chosen = [parts[number] for number, _, _ in batch]
        rows = _Rows.make([part for _, part in chosen], scorer)
        masked = rows.masked_where([mask for _, mask, _ in batch])  # [R, L] on the CPU
        positions = flat_positions(masked)  # [N]
        owners = torch.tensor([index for index, _ in chosen])[positions // masked.shape[1]]
        weights = torch.tensor([float(weight) for _, _, weight in batch], dtype=torch.float64)
        per_position = weights[positions // masked.shape[1]].to(sums.device)
        nll = _masked_nll(scorer, rows, masked.to(sums.device), positions.to(sums.device))
        sums.index_add_(0, owners.to(sums.device), -nll.double() * per_position)
    return sums.tolist()


def _state_batches(
    plans: Sequence[MaskPlan], batch_size: int
) -> Iterator[list[tuple[int, torch.Tensor, torch.Tensor]]]:
    """(number of the plan, mask [T], weight) of every state, `batch_size` at a time."""
    batch = []
    for index, plan in enumerate(plans):
        for mask, weight in zip(plan.is_masked, plan.weights, strict=True):
            batch.append((index, mask, weight))
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch


@dataclass(frozen=True)
class _Rows:
    """Context and target of some items, padded on the right, on the model's device.

    ids: int64 [R, L], nothing masked.
    attention_mask: [R, L], or None if all rows are equally long.
    is_context: bool [R, L].
    starts: where each target begins.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor | None
    is_context: torch.Tensor
    starts: list[int]

    @classmethod
    def make(cls, items: Sequence[Item], scorer: Scorer) -> _Rows:
        whole = [torch.tensor(item.context + item.target) for item in items]
        ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=scorer.pad_token_id)  # [R, L]
        columns = torch.arange(ids.shape[1])[None]
        lengths = torch.tensor([len(row) for row in whole])[:, None]
        starts = [len(item.context) for item in items]
        mask = columns < lengths  # [R, L]
        is_context = columns < torch.tensor(starts)[:, None]
        device = scorer.lm.device
        return cls(ids.to(device), None if bool(mask.all()) else mask.long().to(device), is_context.to(device), starts)

    def masked_where(self, masks: Sequence[torch.Tensor]) -> torch.Tensor:
        """bool [R, L] on the CPU from one mask [T] per row."""
        masked = torch.zeros(self.ids.shape, dtype=torch.bool)
        for row, (start, mask) in enumerate(zip(self.starts, masks, strict=True)):
            masked[row, start : start + len(mask)] = mask
        return masked

    def take(self, rows: torch.Tensor) -> _Rows:
        """Some of the rows, by index."""
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        starts = [self.starts[row] for row in rows.tolist()]
        return _Rows(self.ids[rows], mask, self.is_context[rows], starts)


def _masked_nll(scorer: Scorer, rows: _Rows, masked: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """-log p of the true tokens at flat `positions`, [N]; the head runs on a chunk of positions at a time."""
    targets = rows.ids.flatten()[positions]
    noised = rows.ids.masked_fill(masked, scorer.mask_token_id)
    parts = zip(_logits(scorer, rows, noised, positions), targets.split(_chunk(scorer)), strict=True)
    return torch.cat([token_nll(logits, target) for logits, target in parts])


def _logits(scorer: Scorer, rows: _Rows, noised: torch.Tensor, positions: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits [n, V] that predict the tokens at flat `positions`, a chunk of them at a time."""
    conditional = _hidden(scorer, rows, noised, positions)
    if scorer.cfg_scale == 0:
        yield from map(scorer.lm.head, conditional)
        return
    blank = noised.masked_fill(rows.is_context, scorer.mask_token_id)
    unconditional = _hidden(scorer, rows, blank, positions)
    for given, free in zip(conditional, unconditional, strict=True):
        base = scorer.lm.head(free)
        yield base + (1 + scorer.cfg_scale) * (scorer.lm.head(given) - base)


def _hidden(scorer: Scorer, rows: _Rows, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Hidden states that predict flat `positions`, in chunks [n, D]; `ids` are those of `rows` with masks."""
    attention_mask, start = rows.attention_mask, torch.zeros_like(ids[:, 0])
    if scorer.block_size is not None:
        start = rows.is_context.sum(dim=1) // scorer.block_size * scorer.block_size  # [R]
    if scorer.block_size is not None and ids.shape[1] > scorer.block_size:
        causal = block_causal_mask(ids.shape[1], scorer.block_size, device=ids.device)  # [1, 1, L, L]
        attention_mask = causal if attention_mask is None else causal & attention_mask.bool()[:, None, None]
    wanted = scorer.run(ids, attention_mask, start).flatten(0, 1)[positions - spec_of(scorer.lm).logit_shift]  # [N, D]
    return wanted.split(_chunk(scorer))


def _chunk(scorer: Scorer) -> int:
    return chunk_rows(scorer.lm.config.vocab_size, scorer.lm.device)


@torch.no_grad()
def greedy_matches(scorer: Scorer, items: Sequence[Item]) -> list[tuple[bool, int]]:
    """(whether greedy decoding gives the target, masked states looked at) of each item; (True, 0) for an empty target.

    Greedy decoding begins with the whole target masked, with a block size with the part of it in the present block,
    commits one token per step, the surest of all, and never the mask token; a row ends at its first token that differs
    from the target. With shifted logits and blocks the first token of a block is committed before all others of it.

    Args:
        scorer: the model.
        items: what to decode.
    """
    found = [(True, 0)] * len(items)
    parts = [item_blocks(item, scorer.block_size) for item in items]
    for number in range(max(map(len, parts), default=0)):
        asked = [index for index, own in enumerate(parts) if number < len(own) and found[index][0]]
        for first in range(0, len(asked), scorer.batch_size):
            batch = asked[first : first + scorer.batch_size]
            results = _decode_greedily(scorer, [parts[index][number] for index in batch])
            for index, (is_right, steps) in zip(batch, results, strict=True):
                found[index] = (is_right, found[index][1] + steps)
    return found


def _decode_greedily(scorer: Scorer, items: Sequence[Item]) -> list[tuple[bool, int]]:
    rows = _Rows.make(items, scorer)
    device = rows.ids.device
    banned = torch.tensor([scorer.mask_token_id], device=device)
    masked = rows.masked_where([torch.ones(len(item.target), dtype=torch.bool) for item in items]).to(device)
    alive = list(range(len(items)))
    found = [(False, 0)] * len(items)
    step = 0
    while alive:
        step += 1
        positions = flat_positions(masked)
        noised = rows.ids.masked_fill(masked, scorer.mask_token_id)
        made = [propose(logits, banned=banned) for logits in _logits(scorer, rows, noised, positions)]
        tokens, sure = torch.cat([part[0] for part in made]), torch.cat([part[1] for part in made])
        scores = torch.zeros(masked.shape, dtype=sure.dtype, device=device)
        proposed = rows.ids.clone()
        scores.view(-1)[positions] = sure
        if scorer.block_size is not None and spec_of(scorer.lm).logit_shift:
            scores[:, :: scorer.block_size] = torch.inf  # those that are masked, so of the present block
        proposed.view(-1)[positions] = tokens
        chosen = choose_positions(scores, masked, torch.ones(len(alive), dtype=torch.int64, device=device))
        right = ~(chosen & (proposed != rows.ids)).any(dim=1)  # [R]
        masked = masked & ~chosen
        going = (right & masked.any(dim=1)).tolist()
        for row, (is_right, goes_on) in enumerate(zip(right.tolist(), going, strict=True)):
            if not goes_on:
                found[alive[row]] = (is_right, step)
        keep = [row for row, goes_on in enumerate(going) if goes_on]
        alive = [alive[row] for row in keep]
        index = torch.tensor(keep, dtype=torch.int64, device=device)
        rows, masked = rows.take(index), masked[index]
    return found
