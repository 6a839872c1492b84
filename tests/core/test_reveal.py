import math

import pytest
import torch

from dllm.core.reveal import (
    add_gumbel_noise,
    choose_above,
    choose_in_blocks,
    choose_positions,
    choose_within,
    confidence,
    earliest_part,
    get_num_transfer_tokens,
    hashed_uniform,
    mix_keys,
    narrow,
    propose,
)


def test_schedule_sums_to_the_masked_count_and_front_loads_the_remainder() -> None:
    counts = torch.tensor([0, 1, 5, 7, 12])
    schedule = get_num_transfer_tokens(counts, 5)
    assert schedule.shape == (5, 5)
    assert torch.equal(schedule.sum(dim=1), counts)
    assert schedule[3].tolist() == [2, 2, 1, 1, 1]
    with pytest.raises(ValueError, match="at least 1"):
        get_num_transfer_tokens(counts, 0)


def test_choose_positions_equals_sorting_each_row() -> None:
    scores = torch.rand(4, 9, dtype=torch.float64)
    allowed = torch.rand(4, 9) < 0.6
    counts = torch.tensor([0, 2, 3, 9])
    chosen = choose_positions(scores, allowed, counts)
    for b in range(4):
        candidates = sorted((p for p in range(9) if allowed[b, p]), key=lambda p: -float(scores[b, p]))
        assert sorted(chosen[b].nonzero()[:, 0].tolist()) == sorted(candidates[: int(counts[b])])


def test_choose_positions_breaks_ties_by_position() -> None:
    chosen = choose_positions(torch.zeros(1, 5), torch.tensor([[False, True, True, True, True]]), torch.tensor([2]))
    assert chosen[0].tolist() == [False, True, True, False, False]


def test_choose_above_always_makes_progress() -> None:
    scores = torch.tensor([[0.1, 0.3, 0.2], [0.95, 0.99, 0.1], [0.5, 0.5, 0.5]])
    allowed = torch.tensor([[True, True, True], [True, True, True], [False, False, False]])
    chosen = choose_above(scores, allowed, 0.9)
    assert chosen.tolist() == [[False, True, False], [True, True, False], [False, False, False]]


def test_confidences_against_naive() -> None:
    logits = torch.randn(2, 3, 5)
    tokens = logits.argmax(dim=-1)
    p = torch.softmax(logits.double(), dim=-1)
    # float32 softmax against float64.
    tolerance = {"atol": 1e-6}
    best = p.sort(dim=-1, descending=True).values
    assert torch.allclose(confidence(logits, tokens, "low_confidence").double(), best[..., 0], **tolerance)
    assert torch.allclose(confidence(logits, tokens, "margin").double(), best[..., 0] - best[..., 1], **tolerance)
    assert torch.allclose(confidence(logits, tokens, "entropy").double(), (p * p.log()).sum(-1), **tolerance)
    generator = torch.Generator().manual_seed(1)
    drawn = confidence(logits, tokens, "random", generator)
    assert torch.equal(drawn, torch.rand(2, 3, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="low_confidence, random, margin, entropy"):
        confidence(logits, tokens, "best")  # pyright: ignore


def test_gumbel_noise_draws_nothing_at_temperature_zero_and_samples_the_softmax_otherwise() -> None:
    logits = torch.log(torch.tensor([0.2, 0.5, 0.3]))
    state = torch.random.get_rng_state()
    assert add_gumbel_noise(logits, 0.0) is logits
    assert torch.equal(state, torch.random.get_rng_state())
    generator = torch.Generator().manual_seed(0)
    samples = add_gumbel_noise(logits.expand(20_000, 3), 1.0, generator).argmax(dim=-1)
    share = torch.bincount(samples, minlength=3) / 20_000
    # Four standard deviations of a share near one half: 4 * sqrt(0.25 / 20000) = 0.014.
    assert torch.allclose(share, torch.tensor([0.2, 0.5, 0.3]), atol=0.014)


def test_hashed_draws_are_uniform_and_follow_from_their_keys() -> None:
    keys = torch.arange(100_000) * 7 - 50_000
    drawn = hashed_uniform(mix_keys(keys, 3))
    assert drawn.dtype == torch.float64 and float(drawn.min()) > 0 and float(drawn.max()) < 1
    counts = torch.histc(drawn, bins=100, min=0, max=1)
    # Chi-square with 99 degrees of freedom: mean 99, standard deviation 14.
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 99 + 5 * 14
    assert abs(float(torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1])) < 5 / 100_000**0.5
    assert torch.equal(drawn[17:20], hashed_uniform(mix_keys(keys[17:20], 3)))
    assert not torch.equal(drawn, hashed_uniform(mix_keys(keys, 4)))


