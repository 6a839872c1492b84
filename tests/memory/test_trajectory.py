import itertools
import math
import random
from fractions import Fraction

import pytest
import torch

from memdlm.memory.config import MemoryConfig
from memdlm.memory.trajectory import (
    TRAJECTORIES,
    disjoint,
    loss_mask,
    no_progressive,
    pmc,
    pre_only,
    progressive_memory,
)

ROWS, LENGTH = 5, 23


def _batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    maskable = torch.rand(ROWS, LENGTH, generator=generator) < 0.8
    share = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])[:, None]
    anchor = maskable & (torch.rand(ROWS, LENGTH, generator=generator) < share)
    noise = torch.rand(ROWS, LENGTH, generator=generator)
    t = torch.rand(ROWS, generator=generator)
    return maskable, anchor, t, noise


def _naive_row(maskable: list[bool], anchor: list[bool], noise: list[float], steps: int, scale: float):
    """Masks of one row as sets of positions, in exact fractions."""
    m, base = sum(maskable), {p for p, hit in enumerate(anchor) if hit}
    ratio = Fraction(len(base), max(1, m))
    first = int(m * min(Fraction(1), max(Fraction(scale) * ratio, ratio)))
    extras = sorted((p for p in range(len(noise)) if maskable[p] and p not in base), key=lambda p: noise[p])
    count = first - len(base)
    masks = []
    for step in range(steps):
        masks.append(base | set(extras[:count]))
        left = steps - 1 - step
        if left:
            count -= math.ceil(count / left)
    return masks


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [1.0, 1.5, 2.7])
def test_pmc_equals_the_naive_version(steps: int, scale: float) -> None:
    maskable, anchor, t, noise = _batch()
    config = MemoryConfig(num_inner_steps=steps, progressive_consistent_start_scale=scale)
    states = pmc(maskable, anchor, t, noise, config)
    assert len(states) == steps
    for b in range(ROWS):
        naive = _naive_row(maskable[b].tolist(), anchor[b].tolist(), noise[b].tolist(), steps, scale)
        for step, state in enumerate(states):
            assert set(state.is_masked[b].nonzero()[:, 0].tolist()) == naive[step]
            # float32 division of small integers
            assert float(state.t[b]) == pytest.approx(len(naive[step]) / max(1, int(maskable[b].sum())), rel=1e-6)


def test_pmc_ends_at_the_anchor_and_only_reveals() -> None:
    maskable, anchor, t, noise = _batch(1)
    states = pmc(maskable, anchor, t, noise, MemoryConfig(num_inner_steps=4))
    assert torch.equal(states[-1].is_masked, anchor) and states[-1].next_is_masked is None
    for before, after in itertools.pairwise(states):
        assert not bool((after.is_masked & ~before.is_masked).any())
        assert before.next_is_masked is not None and torch.equal(before.next_is_masked, after.is_masked)


def test_one_step_is_the_pre_anchor_alone() -> None:
    batch = _batch(2)
    (single,) = pmc(*batch, MemoryConfig(num_inner_steps=1))
    double = pmc(*batch, MemoryConfig(num_inner_steps=2))
    (alone,) = pre_only(*batch, MemoryConfig(masking_strategy="pre_only"))
    assert torch.equal(single.is_masked, double[0].is_masked) and torch.equal(alone.is_masked, double[0].is_masked)
    assert torch.equal(alone.t, single.t)
    # The same state; what differs is what a teacher sees next: the anchor, or (nothing follows) the clean input.
    assert single.next_is_masked is None and torch.equal(alone.next_is_masked, batch[1])


