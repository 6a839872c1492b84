import pytest
import torch

from dllm.core.schedulers import LinearAlphaScheduler
from dllm.data.collators import NoisingCollator, PaddingCollator

PAD, MASK = 2, 99


def _row(example_id: int, length: int, prompt: int = 2) -> dict:
    generator = torch.Generator().manual_seed(example_id)
    ids = torch.randint(3, 11, (length,), generator=generator).tolist()
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "example_id": example_id, "prompt_len": prompt}


def _collator(**settings) -> NoisingCollator:
    return NoisingCollator(PaddingCollator(PAD), scheduler=LinearAlphaScheduler(), mask_token_id=MASK, **settings)


def test_a_batch_is_consistent() -> None:
    rows = [_row(3, 9), _row(8, 13), _row(5, 6)]
    batch = _collator()(rows)
    assert batch["input_ids"].shape == (3, 13)
    assert torch.equal(batch["noised_ids"] == MASK, batch["is_masked"])
    assert not bool((batch["is_masked"] & ~batch["maskable"]).any())
    assert not bool(batch["maskable"][:, :2].any())  # prompts
    assert bool(batch["maskable"][0, 9:].all()) and bool((batch["input_ids"][0, 9:] == PAD).all())
    assert torch.equal(batch["loss_positions"], batch["is_masked"].reshape(-1).nonzero()[:, 0])
    assert torch.equal(batch["num_maskable"], batch["maskable"].sum(dim=1))
    assert "attention_mask" not in batch


def test_padding_can_stay_out_of_the_loss() -> None:
    pad = PaddingCollator(PAD, train_on_padding=False)
    batch = NoisingCollator(pad, scheduler=LinearAlphaScheduler(), mask_token_id=MASK)([_row(0, 9), _row(1, 4)])
    assert not bool(batch["maskable"][1, 4:].any())


def test_a_row_is_masked_alike_in_every_batch() -> None:
    collator = _collator()
    alone = collator([_row(8, 13)])
    among = collator([_row(3, 20), _row(8, 13)])
    assert torch.equal(alone["is_masked"][0], among["is_masked"][1, :13])
    assert torch.equal(alone["t"][0], among["t"][1])


def test_training_masks_change_with_epoch_and_seed_and_evaluation_masks_do_not() -> None:
    rows = [_row(i, 30) for i in range(4)]
    train, evaluation = _collator(), _collator(stream="eval")
    first = train(rows)["is_masked"], evaluation(rows)["is_masked"]
    train.set_epoch(1)
    evaluation.set_epoch(1)
    assert not torch.equal(train(rows)["is_masked"], first[0])
    assert torch.equal(evaluation(rows)["is_masked"], first[1])
    train.set_epoch(0)
    assert torch.equal(train(rows)["is_masked"], first[0])
    assert not torch.equal(_collator(seed=1)(rows)["is_masked"], first[0])


def test_worker_processes_that_stay_alive_see_the_next_epoch() -> None:
    collator = _collator()
    rows = [_row(i, 30) for i in range(4)]
    loader = torch.utils.data.DataLoader(
        rows, batch_size=4, collate_fn=collator, num_workers=1, persistent_workers=True
    )  # pyright: ignore
    first = next(iter(loader))["is_masked"]
    collator.set_epoch(1)
    second = next(iter(loader))["is_masked"]
    assert not torch.equal(first, second)
    assert torch.equal(second, collator(rows)["is_masked"])


def test_logit_shift_leaves_the_first_position_alone() -> None:
    row = _row(0, 8, prompt=0)
    assert not bool(_collator(logit_shift=1)([row])["maskable"][0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [-100, -100, 4, 5, 6, 7]}, "labels differ from input_ids at maskable positions of example 7"),
        ({"labels": [-100]}, "6 input_ids and 1 labels"),
        ({"input_ids": [], "labels": []}, "at least one"),
    ],
)
def test_bad_rows_are_named(change: dict, message: str) -> None:
    row = {"input_ids": [3, 3, 3, 3, 3, 3], "labels": [-100, -100, 3, 3, 3, 3], "example_id": 7, **change}
    with pytest.raises(ValueError, match=message):
        _collator()([row])


def test_a_row_without_ids_names_what_it_has() -> None:
    with pytest.raises(ValueError, match=r"no 'labels' .*input_ids, example_id"):
        _collator()([{"input_ids": [1], "example_id": 0}])