def test_splitmix_equals_its_definition_in_whole_numbers() -> None:
    def naive(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    keys = [0, 1, 2**62 + 12345, 2**63 + 99, 2**64 - 1]
    signed = torch.tensor([key - 2**64 if key >= 2**63 else key for key in keys])
    wanted = [((naive(key) >> 11) + 0.5) * 2.0**-53 for key in keys]
    assert hashed_uniform(signed).tolist() == wanted
    golden = 0x9E3779B97F4A7C15
    mixed = [int(value) % 2**64 for value in mix_keys(signed, 4)]
    assert mixed == [naive((key + golden * 5) % 2**64) for key in keys]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_proposals_at_a_temperature_are_samples(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    banned = torch.tensor([1])
    keys = mix_keys(torch.tensor(5), torch.arange(40_000))
    tokens, scores = propose(logits.expand(40_000, 4), "low_confidence", temperature, keys, banned)
    wanted = torch.softmax(logits[[0, 2, 3]] / temperature, dim=0)
    share = torch.bincount(tokens, minlength=4)[[0, 2, 3]] / 40_000
    torch.testing.assert_close(share, wanted, atol=4 * 0.5 / 200, rtol=0)  # four standard deviations at most
    plain = torch.zeros(4).index_copy(0, torch.tensor([0, 2, 3]), torch.softmax(logits[[0, 2, 3]], dim=0))
    torch.testing.assert_close(scores, plain[tokens])


@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy"])
def test_proposals_in_chunks_equal_a_naive_softmax(remasking: str) -> None:
    logits = torch.randn(2100, 501, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = logits.clone()
    tokens, scores = propose(logits, remasking, banned=torch.tensor([7, 11]))  # pyright: ignore
    masked = logits.clone()
    masked[:, [7, 11]] = -torch.inf
    p = torch.softmax(masked, dim=1)
    best = p.sort(dim=1, descending=True).values
    naive = {"low_confidence": best[:, 0], "margin": best[:, 0] - best[:, 1], "entropy": torch.xlogy(p, p).sum(dim=1)}
    assert torch.equal(tokens, p.argmax(dim=1))
    torch.testing.assert_close(scores, naive[remasking])
    assert torch.equal(logits, before)


def test_rows_may_have_their_own_number_of_steps() -> None:
    counts, steps = torch.tensor([7, 3, 0, 5]), torch.tensor([3, 1, 2, 5])
    table = get_num_transfer_tokens(counts, steps)
    for row in range(4):
        own = get_num_transfer_tokens(counts[row : row + 1], int(steps[row]))[0].tolist()
        assert table[row].tolist() == own + [0] * (5 - len(own))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        get_num_transfer_tokens(counts, torch.tensor([1, 0, 1, 1]))


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_proposals_draw_what_their_keys_say(remasking: str) -> None:
    logits = torch.randn(300, 11, generator=torch.Generator().manual_seed(1))
    keys = mix_keys(torch.tensor(9), torch.arange(300))
    tokens, scores = propose(logits, remasking, 0.7, keys)  # pyright: ignore
    uniform = hashed_uniform(mix_keys(keys[:, None], torch.arange(1, 12)))
    assert torch.equal(tokens, (logits.double() / 0.7 - torch.log(-torch.log(uniform))).argmax(dim=1))
    if remasking == "random":  # a draw of its own, not one that has decided the token
        assert torch.equal(scores, hashed_uniform(mix_keys(keys, 0)))
    else:
        torch.testing.assert_close(scores, torch.softmax(logits, dim=1).gather(1, tokens[:, None])[:, 0])


def test_proposals_of_half_precision_logits_are_computed_in_float32() -> None:
    logits = (torch.randn(50, 301, generator=torch.Generator().manual_seed(1)) * 0.3).bfloat16()
    for remasking in ("low_confidence", "margin", "entropy"):
        tokens, scores = propose(logits, remasking)  # pyright: ignore
        wide_tokens, wide_scores = propose(logits.float(), remasking)  # pyright: ignore
        assert scores.dtype == torch.float32
        assert torch.equal(tokens, wide_tokens) and torch.equal(scores, wide_scores)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, None), (None, 0.6), (4, 0.7), (2, 0.99), (50, 0.01)])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_narrowing_equals_sorting_each_row(top_k: int | None, top_p: float | None, temperature: float) -> None:
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    narrowed = narrow(logits, temperature, top_k, top_p)
    for row, kept in zip(logits.tolist(), narrowed, strict=True):
        best = sorted(range(9), key=lambda token: -row[token])[: top_k or 9]
        if top_p is not None:  # shares among the top k
            weights = [math.exp(row[token] / temperature) for token in best]
            share, enough = 0.0, 0
            while share < top_p:
                share += weights[enough] / sum(weights)
                enough += 1
            best = best[:enough]
        assert {token for token in range(9) if math.isfinite(kept[token])} == set(best)
        assert all(float(kept[token]) == row[token] for token in best)


