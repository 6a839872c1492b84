import itertools
import math
import random
from fractions import Fraction

import pytest
import torch

from memdlm.memory.config import MemoryConfig
from memdlm.memory.trajectory import loss_mask, pmc

MASK = 99
ROWS, LENGTH = 5, 23


def _batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (ROWS, LENGTH), generator=generator)
    maskable = torch.rand(ROWS, LENGTH, generator=generator) < 0.8
    share = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])[:, None]
    anchor = maskable & (torch.rand(ROWS, LENGTH, generator=generator) < share)
    noise = torch.rand(ROWS, LENGTH, generator=generator)
    return ids, maskable, anchor, noise


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
    ids, maskable, anchor, noise = _batch()
    config = MemoryConfig(num_inner_steps=steps, progressive_consistent_start_scale=scale)
    states = pmc(ids, maskable, anchor, noise=noise, mask_token_id=MASK, config=config)
    assert len(states) == steps
    for b in range(ROWS):
        naive = _naive_row(maskable[b].tolist(), anchor[b].tolist(), noise[b].tolist(), steps, scale)
        for step, state in enumerate(states):
            assert set(state.is_masked[b].nonzero()[:, 0].tolist()) == naive[step]
            # float32 division of small integers
            assert float(state.t[b]) == pytest.approx(len(naive[step]) / max(1, int(maskable[b].sum())), rel=1e-6)
            expected = torch.where(state.is_masked[b], MASK, ids[b])
            assert torch.equal(state.noised_ids[b], expected)


def test_pmc_ends_at_the_anchor_and_only_reveals() -> None:
    ids, maskable, anchor, noise = _batch(1)
    states = pmc(ids, maskable, anchor, noise=noise, mask_token_id=MASK, config=MemoryConfig(num_inner_steps=4))
    assert torch.equal(states[-1].is_masked, anchor) and states[-1].is_anchor and states[-1].next_is_masked is None
    for before, after in itertools.pairwise(states):
        assert not bool((after.is_masked & ~before.is_masked).any())
        assert before.next_is_masked is not None and torch.equal(before.next_is_masked, after.is_masked)
        assert not before.is_anchor


def test_one_step_is_the_pre_anchor_alone() -> None:
    ids, maskable, anchor, noise = _batch(2)
    single = pmc(ids, maskable, anchor, noise=noise, mask_token_id=MASK, config=MemoryConfig(num_inner_steps=1))
    double = pmc(ids, maskable, anchor, noise=noise, mask_token_id=MASK, config=MemoryConfig(num_inner_steps=2))
    assert torch.equal(single[0].is_masked, double[0].is_masked) and not single[0].is_anchor


def test_the_floor_is_exact() -> None:
    # 1.5 * (12 / 28) * 28 is 18, and 17.9999998 when 12 / 28 is rounded to float32 on the way.
    maskable = torch.ones(1, 28, dtype=torch.bool)
    anchor = torch.arange(28)[None] < 12
    ids = torch.zeros(1, 28, dtype=torch.int64)
    states = pmc(ids, maskable, anchor, noise=torch.rand(1, 28), mask_token_id=MASK, config=MemoryConfig())
    assert int(states[0].is_masked.sum()) == 18


def test_loss_masks() -> None:
    ids, maskable, anchor, noise = _batch(3)
    first, last = pmc(ids, maskable, anchor, noise=noise, mask_token_id=MASK, config=MemoryConfig())
    assert torch.equal(loss_mask(first, "student_masked"), first.is_masked)
    assert torch.equal(loss_mask(first, "newly_revealed"), first.is_masked & ~anchor)
    assert torch.equal(loss_mask(last, "newly_revealed"), anchor)


def test_a_row_does_not_depend_on_the_others() -> None:
    ids, maskable, anchor, noise = _batch(4)
    together = pmc(ids, maskable, anchor, noise=noise, mask_token_id=MASK, config=MemoryConfig(num_inner_steps=3))
    b = random.Random(0).randrange(ROWS)
    rows = (ids[b : b + 1], maskable[b : b + 1], anchor[b : b + 1])
    alone = pmc(*rows, noise=noise[b : b + 1], mask_token_id=MASK, config=MemoryConfig(num_inner_steps=3))
    assert all(torch.equal(a.is_masked[0], t.is_masked[b]) for a, t in zip(alone, together, strict=True))
