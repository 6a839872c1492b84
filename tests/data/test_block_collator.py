"""Rows for block diffusion and editing: whole blocks, a time per block, wrong tokens."""

import functools

import pytest
import torch

from dllm.core.editing import CORRUPTED, KEPT, MASKED, EditPlanner, EditSettings, draw_wrong_tokens, replacement_ids
from dllm.core.noising import make_generator
from dllm.core.schedulers import LinearAlphaScheduler
from dllm.data.collators import BlockPaddingCollator, NoisingCollator, PaddingCollator
from dllm.models import get_spec
from dllm.models.tiny import train_tokenizer

PAD, MASK = 1, 2
VOCABULARY = 280
ALLOWED = torch.arange(6, 262)  # the 256 bytes behind six special tokens


@functools.lru_cache
def _tokenizer():
    return train_tokenizer(get_spec("llada2_moe"), "some text", 262)


def _row(example_id: int, length: int, prompt: int = 2) -> dict:
    generator = torch.Generator().manual_seed(example_id)
    ids = torch.randint(6, 250, (length,), generator=generator).tolist()
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "example_id": example_id}


def _collator(pad=None, **settings) -> NoisingCollator:
    options = {"scheduler": LinearAlphaScheduler(), "mask_token_id": MASK, **settings}
    return NoisingCollator(pad or PaddingCollator(PAD), **options)


def _planner(**settings) -> EditPlanner:
    chosen = EditSettings(**{"edit_ratio": 0.3, "edit_keep_ratio": 0.0, **settings})
    return EditPlanner(chosen, _tokenizer(), VOCABULARY)


def _edited(rows, pad=None, **settings) -> tuple[dict, dict]:
    batch = _collator(pad, editing=_planner(**settings))(rows)
    return batch, {**batch, **batch["edit"]}


def test_rows_are_filled_up_to_whole_blocks() -> None:
    padded = BlockPaddingCollator(PAD, 4)([_row(0, 9), _row(1, 6), _row(2, 4)])
    assert padded["input_ids"].shape == (3, 12)
    assert (padded["input_ids"] == PAD).sum(dim=1).tolist() == [3, 6, 8]
    # Own block: trained on. Blocks behind: not.
    assert (padded["labels"][:, 2:] == PAD).sum(dim=1).tolist() == [3, 2, 0]
    assert (padded["labels"] == -100).sum(dim=1).tolist() == [2, 2 + 4, 2 + 8]


def test_the_fill_behind_an_untrained_end_is_not_trained_on() -> None:
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, -100], "example_id": 0}
    assert BlockPaddingCollator(PAD, 4)([row])["labels"].tolist() == [[5, 6, -100, -100]]


def test_a_fill_that_is_not_trained_on_is_never_masked() -> None:
    rows = [_row(0, 9), _row(1, 6), _row(2, 8)]
    padding = BlockPaddingCollator(PAD, 4, train_on_fill=False)
    padded = padding([dict(row) for row in rows])
    assert torch.equal(padded["input_ids"], BlockPaddingCollator(PAD, 4)(rows)["input_ids"])
    batch = _collator(padding, block_size=4, time_per="block", complementary=True)(rows)
    own = torch.arange(12) < torch.tensor([[9], [6], [8]])
    assert torch.equal(batch["maskable"], own & (torch.arange(12) >= 2))
    assert batch["num_maskable"].tolist() == [7, 4, 6]
    for noised in (batch["noised_ids"], batch["complement"]["noised_ids"]):
        assert (noised[~own] == PAD).all() and (noised[:, 2:6] == MASK).any()


def test_every_block_has_a_time_of_its_own() -> None:
    collator = _collator(BlockPaddingCollator(PAD, 4), block_size=4, time_per="block")
    batch = collator([_row(i, 400) for i in range(3)])
    times = torch.full((3, 400), float("nan"))
    times.view(-1)[batch["loss_positions"]] = batch["loss_t"]
    by_block = times.view(3, 100, 4)
    seen = [[set(block[~block.isnan()].tolist()) for block in row] for row in by_block]
    assert all(len(values) <= 1 for row in seen for values in row)
    assert len({value for row in seen for values in row for value in values}) > 200
    # A block with t near 1 is masked almost wholly, one with t near 0 almost not.
    share = batch["is_masked"].view(3, 100, 4).float().mean(dim=2)[~by_block.isnan().all(dim=2)]
    t = by_block.nan_to_num(0).amax(dim=2)[~by_block.isnan().all(dim=2)]
    assert share[t > 0.9].mean() > 0.8 and share[t < 0.4].mean() < 0.5
    assert batch["t"].tolist() == pytest.approx([0.5] * 3, abs=0.1)