def test_ties_do_not_widen_the_top_k() -> None:
    assert int(torch.isfinite(narrow(torch.zeros(1, 5), 1.0, 2, None)).sum()) == 2


@pytest.mark.parametrize("budget", [0.0, 0.15, 0.6, 2.0, 50.0])
def test_choose_within_equals_adding_up_row_by_row(budget: float) -> None:
    generator = torch.Generator().manual_seed(6)
    scores = torch.rand(7, 11, generator=generator, dtype=torch.float64)
    allowed = torch.rand(7, 11, generator=generator) < 0.7
    allowed[2] = False
    for value in (budget, torch.tensor(budget)):
        chosen = choose_within(scores, allowed, value)
        for b in range(7):
            candidates = sorted((p for p in range(11) if allowed[b, p]), key=lambda p: 1 - float(scores[b, p]))
            wanted, total = candidates[:1], 0.0
            for number, place in enumerate(candidates, start=1):
                total += 1 - float(scores[b, place])
                if total >= budget:
                    break
                wanted = candidates[:number]
            assert sorted(chosen[b].nonzero()[:, 0].tolist()) == sorted(wanted)


def test_choose_within_at_its_borders() -> None:
    allowed = torch.tensor([[False, True, True, True, True]])
    # Strictly below: 0.25 + 0.25 does not go into 0.5. Ties go to the lower position.
    quarter = torch.full((1, 5), 0.75)
    assert choose_within(quarter, allowed, 0.5)[0].tolist() == [False, True, False, False, False]
    assert choose_within(quarter, allowed, 0.5001)[0].tolist() == [False, True, True, False, False]
    # Scores whose difference 1 - score does not show still have an order, that of `choose_positions`.
    tiny = torch.tensor([[0.0, 1e-12, 2e-12, 0.0, 0.0]])
    best = choose_positions(tiny, allowed, torch.tensor([1]))
    assert torch.equal(choose_within(tiny, allowed, 0.1), best) and bool(best[0, 2])
    # A probability that rounding put above 1 does not make room for others.
    above = torch.tensor([[0.5, 1 + 1e-3, 1 + 1e-3, 0.9, 0.2]])
    assert choose_within(above, allowed, 0.1)[0].tolist() == [False, True, True, False, False]


RULES = {
    "above": lambda scores, allowed: choose_above(scores, allowed, 0.85),
    "within": lambda scores, allowed: choose_within(scores, allowed, 0.4),
    "best": lambda scores, allowed: choose_positions(scores, allowed, torch.ones(len(scores), dtype=torch.int64)),
}


@pytest.mark.parametrize("part_size", [None, 1, 2, 4])
@pytest.mark.parametrize("length", [3, 4, 13])
@pytest.mark.parametrize("name", RULES)
def test_rules_in_blocks_equal_a_loop_over_the_blocks(name: str, length: int, part_size: int | None) -> None:
    generator = torch.Generator().manual_seed(length)
    scores = torch.rand(5, length, generator=generator, dtype=torch.float64)
    allowed = torch.rand(5, length, generator=generator) < 0.6
    allowed[1] = False
    chosen = choose_in_blocks(RULES[name], scores, allowed, 4, part_size)
    assert chosen.shape == (5, length)
    for b in range(5):
        for low in range(0, length, 4):
            block = range(low, min(low + 4, length))
            places = [p for p in block if allowed[b, p]]
            if part_size is not None and places:
                first = (places[0] - low) // part_size
                places = [p for p in places if (p - low) // part_size == first]
            only = torch.tensor([[p in places for p in block]])
            wanted = RULES[name](scores[b : b + 1, low : low + 4], only)[0].tolist()
            assert chosen[b, low : low + 4].tolist() == wanted
            assert any(wanted) == bool(places)


def test_the_earliest_part_with_masks() -> None:
    allowed = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    wanted = torch.tensor([[0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    assert torch.equal(earliest_part(allowed, 2), wanted)


def test_blocks_that_cannot_be_cut() -> None:
    scores, allowed = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        choose_in_blocks(RULES["best"], scores, allowed, 0)
    for part_size in (3, 0, 8):
        with pytest.raises(ValueError, match=f"part_size={part_size} does not divide block_size=4"):
            choose_in_blocks(RULES["best"], scores, allowed, 4, part_size)
