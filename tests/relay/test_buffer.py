"""The rollout buffer and the source of its rows."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from dllm.utils.parsing import InputError
from memdlm.relay import RolloutBuffer
from memdlm.relay.source import RowSource

MASK, PAD = 39, 0


def row(example, length, first=1):
    maskable = torch.arange(length) >= first
    ids, tokens = torch.arange(length) + 10, torch.tensor(length - 1)
    return {"input_ids": ids, "maskable": maskable, "example_id": torch.tensor(example), "num_tokens": tokens}


class Rows:
    """Rows one after the other, of lengths 3, 4, 5, 3, ..."""

    def __init__(self):
        self.next = 0

    def __call__(self, number):
        taken = [row(self.next + i, 3 + (self.next + i) % 3) for i in range(number)]
        self.next += number
        return taken


def test_fresh_rows_are_all_masks_and_shorter_ones_padded():
    buffer = RolloutBuffer(3, 2, MASK, PAD, "cpu")
    buffer.refill(Rows())
    rows = buffer.rows
    assert rows.input_ids.tolist() == [[10, 11, 12, PAD, PAD], [10, 11, 12, 13, PAD], [10, 11, 12, 13, 14]]
    assert buffer.noised_ids.tolist() == [[10, MASK, MASK, PAD, PAD], [10, MASK, MASK, MASK, PAD], [10] + [MASK] * 4]
    assert torch.equal(rows.is_masked, rows.maskable)
    assert rows.length.tolist() == [3, 4, 5] and rows.example_id.tolist() == [0, 1, 2]
    assert rows.hidden.dtype == torch.float32 and rows.hidden.shape == (3, 5, 2) and not rows.hidden.any()
    assert not rows.is_set.any() and rows.num_tokens.tolist() == [2, 3, 4]


def test_rows_that_are_done_give_way_to_fresh_ones_with_a_zero_state():
    buffer, source = RolloutBuffer(3, 2, MASK, PAD, "cpu"), Rows()
    buffer.refill(source)
    left = buffer.rows.is_masked.clone()
    left[0] = False  # the first row is done, the third has lost two masks
    left[2, 1:3] = False
    hidden = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    buffer.store(left, hidden)
    assert not buffer.rows.hidden.requires_grad and buffer.rows.hidden.dtype == torch.float32
    buffer.refill(source)
    rows = buffer.rows
    assert rows.example_id.tolist() == [1, 2, 3] and (buffer.num_refilled, buffer.num_calls) == (4, 2)
    assert rows.is_set.tolist() == [True, True, False]
    torch.testing.assert_close(rows.hidden[:2], hidden[1:].detach().float())
    assert not rows.hidden[2].any()
    assert rows.is_masked[1].tolist() == [False, False, False, True, True]
    assert torch.equal(rows.is_masked[2], rows.maskable[2])


def test_the_width_follows_the_longest_row():
    buffer, source = RolloutBuffer(3, 1, MASK, PAD, "cpu"), Rows()
    buffer.refill(source)
    left = buffer.rows.is_masked.clone()
    left[1:] = False
    buffer.store(left, torch.ones(3, 5, 1))
    buffer.refill(lambda number: [row(7, 4), row(8, 3)][:number])
    assert buffer.rows.input_ids.shape == (3, 4)
    buffer.store(torch.zeros(3, 4, dtype=torch.bool), torch.ones(3, 4, 1))
    buffer.refill(lambda number: [row(9, 6)] * number)
    assert buffer.rows.input_ids.shape == (3, 6) and buffer.rows.hidden.shape == (3, 6, 1)


def test_a_buffer_goes_on_from_its_saved_state():
    buffer, source = RolloutBuffer(2, 2, MASK, PAD, "cpu"), Rows()
    assert set(buffer.state_dict()) == {"num_refilled", "num_calls"}
    buffer.refill(source)
    buffer.store(buffer.rows.is_masked, torch.randn(2, 4, 2))
    saved = {name: value.clone() for name, value in buffer.state_dict().items()}
    again = RolloutBuffer(2, 2, MASK, PAD, "cpu")
    again.load_state_dict(saved)
    for name, value in again.state_dict().items():
        assert torch.equal(value, saved[name])
    with pytest.raises(InputError, match="rollout has 2 rows of width 2, this run 1 of width 2"):
        RolloutBuffer(1, 2, MASK, PAD, "cpu").load_state_dict(saved)


def test_a_row_whose_state_is_not_finite_goes_on_without_one():
    buffer = RolloutBuffer(2, 2, MASK, PAD, "cpu")
    buffer.refill(Rows())
    hidden = torch.ones(2, 4, 2)
    hidden[1, 2, 0] = torch.inf
    buffer.store(buffer.rows.is_masked, hidden)
    assert buffer.rows.is_set.tolist() == [True, False]
    assert bool((buffer.rows.hidden[0] == 1).all()) and not buffer.rows.hidden[1].any()


def test_no_rows_at_all():
    with pytest.raises(InputError, match="no row to train on"):
        RolloutBuffer(2, 2, MASK, PAD, "cpu").refill(lambda number: [])


def collate(rows):
    ids = torch.tensor([[index, index] for index in rows])
    return {"input_ids": ids, "maskable": ids > 0, "example_id": torch.tensor(rows)}


@pytest.fixture
def loader():
    """A function () -> shuffled loader of ten rows in batches of four, prepared as Trainer does it."""
    return lambda: Accelerator(cpu=True).prepare(
        DataLoader(list(range(10)), batch_size=4, shuffle=True, collate_fn=collate)
    )


def take(source, *numbers):
    return [[int(row["example_id"]) for row in source.take(number)] for number in numbers]


def test_all_rows_come_once_per_epoch_whatever_is_asked_for(loader):
    first, second = take(RowSource(loader()), 10, 10)
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert list(itertools.chain(*take(RowSource(loader()), 3, 0, 1, 5, 2, 9))) == first + second


@pytest.mark.parametrize("taken", [0, 3, 4, 10, 13])
@pytest.mark.parametrize("drops", [False, True])
def test_a_source_goes_on_where_it_stood(loader, taken, drops):
    source = RowSource(loader(), drops)
    for _ in range(taken):
        source.take(1)
    again = RowSource(loader(), drops)
    before = torch.random.get_rng_state()
    again.load_state_dict(source.state_dict())
    assert take(again, 2, 3, 4, 5) == take(source, 2, 3, 4, 5)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is not touched


def test_dropping_takes_one_batch_per_call(loader):
    source, keeping = RowSource(loader(), drops=True), RowSource(loader())
    batches = [ids for ids in take(keeping, 4, 4, 2)]
    assert take(source, 1, 0, 4) == [batches[0][:1], [], batches[2]]
    assert source.epochs == 1


def test_an_empty_loader_is_an_error():
    loader = Accelerator(cpu=True).prepare(DataLoader([1], batch_size=2, drop_last=True, collate_fn=collate))
    with pytest.raises(InputError, match="gives no batch"):
        RowSource(loader).take(1)
