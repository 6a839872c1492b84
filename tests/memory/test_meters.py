"""What the log says of the memory."""

import pytest
import torch

from memdlm.memory.inner_loop import InnerReport
from memdlm.memory.meters import GapWatch, WriteSums


def _report(losses, skipped, empty=(0.0, 0.0), bad=(0.0, 0.0)) -> InnerReport:
    values = torch.tensor(losses)
    return InnerReport(
        losses=values,
        grad_norms=values * 2,
        changes=values * 3,
        skipped=torch.tensor(skipped),
        empty_rows=torch.tensor(empty),
        bad_rows=torch.tensor(bad),
        left_out=torch.tensor(bad)[:, None],
        change=torch.tensor([1.0, 3.0]),
    )


def test_means_are_over_the_memories_that_moved() -> None:
    sums = WriteSums()
    sums.add(_report([[1.0, 2.0], [4.0, torch.nan]], [[0.0, 0.0], [0.0, 1.0]], bad=(0.0, 1.0)))
    sums.add(_report([[3.0, 6.0], [2.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]]))
    means = sums.means()
    assert means["mem_inner_loss_1"] == 3.0 and means["mem_inner_loss_2"] == 3.0  # of four, and of three
    assert means["mem_inner_grad_norm_2"] == 6.0 and means["mem_inner_change_1"] == 9.0
    assert means["mem_inner_skipped_1"] == 0.0 and means["mem_inner_skipped_2"] == 0.25
    assert means["mem_nonfinite_rows"] == 1.0 and "mem_empty_rows" not in means and means["mem_change"] == 2.0


def test_a_step_in_which_nothing_moved_has_no_mean() -> None:
    sums = WriteSums()
    sums.add(_report([[0.0, 0.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]], empty=(2.0, 0.0)))
    means = sums.means()
    assert "mem_inner_loss_1" not in means and means["mem_inner_loss_2"] == 1.0
    assert means["mem_inner_skipped_1"] == 1.0 and means["mem_empty_rows"] == 2.0


def _feed(watch: GapWatch, with_memory, without_memory) -> list[bool]:
    return [watch.grows(a, b) for a, b in zip(with_memory, without_memory, strict=True)]


def test_the_watch_speaks_once_when_the_losses_drift_apart() -> None:
    falling, rising = [2.0 - 0.02 * i for i in range(60)], [2.0 + 0.02 * i for i in range(60)]
    told = _feed(GapWatch(window=10), falling, rising)
    assert told.count(True) == 1 and told.index(True) == 19


@pytest.mark.parametrize(
    ("with_memory", "without_memory"),
    [
        ([2.0 - 0.02 * i for i in range(60)], [2.1 - 0.02 * i for i in range(60)]),  # both fall: learning
        ([2.0 + 0.02 * i for i in range(60)], [2.1 + 0.02 * i for i in range(60)]),  # both rise: something else
        ([2.0 - 0.02 * i for i in range(60)], [2.0 + 1e-4 * i for i in range(60)]),  # within the margin
        ([2.0, 1.0] * 5, [2.0, 3.0] * 5),  # not enough values yet
    ],
    ids=["both fall", "both rise", "within the margin", "short"],
)
def test_the_watch_keeps_silent_otherwise(with_memory: list, without_memory: list) -> None:
    assert not any(_feed(GapWatch(window=10), with_memory, without_memory))