def test_a_row_is_masked_alike_in_every_batch() -> None:
    collator = _collator(BlockPaddingCollator(PAD, 4), block_size=4, time_per="block")
    alone, among = collator([_row(8, 13)]), collator([_row(3, 20), _row(8, 13)])
    assert torch.equal(alone["is_masked"][0], among["is_masked"][1, :16]) and not among["is_masked"][1, 16:].any()
    assert torch.equal(alone["loss_t"], among["loss_t"][among["loss_positions"] >= 20])
    assert torch.equal(alone["t"][0], among["t"][1]) and alone["num_maskable"][0] == among["num_maskable"][1]


@pytest.mark.parametrize("settings", [{"time_per": "row"}, {"time_per": "block"}])
def test_one_block_is_full_sequence_diffusion(settings: dict) -> None:
    rows = [_row(8, 12), _row(3, 12)]
    plain, block = _collator()(rows), _collator(BlockPaddingCollator(PAD, 12), block_size=12, **settings)(rows)
    for name in ("noised_ids", "loss_positions", "loss_t", "num_maskable"):
        assert torch.equal(plain[name], block[name]), name


def test_wrong_tokens_are_wrong_and_stand_in_visible_response_positions_only() -> None:
    batch, edited = _edited([_row(i, 300) for i in range(4)], edit_keep_ratio=0.2)
    changed = edited["noised_ids"] != batch["noised_ids"]
    assert torch.equal(changed.reshape(-1).nonzero()[:, 0], edited["corrupted_positions"]) and changed.sum() > 50
    assert not (changed & (batch["is_masked"] | ~batch["maskable"])).any()
    assert torch.isin(edited["noised_ids"][changed], ALLOWED).all()
    assert not (edited["noised_ids"] == batch["input_ids"])[changed].any()
    kinds = torch.full((4, 300), -1)
    kinds.view(-1)[edited["loss_positions"]] = edited["loss_kind"]
    assert torch.equal(kinds == MASKED, batch["is_masked"]) and torch.equal(kinds == CORRUPTED, changed)
    visible = batch["maskable"] & ~batch["is_masked"]
    assert not ((kinds == KEPT) & ~visible).any()
    # About 600 visible positions: three standard deviations are 0.06 and 0.05.
    assert float((kinds == CORRUPTED).sum() / visible.sum()) == pytest.approx(0.3, abs=0.06)
    assert float((kinds == KEPT).sum() / visible.sum()) == pytest.approx(0.2, abs=0.05)
    assert torch.equal(batch["loss_positions"], batch["is_masked"].reshape(-1).nonzero()[:, 0])


def test_padding_is_neither_replaced_nor_kept() -> None:
    batch, edited = _edited([_row(0, 300), _row(1, 10)], edit_keep_ratio=0.2)
    is_padding = batch["input_ids"].flatten()[edited["loss_positions"]] == PAD
    assert is_padding.any() and (edited["loss_kind"][is_padding] == MASKED).all()


def test_as_many_are_kept_as_replaced_unless_told_otherwise() -> None:
    assert EditSettings(edit_ratio=0.3).keep_share == 0.3 and EditSettings().keep_share == 0
    assert EditSettings(edit_ratio=0.8).keep_share == pytest.approx(0.2)
    assert EditSettings(edit_ratio=0.3, edit_keep_ratio=0.0).keep_share == 0


def test_edits_do_not_touch_the_masks_and_depend_on_the_row_alone() -> None:
    plain = _collator()([_row(8, 13)])
    alone, edited = _edited([_row(8, 13)])
    _, among = _edited([_row(3, 20), _row(8, 13)])
    for name, value in plain.items():
        assert torch.equal(alone[name], value), name
    assert torch.equal(edited["noised_ids"][0], among["noised_ids"][1, :13])
    assert len(edited["corrupted_positions"]) > 0


