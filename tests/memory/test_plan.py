"""What the collator hands to the inner loop, for every inner target."""

import pytest
import torch

from dllm.core.schedulers import LinearAlphaScheduler
from dllm.data.collators import NoisingCollator, PaddingCollator
from memdlm.memory.collator import MemoryCollator, inner_plan
from memdlm.memory.config import MemoryConfig
from memdlm.memory.plan import plan_prompts

MASK, PAD = 39, 2
PROMPTS = (2, 4, 3)


def _rows(lengths=(9, 6, 7), prompts=PROMPTS) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for index, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        ids = [*torch.randint(3, 38, (length - 1,), generator=generator).tolist(), PAD]  # ends with the pad token
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "example_id": index})
    return made


def _collator(config: MemoryConfig, pad=None, **settings) -> MemoryCollator:
    options = {"scheduler": LinearAlphaScheduler(), "mask_token_id": MASK, "time_epsilon": 0.3, **settings}
    return MemoryCollator(pad or PaddingCollator(PAD), config=config, **options)


def _asked(plan, step) -> torch.Tensor:
    flat = torch.zeros(plan.num_rows * plan.length, dtype=torch.bool)
    flat[step.loss_positions] = True
    return flat.view(plan.num_rows, plan.length)


@pytest.mark.parametrize("target", ["response", "prompt", "disjoint"])
def test_the_outer_draws_are_those_of_plain_training(target: str) -> None:
    options = {"scheduler": LinearAlphaScheduler(), "mask_token_id": MASK, "time_epsilon": 0.3}
    plain = NoisingCollator(PaddingCollator(PAD), **options)(_rows())
    batch = _collator(MemoryConfig(inner_target=target))(_rows())  # pyright: ignore[reportArgumentType]
    assert set(batch) == {*plain, "memory_plan"}
    assert all(torch.equal(batch[name], value) for name, value in plain.items())


def test_response_ends_at_the_outer_state() -> None:
    batch = _collator(MemoryConfig(num_inner_steps=3))(_rows(lengths=(40, 30, 35)))
    plan = inner_plan(batch)
    assert len(plan.states) == len(plan.steps) == 3 and not plan.apart
    assert plan.anchor == 2 and torch.equal(plan.states[2], batch["noised_ids"])
    for step in plan.steps:
        state = plan.states[step.student]
        assert step.teacher is None
        assert torch.equal(_asked(plan, step), state == MASK)
        assert torch.equal(step.targets, batch["input_ids"].flatten()[step.loss_positions])
        assert torch.equal(state[state != MASK], batch["input_ids"][state != MASK])


def test_a_teacher_sees_the_next_state_and_at_last_the_clean_input() -> None:
    config = MemoryConfig(num_inner_steps=3, inner_loss_type="distill")
    batch = _collator(config)(_rows(lengths=(40, 30, 35)))
    plan = inner_plan(batch)
    assert [(step.student, step.teacher) for step in plan.steps] == [(0, 1), (1, 2), (2, 3)]
    assert torch.equal(plan.states[3], batch["input_ids"]) and plan.anchor == 2


def test_teachers_of_the_single_states() -> None:
    single = inner_plan(
        _collator(MemoryConfig(masking_strategy="pre_only", inner_loss_type="distill_hidden"))(batch_rows := _rows())
    )
    assert (single.steps[0].student, single.steps[0].teacher, single.anchor) == (0, 1, 1)
    alone = inner_plan(_collator(MemoryConfig(num_inner_steps=1, inner_loss_type="distill"))(batch_rows))
    assert torch.equal(alone.states[0], single.states[0]) and alone.anchor is None
    assert not bool((alone.states[1] == MASK).any())  # the clean input
    anchor = inner_plan(_collator(MemoryConfig(masking_strategy="no_progressive"))(batch_rows))
    assert len(anchor.states) == 1 and anchor.anchor == 0


def test_equal_states_are_run_once() -> None:
    # s = 1: the first state masks no more than the anchor does.
    plan = inner_plan(_collator(MemoryConfig(progressive_consistent_start_scale=1.0))(_rows()))
    assert len(plan.states) == 1 and plan.anchor == 0 and [step.student for step in plan.steps] == [0, 0]


def test_the_plan_survives_being_taken_apart_and_moved() -> None:
    batch = _collator(MemoryConfig(inner_loss_type="distill", scope="row"))(_rows())
    plan = inner_plan(batch)
    moved = plan.to("meta")
    assert all(state.is_meta for state in moved.states) and all(step.targets.is_meta for step in moved.steps)
    assert moved.row_seeds == plan.row_seeds and len(set(plan.row_seeds)) == 3
    assert [step.teacher for step in moved.steps] == [step.teacher for step in plan.steps]


