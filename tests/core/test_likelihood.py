"""Likelihoods by random masks, against sums over all masks, and greedy decoding, against decoding token by token."""

import itertools
import math

import pytest
import torch

from dllm.core.eval.likelihood import Item, Scorer, greedy_matches, log_likelihoods, mask_plan, num_states
from dllm.core.noising import make_generator
from dllm.core.samplers import MDLMSampler, MDLMSamplerConfig
from dllm.models.spec import spec_of

MASK, PAD = 39, 38


@pytest.fixture
def scorer(make_model):
    def make(family: str = "llada", **settings) -> Scorer:
        return Scorer(make_model(family).double(), MASK, PAD, **settings)

    return make


def _logprobs(scorer: Scorer, item: Item, subset, blank_context: bool = False) -> torch.Tensor:
    """log p of every target token, [T], with the tokens of `subset` masked; one plain forward."""
    ids = torch.tensor(item.context + item.target)
    start = len(item.context)
    for j in subset:
        ids[start + j] = MASK
    logits = scorer.lm(ids[None]).logits[0]
    if scorer.cfg_scale:
        ids[:start] = MASK
        free = scorer.lm(ids[None]).logits[0]
        logits = free + (1 + scorer.cfg_scale) * (logits - free)
    return logits.log_softmax(-1)[start:].gather(1, torch.tensor(item.target)[:, None])[:, 0]


@torch.no_grad()
def _bound(scorer: Scorer, item: Item) -> float:
    """mean over k, mean over the subsets of k tokens, of (T / k) * sum of their log-probabilities."""
    length = len(item.target)
    by_count = []
    for k in range(1, length + 1):
        values = [
            length / k * float(_logprobs(scorer, item, subset)[list(subset)].sum())
            for subset in itertools.combinations(range(length), k)
        ]
        by_count.append(sum(values) / len(values))
    return sum(by_count) / length


@pytest.mark.parametrize("family", ["llada", "llada_moe"])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_with_enough_states_the_likelihood_is_the_bound_itself(scorer, family, cfg_scale):
    model = scorer(family, cfg_scale=cfg_scale, batch_size=3)
    items = [Item((4, 5, 6), (7, 8, 9)), Item((1,), (2, 3)), Item((9, 8, 7, 6), (5, 4, 3, 2))]
    values = log_likelihoods(model, items, mc_num=15, seed=0)
    for item, value in zip(items, values, strict=True):
        assert value == pytest.approx(_bound(model, item), abs=1e-9)


def test_one_token_is_exact_and_an_empty_target_is_certain(scorer):
    model = scorer()
    one = Item((4, 5, 6), (7,))
    with torch.no_grad():
        expected = float(_logprobs(model, one, [0])[0])
    assert log_likelihoods(model, [one, Item((4,), ())], mc_num=1, seed=3) == [pytest.approx(expected, abs=1e-10), 0.0]


