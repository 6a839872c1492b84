"""Likelihoods with a relay, against a loop over single rows and forwards. In float64."""

import itertools
import math

import pytest
import torch

from dllm.core.attention import block_causal_mask
from dllm.core.eval.likelihood import Item, Scorer, greedy_matches, log_likelihoods
from memdlm.relay import RelayScorer, RelayState

MASK, PAD = 39, 38
# Contexts that end inside a block of 4, at its end, and before the first one's end; targets over one and two blocks.
ITEMS = [Item((4, 5, 6), (7, 8, 9)), Item((1, 2, 3, 4, 5, 6, 7, 8), (5, 4, 3)), Item((1,), (2, 3))]
BLOCK_SIZES = {"llada_moe": None, "llada2_moe": 4, "fast_dllm_v2": 4}
CASES = [(family, *how) for family in BLOCK_SIZES for how in (("mask", "zeros"), ("all", "none"))]


def _logits(model, channel, ids: torch.Tensor, block_size: int | None, begin: int, num_passes: int) -> torch.Tensor:
    """Logits [L, V] of the last of some forwards over ids [1, L], each with the state of the one before."""
    length = ids.shape[1]
    mask = None if block_size is None else block_causal_mask(length, block_size)
    own, begins = torch.zeros(1, length, dtype=torch.bool), torch.zeros(1, length, dtype=torch.bool)
    own[:, begin:], begins[:, begin] = True, True
    hidden, is_set = torch.zeros(1, length, channel.size, dtype=torch.float64), channel.first(1, length).is_set
    for _ in range(num_passes):
        with channel.passing(RelayState(hidden, is_set, begins if block_size else None, own)):
            logits = model(ids, attention_mask=mask).logits[0]
        hidden, is_set = channel.taken, torch.ones_like(is_set)
    return logits


@torch.no_grad()
def _bound(model, channel, item: Item, block_size: int | None, num_passes: int) -> float:
    """Block by block: mean over k, over the subsets of k of the block's tokens, of (T / k) * their log-probability."""
    row, start, shift = [*item.context, *item.target], len(item.context), channel.shift
    total = 0.0
    for _, group in itertools.groupby(range(start, len(row)), key=lambda place: place // (block_size or len(row))):
        own = list(group)
        begin = own[0] // block_size * block_size if block_size else 0
        for k in range(1, len(own) + 1):
            for subset in itertools.combinations(own, k):
                ids = torch.tensor([row[: own[-1] + 1]])
                ids[0, list(subset)] = MASK
                log_p = _logits(model, channel, ids, block_size, begin, num_passes).log_softmax(-1)
                value = sum(float(log_p[place - shift, row[place]]) for place in subset)
                total += value / (k * math.comb(len(own), k))
    return total


@pytest.mark.parametrize(("family", "positions", "first_state"), CASES)
def test_a_state_is_looked_at_twice(relay_model, family, positions, first_state) -> None:
    model, channel = relay_model(family, positions=positions, first_state=first_state)
    size = BLOCK_SIZES[family]
    scorer = RelayScorer(model, MASK, PAD, batch_size=5, block_size=size, channel=channel)
    values = log_likelihoods(scorer, ITEMS, mc_num=15, seed=0)
    assert channel.taken is None and model.backbone.carry is None  # nothing is kept
    expected = [_bound(model, channel, item, size, num_passes=2) for item in ITEMS]
    assert values == pytest.approx(expected, abs=1e-9)
    control = RelayScorer(model, MASK, PAD, batch_size=5, block_size=size, channel=channel, zeroed=True)
    values = log_likelihoods(control, ITEMS, mc_num=15, seed=0)
    once = [_bound(model, channel, item, size, num_passes=1) for item in ITEMS]
    assert values == pytest.approx(once, abs=1e-9)
    assert all(abs(one - two) > 1e-4 for one, two in zip(once, expected, strict=True))


@pytest.mark.parametrize("family", BLOCK_SIZES)
def test_a_zero_gate_is_the_base_model(relay_model, family) -> None:
    model, channel = relay_model(family)
    torch.nn.init.zeros_(channel.norm.weight)
    torch.nn.init.zeros_(channel.norm.bias)
    settings = {"batch_size": 4, "block_size": BLOCK_SIZES[family]}
    plain = Scorer(model, MASK, PAD, **settings)
    relay = RelayScorer(model, MASK, PAD, **settings, channel=channel)
    assert log_likelihoods(relay, ITEMS, 6, 1) == log_likelihoods(plain, ITEMS, 6, 1)
    assert greedy_matches(relay, ITEMS) == greedy_matches(plain, ITEMS)


@torch.no_grad()
def test_greedy_decoding_commits_what_the_second_forward_is_surest_of(relay_model) -> None:
    model, channel = relay_model(positions="all")
    context, length = (4, 5, 6), 4
    ids = torch.tensor([[*context, *[MASK] * length]])
    for _ in range(length):
        logits = _logits(model, channel, ids, None, 0, num_passes=2)
        logits[:, MASK] = -torch.inf
        sure, tokens = logits.softmax(-1).max(-1)
        place = max((j for j in range(3, 3 + length) if ids[0, j] == MASK), key=lambda j: float(sure[j]))
        ids[0, place] = tokens[place]
    target = tuple(ids[0, 3:].tolist())
    scorer = RelayScorer(model, MASK, PAD, channel=channel)
    assert greedy_matches(scorer, [Item(context, target)]) == [(True, length)]
    assert not greedy_matches(Scorer(model, MASK, PAD), [Item(context, target)])[0][0]


def test_forwards_are_counted(relay_model) -> None:
    model, channel = relay_model()
    counts = [
        RelayScorer(model, MASK, PAD, cfg_scale=scale, channel=channel, zeroed=zeroed).forwards_per_row
        for scale, zeroed in ((0.0, False), (1.0, False), (0.0, True), (1.0, True))
    ]
    assert counts == [2, 4, 1, 2]
