import random

import torch

from dllm.core.noising import derive_seed, draw_noise, draw_times, flat_positions, make_generator, mask_tokens
from dllm.core.schedulers import CosineAlphaScheduler, LinearAlphaScheduler

MASK = 99


def _generators(count: int, purpose: str = "outer") -> list[torch.Generator]:
    return [make_generator(7, row, purpose) for row in range(count)]


def test_mask_tokens_equals_a_loop() -> None:
    rows, length = 3, 7
    ids = torch.randint(0, 11, (rows, length))
    maskable = torch.rand(rows, length) < 0.7
    t = torch.tensor([0.2, 0.6, 0.95], dtype=torch.float64)
    noise = torch.rand(rows, length, dtype=torch.float64)
    scheduler = CosineAlphaScheduler()
    state = mask_tokens(ids, maskable, t, noise=noise, scheduler=scheduler, mask_token_id=MASK)
    for b in range(rows):
        for p in range(length):
            masked = bool(maskable[b, p]) and float(noise[b, p]) < 1 - float(scheduler.alpha(t[b]))
            assert bool(state.is_masked[b, p]) == masked
            assert int(state.noised_ids[b, p]) == (MASK if masked else int(ids[b, p]))
    wanted = [b * length + p for b in range(rows) for p in range(length) if state.is_masked[b, p]]
    assert flat_positions(state.is_masked).tolist() == wanted


def test_share_of_masked_positions_is_one_minus_alpha() -> None:
    ids = torch.zeros(400, 50, dtype=torch.int64)
    t = torch.full((400,), 0.3)
    noise = torch.rand(400, 50, generator=make_generator("share"))
    state = mask_tokens(
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        t,
        noise=noise,
        scheduler=LinearAlphaScheduler(),
        mask_token_id=MASK,
    )
    # 20,000 draws: four standard deviations are 4 * sqrt(0.3 * 0.7 / 20000) = 0.013.
    assert abs(float(state.is_masked.float().mean()) - 0.3) < 0.013


def test_draws_of_a_row_do_not_depend_on_batch_or_padding_or_global_state() -> None:
    wide = draw_noise(_generators(3), 37)
    random.seed(1)
    torch.manual_seed(1)
    narrow = draw_noise([make_generator(7, 2, "outer")], 11)
    assert torch.equal(wide[2, :11], narrow[0])
    times = draw_times(_generators(5), 1e-3)
    assert torch.equal(times[4], draw_times([make_generator(7, 4, "outer")], 1e-3)[0])
    assert bool(((times >= 1e-3) & (times <= 1)).all())


def test_seeds_differ_in_every_part_and_are_fixed() -> None:
    seeds = {derive_seed(a, b, c) for a in (1, 2) for b in ("x", "y") for c in range(5)}
    assert len(seeds) == 20
    # Written down once: a change would silently change every mask of a resumed run.
    assert derive_seed(42, "train", 0, 3, "outer") == 4494995019406898045
