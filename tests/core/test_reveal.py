import pytest
import torch

from dllm.core.reveal import (
    add_gumbel_noise,
    choose_above,
    choose_positions,
    confidence,
    get_num_transfer_tokens,
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
