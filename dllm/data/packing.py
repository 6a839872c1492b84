"""Packing: several documents in one training row, so that little of a batch is padding.

A packed row has input_ids and labels of its documents, one behind the other, `document_lengths` and `document_ids` (the
example id of each). What keeps the documents apart is `dllm.core.packing`.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
from torch.utils.data import Dataset, IterableDataset

from dllm.data.streaming import Row, RowStream
from dllm.utils.logging import get_default_logger

logger = get_default_logger(__name__)

DOCUMENT_LENGTHS, DOCUMENT_IDS = "document_lengths", "document_ids"
PACK_WINDOW = 1024  # documents that are laid out together


def is_packed(dataset: Any) -> bool:
    """Whether the rows of a data set, or of any of several by name, hold documents; the first row tells.

    Args:
        dataset: rows by index or one after the other (from the start again with each `iter`); anything else has none.
    """
    if isinstance(dataset, Mapping):
        return any(is_packed(part) for part in dataset.values())
    if isinstance(dataset, RowStream):
        if dataset.fit is None and not dataset.steps:
            return is_packed(dataset.source)
        return any(isinstance(step, Packer) for step in dataset.steps)
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)) and dataset.column_names is not None:
        return DOCUMENT_LENGTHS in dataset.column_names
    if isinstance(dataset, (datasets.IterableDataset, IterableDataset)):
        first = next(iter(dataset), None)
    else:
        rows: Any = dataset
        first = rows[0] if isinstance(dataset, (Sequence, Dataset)) and len(rows) else None
    return isinstance(first, Mapping) and DOCUMENT_LENGTHS in first


def plan_packs(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Indices of the documents of each pack, packs and their documents in order of appearance.

    Best fit, longest first: a document goes where the least room is left over, or opens a pack. So every document is in
    one pack, none is cut, and at most one pack is half full or less.

    Args:
        lengths: tokens of each document, 1 to max_length.
        max_length: tokens of a pack.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, pack), ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        found = bisect.bisect_left(rooms, (length, -1))
        if found == len(rooms):
            packs.append([])
            room, pack = max_length, len(packs) - 1
        else:
            room, pack = rooms.pop(found)
        packs[pack].append(index)
        if room > length:
            bisect.insort(rooms, (room - length, pack))
    return sorted(sorted(pack) for pack in packs)


def join_documents(rows: Sequence[Row]) -> Row:
    """One packed row of documents {input_ids, labels, example_id}."""
    return {
        "input_ids": list(itertools.chain.from_iterable(row["input_ids"] for row in rows)),
        "labels": list(itertools.chain.from_iterable(row["labels"] for row in rows)),
        DOCUMENT_LENGTHS: [len(row["input_ids"]) for row in rows],
        DOCUMENT_IDS: [row["example_id"] for row in rows],
    }


def split_documents(rows: Sequence[Row]) -> list[Row]:
    """The documents {input_ids, labels, example_id} of packed rows, in order."""
    documents = []
    for row in rows:
        start = 0
        for length, example_id in zip(row[DOCUMENT_LENGTHS], row[DOCUMENT_IDS], strict=True):
            span = slice(start, start + length)
            documents.append(
                {"input_ids": row["input_ids"][span], "labels": row["labels"][span], "example_id": example_id}
            )
            start += length
    return documents


def pack_dataset(rows: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Packed rows of a data set of documents, made `PACK_WINDOW` documents at a time; how full they are is logged.

    Args:
        rows: columns input_ids, labels, example_id; none longer than max_length.
        max_length: tokens of a packed row at most.
    """
    packed = rows.map(
        _pack_columns,
        batched=True,
        batch_size=PACK_WINDOW,
        fn_kwargs={"max_length": max_length},
        remove_columns=rows.column_names,
        desc=f"packing to {max_length} tokens",
    )
    logger.info(_told(len(rows), [sum(lengths) for lengths in packed[DOCUMENT_LENGTHS]], max_length))
    return packed


def _pack_columns(columns: Mapping[str, Sequence[Any]], max_length: int) -> dict[str, list[Any]]:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    packs = plan_packs([len(row["input_ids"]) for row in rows], max_length)
    joined = [join_documents([rows[index] for index in pack]) for pack in packs]
    return {key: [row[key] for row in joined] for key in joined[0]} if joined else {}


def _told(num_documents: int, sizes: Sequence[int], max_length: int) -> str:
    share = sum(sizes) / (len(sizes) * max_length) if sizes else 0.0
    return f"packing: {num_documents:,} documents in {len(sizes):,} rows of {max_length} tokens, {share:.1%} full"


class Packer:
    """Packs a stream of documents, a window at a time; how full the first one is is logged.

    Args:
        max_length: tokens of a packed row at most.
        window: documents that are laid out together.
    """

    def __init__(self, max_length: int, window: int = PACK_WINDOW) -> None:
        self.max_length, self.window = max_length, window

    def __call__(self, rows: Iterator[Row]) -> Iterator[Row]:
        for number, window in enumerate(iter(lambda: list(itertools.islice(rows, self.window)), [])):
            packs = plan_packs([len(row["input_ids"]) for row in window], self.max_length)
            joined = [join_documents([window[index] for index in pack]) for pack in packs]
            if number == 0:
                sizes = [len(row["input_ids"]) for row in joined]
                logger.info(f"{_told(len(window), sizes, self.max_length)} (the first window of the stream)")
            yield from joined