def test_no_progressive_is_the_anchor_at_the_outer_time() -> None:
    maskable, anchor, t, noise = _batch(5)
    (state,) = no_progressive(maskable, anchor, t, noise, MemoryConfig(masking_strategy="no_progressive"))
    assert torch.equal(state.is_masked, anchor) and torch.equal(state.t, t) and state.next_is_masked is None


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("last", [0.2, 0.8])
def test_progressive_memory_falls_in_equal_steps_to_the_prompt_ratio(steps: int, last: float) -> None:
    maskable, anchor, t, noise = _batch(6)
    config = MemoryConfig(masking_strategy="progressive_memory", num_inner_steps=steps, prompt_mask_ratio=last)
    states = progressive_memory(maskable, anchor, t, noise, config)
    assert len(states) == steps
    for step, state in enumerate(states):
        ratio = last if steps == 1 else 0.8 + (last - 0.8) * step / (steps - 1)
        assert state.t.tolist() == pytest.approx([ratio] * ROWS, rel=1e-6)  # float32
        for b, p in itertools.product(range(ROWS), range(LENGTH)):
            assert bool(state.is_masked[b, p]) == (bool(maskable[b, p]) and float(noise[b, p]) < ratio)
    for before, after in itertools.pairwise(states):
        assert not bool((after.is_masked & ~before.is_masked).any())
    other = progressive_memory(maskable, ~anchor & maskable, t, noise, config)
    assert all(torch.equal(a.is_masked, b.is_masked) for a, b in zip(states, other, strict=True))


@pytest.mark.parametrize("scale", [1.2, 1.5, 3.0])
def test_disjoint_asks_for_a_fresh_share_of_what_is_visible(scale: float) -> None:
    maskable, anchor, t, _ = _batch(7)
    noise = torch.rand(3, ROWS, LENGTH)
    config = MemoryConfig(inner_target="disjoint", num_inner_steps=3, progressive_consistent_start_scale=scale)
    states = disjoint(maskable, anchor, t, noise, config)
    assert len(states) == 3
    for state, draws in zip(states, noise, strict=True):
        assert torch.equal(state.next_is_masked, anchor) and bool((state.is_masked | ~anchor).all())
        for b in range(ROWS):
            visible = sorted(
                (p for p in range(LENGTH) if maskable[b, p] and not anchor[b, p]), key=lambda p: float(draws[b, p])
            )
            share = 1 - 1 / Fraction(str(scale))
            count = max(1, math.floor(len(visible) * share)) if visible else 0
            assert set((state.is_masked & ~anchor)[b].nonzero()[:, 0].tolist()) == set(visible[:count])
            assert float(state.t[b]) == pytest.approx((count + int(anchor[b].sum())) / max(1, int(maskable[b].sum())))
    assert not torch.equal(states[0].is_masked, states[1].is_masked)


def test_the_floor_is_exact() -> None:
    # 1.5 * (12 / 28) * 28 is 18, and 17.9999998 when 12 / 28 is rounded to float32 on the way.
    maskable = torch.ones(1, 28, dtype=torch.bool)
    anchor = torch.arange(28)[None] < 12
    states = pmc(maskable, anchor, torch.rand(1), torch.rand(1, 28), MemoryConfig())
    assert int(states[0].is_masked.sum()) == 18


def test_loss_masks() -> None:
    maskable, anchor, t, noise = _batch(3)
    first, last = pmc(maskable, anchor, t, noise, MemoryConfig())
    assert torch.equal(loss_mask(first, "student_masked"), first.is_masked)
    assert torch.equal(loss_mask(first, "newly_revealed"), first.is_masked & ~anchor)
    assert torch.equal(loss_mask(last, "newly_revealed"), anchor)


@pytest.mark.parametrize("name", sorted(TRAJECTORIES))
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    batch = _batch(4)
    config = MemoryConfig(masking_strategy=name)  # pyright: ignore[reportArgumentType]
    together = TRAJECTORIES[name](*batch, config)
    b = random.Random(0).randrange(ROWS)
    alone = TRAJECTORIES[name](*(value[b : b + 1] for value in batch), config)
    assert all(torch.equal(a.is_masked[0], t.is_masked[b]) for a, t in zip(alone, together, strict=True))
    assert all(torch.equal(a.t[0], t.t[b]) for a, t in zip(alone, together, strict=True))