def test_edits_change_from_epoch_to_epoch() -> None:
    collator = _collator(editing=_planner())
    first = collator([_row(8, 100)])["edit"]
    collator.set_epoch(1)
    assert not torch.equal(first["noised_ids"], collator([_row(8, 100)])["edit"]["noised_ids"])


def test_where_the_model_is_to_name_the_wrong_tokens_masks_stand() -> None:
    batch, edited = _edited([_row(i, 60) for i in range(4)], edit_source="model")
    _, drawn = _edited([_row(i, 60) for i in range(4)])
    assert torch.equal(edited["corrupted_positions"], drawn["corrupted_positions"])
    assert (edited["noised_ids"].view(-1)[edited["corrupted_positions"]] == MASK).all()
    assert torch.equal(edited["loss_positions"], drawn["loss_positions"]) and torch.equal(edited["t"], batch["t"])


def test_wrong_tokens_are_drawn_evenly_from_all_but_the_true_one() -> None:
    allowed = torch.tensor([3, 5, 6, 9])
    for true in (3, 6, 9, 7):
        ids = torch.full((1, 6000), true)
        drawn = draw_wrong_tokens([make_generator(1)], ids, allowed)[0]
        others = [token for token in allowed.tolist() if token != true]
        counts = [int((drawn == token).sum()) for token in others]
        assert sum(counts) == 6000
        assert counts == pytest.approx([6000 / len(others)] * len(others), rel=0.1)  # four standard deviations


def test_wrong_tokens_do_not_depend_on_padding() -> None:
    ids = torch.arange(30)[None]
    short, long = (draw_wrong_tokens([make_generator(1)], ids[:, :n], ALLOWED) for n in (11, 30))
    assert torch.equal(short, long[:, :11])


def test_special_tokens_never_stand_in() -> None:
    names = {"<|startoftext|>", "<|endoftext|>", "<|mask|>", "<role>", "</role>", "<|role_end|>"}
    special = {_tokenizer().convert_tokens_to_ids(name) for name in names}
    assert special == set(range(6)) and len(_tokenizer()) == 262
    assert torch.equal(replacement_ids(_tokenizer(), VOCABULARY), ALLOWED)
    assert int(replacement_ids(_tokenizer(), 100).max()) == 99
    with pytest.raises(ValueError, match="two or more tokens that are not special"):
        replacement_ids(_tokenizer(), 6)


def test_complements_mask_what_is_visible_and_nothing_else() -> None:
    settings = {"block_size": 4, "time_per": "block"}
    rows = [_row(8, 30), _row(3, 13), _row(5, 2)]  # the last has nothing to mask
    plain = _collator(BlockPaddingCollator(PAD, 4), **settings)(rows)
    batch = _collator(BlockPaddingCollator(PAD, 4), complementary=True, **settings)(rows)
    for name, value in plain.items():
        assert torch.equal(batch[name], value), name
    other = batch["complement"]
    is_masked = other["noised_ids"] == MASK
    assert torch.equal(is_masked ^ batch["is_masked"], batch["maskable"]) and not (is_masked & batch["is_masked"]).any()
    assert torch.equal(other["noised_ids"][~is_masked], batch["input_ids"][~is_masked])
    assert torch.equal(other["loss_positions"], is_masked.reshape(-1).nonzero()[:, 0])
    # The time of a position is that of its block, whichever copy masks it.
    times = torch.full((3 * 32,), float("nan"))
    times[batch["loss_positions"]] = batch["loss_t"]
    times[other["loss_positions"]] = other["loss_t"]
    assert all(len({t for t in block.tolist() if t == t}) <= 1 for block in times.view(-1, 4))


def test_complements_depend_on_the_row_alone_and_on_the_epoch() -> None:
    collator = _collator(complementary=True)
    alone = collator([_row(8, 13)])["complement"]["noised_ids"][0]
    assert torch.equal(collator([_row(3, 20), _row(8, 13)])["complement"]["noised_ids"][1, :13], alone)
    collator.set_epoch(1)
    assert not torch.equal(collator([_row(8, 13)])["complement"]["noised_ids"][0], alone)
    still = _collator(complementary=True, stream="eval")
    first = still([_row(8, 13)])["complement"]["noised_ids"]
    still.set_epoch(1)
    assert torch.equal(still([_row(8, 13)])["complement"]["noised_ids"], first)


def test_complements_and_edits_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        _collator(complementary=True, editing=_planner())