def test_row_seeds_depend_on_stream_epoch_and_example_alone() -> None:
    config = MemoryConfig(scope="row")
    collator = _collator(config)
    first = inner_plan(collator(_rows())).row_seeds
    assert inner_plan(collator(_rows()[1:])).row_seeds == first[1:]
    collator.set_epoch(1)
    assert not set(inner_plan(collator(_rows())).row_seeds) & set(first)
    assert not set(inner_plan(_collator(config, stream="eval")(_rows())).row_seeds) & set(first)


# --- prompt ---


def test_a_prompt_is_what_stands_before_the_first_label() -> None:
    config = MemoryConfig(inner_target="prompt", prompt_mask_ratio=0.5, num_inner_steps=3)
    batch = _collator(config)(_rows())
    plan = inner_plan(batch)
    assert plan.apart and plan.anchor is None and plan.length == max(PROMPTS)
    is_prompt = torch.arange(plan.length) < torch.tensor(PROMPTS)[:, None]
    assert plan.attention_mask is not None and torch.equal(plan.attention_mask.bool(), is_prompt)
    for step in plan.steps:
        asked = _asked(plan, step)
        assert not bool((asked & ~is_prompt).any())
        state = plan.states[step.student]
        assert bool((state[~is_prompt] == MASK).all())
        assert torch.equal(asked, (state == MASK) & is_prompt)
        assert torch.equal(step.targets, batch["input_ids"][:, : plan.length][asked])


def test_prompts_of_one_length_need_no_mask() -> None:
    plan = inner_plan(_collator(MemoryConfig(inner_target="prompt"))(_rows(prompts=(3, 3, 3))))
    assert plan.attention_mask is None and plan.length == 3


def test_a_prompt_that_starts_behind_hidden_positions_is_whole() -> None:
    def pad(rows) -> dict:
        made = PaddingCollator(PAD)(rows)
        mask = torch.ones_like(made["input_ids"])
        mask[0, :2] = 0
        return {**made, "attention_mask": mask}

    batch = _collator(MemoryConfig(inner_target="prompt"), pad=pad)(_rows(prompts=(6, 4, 3)))
    plan = inner_plan(batch)
    assert plan.attention_mask is not None and plan.length == 6
    assert plan.attention_mask[0].tolist() == [0, 0, 1, 1, 1, 1]
    shown = plan.states[0][0, 2:]
    assert torch.equal(shown[shown != MASK], batch["input_ids"][0, 2:6][shown != MASK])


def test_what_no_logit_predicts_is_not_asked_for() -> None:
    config = MemoryConfig(inner_target="prompt", prompt_mask_ratio=0.99)
    plan = inner_plan(_collator(config, logit_shift=1)(_rows()))
    assert all(not bool(_asked(plan, step)[:, 0].any()) for step in plan.steps)
    alone = plan_prompts([[5, 6, 7, 8]], config, MASK, logit_shift=1)
    assert all(not bool(_asked(alone, step)[:, 0].any()) and bool(_asked(alone, step).any()) for step in alone.steps)


def test_a_row_without_a_prompt_has_nothing_to_predict() -> None:
    plan = inner_plan(_collator(MemoryConfig(inner_target="prompt", prompt_mask_ratio=0.9))(_rows(prompts=(0, 4, 0))))
    assert plan.attention_mask is not None and bool(plan.attention_mask.any(dim=1).all())
    for step in plan.steps:
        assert not bool(_asked(plan, step)[[0, 2]].any())
    empty = inner_plan(_collator(MemoryConfig(inner_target="prompt"))(_rows(prompts=(0, 0, 0))))
    assert empty.length == 1 and all(len(step.loss_positions) == 0 for step in empty.steps)


def test_padding_is_no_prompt_where_nothing_is_labelled() -> None:
    rows = _rows()
    rows[1]["labels"] = [-100] * 6
    plan = inner_plan(_collator(MemoryConfig(inner_target="prompt"), pad=PaddingCollator(PAD, False))(rows))
    assert plan.attention_mask is not None and plan.attention_mask.sum(dim=1).tolist() == [2, 6, 3]


def test_the_anchor_of_a_prompt_masks_the_given_share() -> None:
    rows = _rows(lengths=(3000,), prompts=(2900,))
    config = MemoryConfig(inner_target="prompt", prompt_mask_ratio=0.3)
    plan = inner_plan(_collator(config)(rows))
    share = len(plan.steps[1].loss_positions) / 2900
    assert share == pytest.approx(0.3, abs=0.03)  # three standard deviations of 2,900 draws are 0.026
    assert len(plan.steps[0].loss_positions) == int(1.5 * len(plan.steps[1].loss_positions))