def test_drawn_states_give_the_bound_on_average():
    """Over many seeds; each state's value is a fixed table, so no model is asked."""
    length, mc_num, num_seeds = 4, 6, 4000
    table = torch.rand(2**length, length, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    powers = 2 ** torch.arange(length)

    def value(plan) -> float:
        rows = table[(plan.is_masked * powers).sum(1)] * plan.is_masked
        return float((plan.weights * rows.sum(1)).sum())

    exact = 0.0
    for k in range(1, length + 1):
        for subset in itertools.combinations(range(length), k):
            row = table[sum(2**j for j in subset)]
            exact += sum(float(row[j]) for j in subset) / (k * math.comb(length, k))
    drawn = torch.tensor([value(mask_plan(length, mc_num, make_generator(seed))) for seed in range(num_seeds)])
    error = float(drawn.std()) / num_seeds**0.5
    assert error < 0.01
    assert abs(float(drawn.mean()) - exact) < 4 * error
    enumerated = mask_plan(length, 2**length - 1, make_generator(0))
    assert value(enumerated) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize(("length", "mc_num"), [(7, 14), (5, 4), (9, 128), (64, 3)])
def test_drawn_counts_are_spread_over_one_to_the_length(length, mc_num):
    starts = set()
    for seed in range(40):
        plan = mask_plan(length, mc_num, make_generator(seed))
        counts = plan.is_masked.sum(1)
        assert plan.is_masked.shape == (mc_num, length) and int(counts.min()) >= 1
        assert torch.allclose(plan.weights, length / (counts.double() * mc_num))
        seen = torch.bincount(counts, minlength=length + 1)[1:]
        # Equal strides: no count occurs more than once more often than another.
        assert int(seen.max()) - int(seen.min()) <= 1
        starts.add(int(counts[0]))
    assert len(starts) > min(length, 40) // 2


def test_where_all_states_fit_each_is_there_once():
    assert [num_states(length, 8) for length in (0, 1, 2, 3, 4, 500)] == [0, 1, 3, 7, 8, 8]
    plan = mask_plan(3, 7, make_generator(0))
    assert sorted(map(tuple, plan.is_masked.tolist())) == sorted(
        state for state in itertools.product([False, True], repeat=3) if any(state)
    )
    for state, weight in zip(plan.is_masked, plan.weights, strict=True):
        k = int(state.sum())
        assert float(weight) == pytest.approx(1 / (k * math.comb(3, k)))


@pytest.mark.parametrize("family", ["llada", "llada_moe"])
def test_a_batch_of_states_equals_states_one_by_one(scorer, family):
    items = [Item((4, 5, 6, 7, 8), (7, 8, 9, 1, 2)), Item((1,), (2,)), Item((9,), (5, 4, 3, 2, 1, 6, 7))]
    together = log_likelihoods(scorer(family, batch_size=5), items, mc_num=12, seed=1)
    alone = [log_likelihoods(scorer(family), [item], mc_num=12, seed=1)[0] for item in reversed(items)]
    assert together == pytest.approx(alone[::-1], abs=1e-9)
    other = log_likelihoods(scorer(family, batch_size=5), items, mc_num=12, seed=2)
    assert other[0] != pytest.approx(together[0], abs=1e-6)  # drawn
    assert other[1] == pytest.approx(together[1], abs=1e-9)  # one token: nothing is drawn


def _greedy(scorer: Scorer, context: tuple[int, ...], length: int) -> list[list[int]]:
    """The tokens after each of `length` steps, decoded with one plain forward per step."""
    ids = torch.tensor([*context, *[MASK] * length])
    states = []
    for _ in range(length):
        logits = scorer.lm(ids[None]).logits[0]
        logits[:, MASK] = -torch.inf
        sure, tokens = logits.softmax(-1).max(-1)
        place = max((j for j in range(len(context), len(ids)) if ids[j] == MASK), key=lambda j: (float(sure[j]), -j))
        ids[place] = tokens[place]
        states.append(ids[len(context) :].tolist())
    return states


@torch.no_grad()
@pytest.mark.parametrize("family", ["llada", "llada_moe"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_decoding_of_a_target(scorer, family, batch_size):
    model = scorer(family, batch_size=batch_size)
    items, expected = [], []
    for context, length in (((4, 5, 6), 5), ((1,), 1), ((7, 7, 2, 9, 11, 3), 3)):
        states = _greedy(model, context, length)
        items.append(Item(context, tuple(states[-1])))
        expected.append((True, length))
        for step in range(length):
            # Wrong at the token that this step commits: the row ends there.
            before = [MASK] * length if step == 0 else states[step - 1]
            place = next(j for j in range(length) if states[step][j] != before[j])
            wrong = list(states[-1])
            wrong[place] = (wrong[place] + 1) % 30
            items.append(Item(context, tuple(wrong)))
            expected.append((False, step + 1))
    items.append(Item((3,), ()))
    expected.append((True, 0))
    assert greedy_matches(model, items) == expected


def test_greedy_decoding_is_what_the_sampler_does(scorer, make_model):
    model = scorer("llada", batch_size=2)
    sampler = MDLMSampler.__new__(MDLMSampler)
    sampler.model, sampler.lm, sampler.spec = model.lm, model.lm, spec_of(model.lm)
    sampler.mask_token_id, sampler.pad_token_id, sampler.eos_token_id, sampler.end_token_ids = MASK, PAD, 37, [37]
    context = (4, 5, 6, 11)
    answer = sampler.sample([context], MDLMSamplerConfig(max_new_tokens=6)).answers[0].tolist()
    assert greedy_matches(model, [Item(context, tuple(answer))]) == [(True, 6)]
