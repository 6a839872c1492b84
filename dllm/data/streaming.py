"""Rows that are read while training: an endless, numbered stream, the same on every process."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import datasets
import pyarrow
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import IterableDataset, get_worker_info

from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError

logger = get_default_logger(__name__)

Row = dict[str, Any]
# An endless iterator of rows -> another one.
Step = Callable[[Iterator[Row]], Iterator[Row]]

DROP = "_drop"  # key of a fitted row: why it is left out, "" if it is not
_READ_ROWS = 100
# What the readers of the datasets library end with on a broken or missing file.
READ_ERRORS = (
    pyarrow.ArrowInvalid,
    DatasetGenerationError,
    OSError,
    EOFError,
    UnicodeDecodeError,
)


class RowStream(IterableDataset):
    """The rows of a source, over and over again, each with its running number as `example_id`.

    The numbers go on when the source starts anew, so that every pass has masks of its own. Rows, numbers and order
    depend on the source and the settings alone: every process reads all of them, and `accelerate` picks its share
    (`dispatch_batches` must be off). In worker processes of a data loader each worker yields whole turns of
    `rows_per_turn` rows, which the loader puts back in order.

    Args:
        source: rows; a `datasets.IterableDataset` that was shuffled is shuffled anew in every pass. Any other iterable
            must start again with each `iter` and yield all its rows in every process.
        fit: makes a token row of a source row and its number in the pass; its entry DROP, if it has one, says why it is
            left out. None: the source's rows are taken as they are.
        steps: what is done with the endless iterator of fitted rows, in order (grouping, packing).
        explain: see `read_rows`.

    Raises:
        InputError: while iterating: a whole pass leaves no row, or the source cannot be read.
    """

    def __init__(
        self,
        source: Iterable[Row],
        fit: Callable[[Row, int], Row] | None = None,
        steps: Sequence[Step] = (),
        explain: Callable[[Exception], str] = str,
    ) -> None:
        self.source, self.fit, self.steps, self.explain = source, fit, tuple(steps), explain
        self.rows_per_turn = 1

    def __iter__(self) -> Iterator[Row]:
        rows = self._fitted()
        for step in self.steps:
            rows = step(rows)
        worker = get_worker_info()
        for number, row in enumerate(rows):
            if worker is None or number // self.rows_per_turn % worker.num_workers == worker.id:
                yield {**row, "example_id": number}

    def _fitted(self) -> Iterator[Row]:
        # A copy of one's own: the epoch of a datasets.IterableDataset lies in memory that worker processes share, and
        # each of them may be in another pass.
        source = copy.deepcopy(self.source) if isinstance(self.source, datasets.IterableDataset) else self.source
        number = 0
        for epoch in itertools.count():
            start, dropped = number, Counter()
            for index, row in enumerate(self._read(source, epoch)):
                fitted = row if self.fit is None else self.fit(row, index)
                why = fitted.get(DROP, "")
                if why:
                    dropped[why] += 1
                    continue
                yield {**{key: value for key, value in fitted.items() if key != DROP}, "example_id": number}
                number += 1
            told = told_drops(dropped)
            if number == start:
                left_out = told or "it is empty"
                raise InputError(f"the stream leaves no row to train on ({left_out}): raise --max_length, or add data")
            if dropped and epoch == 0:
                logger.warning(f"{dropped.total():,} of {number + dropped.total():,} streamed rows dropped ({told})")

    def _read(self, source: Iterable[Row], epoch: int) -> Iterator[Row]:
        """All rows of one pass, in a worker process too."""
        if not isinstance(source, datasets.IterableDataset):
            return iter(source)
        source.set_epoch(epoch)
        return read_rows(source, self.explain)


def read_rows(source: datasets.IterableDataset, explain: Callable[[Exception], str]) -> Iterator[Row]:
    """All rows of a stream, in a worker process of a data loader too.

    Args:
        source: the stream.
        explain: one line on an error of its reader.

    Raises:
        InputError: what `explain` makes of a file that cannot be read.
    """
    # Not iter(source): in a worker process that would be the worker's share of the files.
    batches = source.iter(batch_size=_READ_ROWS)
    while True:
        try:
            columns = next(batches, None)
        except READ_ERRORS as error:
            raise InputError(explain(error)) from None
        if columns is None:
            return
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def told_drops(dropped: Counter[str]) -> str:
    """How many rows were left out for which reason, in one line."""
    return "; ".join(f"{why}: {count:,}" for why, count in sorted(dropped.items()))