def test_one_prompt_always_gives_one_plan() -> None:
    config = MemoryConfig(inner_lr=0.2)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22]]
    both, again = plan_prompts(prompts, config, MASK), plan_prompts(prompts[::-1], config, MASK)
    assert both.row_seeds == again.row_seeds[::-1]
    for first, second in zip(both.states, again.states, strict=True):
        assert torch.equal(first, second.flip(0))
    other = plan_prompts(prompts, MemoryConfig(seed=1), MASK)
    assert not set(other.row_seeds) & set(both.row_seeds)
    alone = plan_prompts(prompts[1:], config, MASK)
    assert alone.attention_mask is None and torch.equal(alone.states[0][0], both.states[0][1, :3])


@pytest.mark.parametrize("prompts", [[], [[]], [[4, 5], []]])
def test_empty_prompts_are_refused(prompts: list) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        plan_prompts(prompts, MemoryConfig(), MASK)


# --- disjoint ---


@pytest.mark.parametrize("objective", ["ce", "distill"])
def test_disjoint_never_shows_or_asks_for_the_outer_mask(objective: str) -> None:
    config = MemoryConfig(inner_target="disjoint", num_inner_steps=3, inner_loss_type=objective)  # pyright: ignore
    batch = _collator(config)(_rows())
    plan = inner_plan(batch)
    outer = batch["is_masked"]
    assert all(bool((state[outer] == MASK).all()) for state in plan.states)
    for step in plan.steps:
        asked = _asked(plan, step)
        assert bool(asked.any()) and not bool((asked & outer).any()) and not bool((asked & ~batch["maskable"]).any())
        assert torch.equal(asked | outer, plan.states[step.student] == MASK)
        if objective == "distill":  # the clean input is the outer state
            assert step.teacher is not None and torch.equal(plan.states[step.teacher], batch["noised_ids"])
            assert step.teacher == plan.anchor


# --- padding ---


@pytest.mark.parametrize("target", ["response", "disjoint"])
@pytest.mark.parametrize("mode", ["none", "inner", "both"])
def test_padding_is_masked_where_the_mode_says(mode: str, target: str) -> None:
    config = MemoryConfig(pad_unmask_mode=mode, inner_target=target)  # pyright: ignore[reportArgumentType]
    outer_hits, inner_hits, own_last_token = 0, 0, 0
    for epoch in range(20):
        collator = _collator(config)
        collator.set_epoch(epoch)
        batch = collator(_rows())
        plan = inner_plan(batch)
        is_padding = torch.arange(9) >= torch.tensor([9, 6, 7])[:, None]
        outer_hits += int((batch["is_masked"] & is_padding).sum())
        for step in plan.steps:
            inner_hits += int((_asked(plan, step) & is_padding).sum())
            assert float(step.t.min()) >= 0 and float(step.t.max()) <= 1
            # A row's own last token is the pad token too, and stays a token like any other.
            own_last_token += int(_asked(plan, step)[torch.arange(3), torch.tensor([8, 5, 6])].sum())
    assert (outer_hits > 0) == (mode != "both") and (inner_hits > 0) == (mode == "none") and own_last_token > 0


def test_an_inner_anchor_without_padding_is_a_state_of_its_own() -> None:
    config = MemoryConfig(pad_unmask_mode="inner")
    shared = []
    for epoch in range(20):
        collator = _collator(config)
        collator.set_epoch(epoch)
        batch = collator(_rows())
        plan = inner_plan(batch)
        masks_padding = bool((batch["is_masked"] & (torch.arange(9) >= torch.tensor([9, 6, 7])[:, None])).any())
        assert (plan.anchor is None) == masks_padding
        shared.append(masks_padding)
    assert True in shared


@pytest.mark.parametrize("settings", [{"pad_unmask_mode": "both"}, {"inner_target": "prompt"}])
def test_rows_padded_elsewhere_are_refused(settings: dict) -> None:
    def pad_left(rows) -> dict:
        made = PaddingCollator(PAD, train_on_padding=False)(rows)
        for b, row in enumerate(rows):
            shift = made["input_ids"].shape[1] - len(row["input_ids"])
            made = {key: value.clone() for key, value in made.items()}
            for value in made.values():
                value[b] = value[b].roll(shift)
        return made

    with pytest.raises(ValueError, match="padded on the right: the data collator changed example 1"):
        _collator(MemoryConfig(**settings), pad=pad_left)(_rows())
    _collator(MemoryConfig(), pad=pad_left)(_rows())  # no setting needs to know
