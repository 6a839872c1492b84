"""Example ids: the number of a row, from which its masks are drawn."""

from __future__ import annotations

from typing import Any

import datasets
from torch.utils.data import Dataset, IterableDataset

from dllm.data.streaming import RowStream
from dllm.utils.parsing import InputError


class _WithExampleIds(Dataset):
    """A map-style data set whose rows get their index as `example_id`."""

    def __init__(self, rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "example_id": index}


def is_stream(dataset: Any) -> bool:
    """Whether the rows can only be read one after the other."""
    return isinstance(dataset, (IterableDataset, datasets.IterableDataset))


def with_example_ids(dataset: Any, may_stream: bool = False) -> Any:
    """`dataset` with an `example_id` in every row; None and dicts of data sets pass through.

    The id is the row's index, unless the rows have one already. A stream becomes a `RowStream`, read again from its
    start whenever it ends.

    Args:
        dataset: rows by index, a stream of rows, or None.
        may_stream: take a stream.

    Raises:
        InputError: a stream that is not taken.
    """
    if dataset is None or isinstance(dataset, RowStream):
        return dataset
    if isinstance(dataset, dict):
        return {name: with_example_ids(part) for name, part in dataset.items()}
    if is_stream(dataset):
        if not may_stream:
            raise InputError("an evaluation needs rows with a length: give a list or a datasets.Dataset, not a stream")
        return RowStream(dataset)
    if isinstance(dataset, datasets.Dataset):
        if "example_id" in dataset.column_names:
            return dataset
        return dataset.add_column("example_id", list(range(len(dataset))))
    return _WithExampleIds(dataset) if len(dataset) and "example_id" not in dataset[0] else dataset


def row_lengths(dataset: Any, length_column: str = "length") -> list[int]:
    """Tokens of every row: of a `datasets.Dataset` its column `length_column` if it has one, else counted."""
    if isinstance(dataset, datasets.Dataset):
        if length_column in dataset.column_names:
            return list(dataset[length_column])
        return [len(row) for row in dataset["input_ids"]]
    return [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
