"""RowSource: rows of a training data loader, as many at a time as a rollout has places for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import skip_first_batches

from dllm.core.noising import derive_seed
from dllm.data.collators import Batch
from dllm.utils.parsing import InputError

ROW_KEYS = ("input_ids", "maskable", "num_tokens", "example_id", "attention_mask")


class RowSource:
    """Hands out the rows of `loader` one after the other, epoch after epoch.

    How fast rows are used up depends on the model, so this goes at its own pace: rows of a batch that are not asked for
    wait for the next call. Where it stands is three numbers (`state_dict`), and a source that was set there goes on
    with the very next row.

    Args:
        loader: a data loader that accelerate has prepared, with a `NoisingCollator`.
        drops: what is left of a batch is dropped, and every call draws one (the published behaviour).
        seed: of the order of the rows, where the loader's sampler has no seed of its own.
    """

    def __init__(self, loader: Any, drops: bool = False, seed: int = 0) -> None:
        self.loader, self.drops, self.seed = loader, drops, seed
        self.epoch = 0
        self.num_batches = 0  # of this epoch, before the present one
        self.offset = 0  # rows of the present batch that were handed out
        self._batch: Batch | None = None
        self._iterator: Iterator[Batch] | None = None

    def take(self, number: int) -> Sequence[Batch]:
        """The next `number` rows; where rows are dropped, fewer if the batch has fewer.

        Raises:
            InputError: the loader has no batch at all.
        """
        if self.drops:
            batch = self._next_batch()
            return [_row(batch, index) for index in range(min(number, len(batch["input_ids"])))]
        rows = []
        while len(rows) < number:
            batch = self._batch if self._batch is not None else self._next_batch()
            rows.append(_row(batch, self.offset))
            self.offset += 1
            if self.offset == len(batch["input_ids"]):
                self.num_batches, self.offset, self._batch = self.num_batches + 1, 0, None
        return rows

    def _next_batch(self) -> Batch:
        for _ in range(2):
            # A data loader draws from the global generator (seeds of its workers, perhaps the order of the rows), which
            # is not ours to advance and would stand elsewhere after a resumption.
            with torch.random.fork_rng(devices=[]):
                if self._iterator is None:
                    torch.manual_seed(derive_seed("row source", self.seed, self.epoch))
                    self._iterator = self._begin()
                batch = next(self._iterator, None)
            if batch is not None:
                if self.drops:
                    self.num_batches += 1
                self._batch = batch
                return batch
            self.epoch, self.num_batches, self._iterator = self.epoch + 1, 0, None
        raise InputError("the training data loader gives no batch: give more rows, or set dataloader_drop_last False")

    def _begin(self) -> Iterator[Batch]:
        self.loader.set_epoch(self.epoch)
        return iter(skip_first_batches(self.loader, self.num_batches) if self.num_batches else self.loader)

    @property
    def epochs(self) -> float:
        """How often the data have been gone through."""
        return self.epoch + self.num_batches / max(1, len(self.loader))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Where the source stands."""
        return {name: torch.tensor(getattr(self, name)) for name in ("epoch", "num_batches", "offset")}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on where `state_dict` stood."""
        self._iterator = self._batch = None
        self.epoch, self.num_batches, offset = (int(state[name]) for name in ("epoch", "num_batches", "offset"))
        self.offset = 0
        if offset and not self.drops:
            self._next_batch()
            self.offset = offset


def _row(batch: Batch, index: int) -> Batch:
    return {key: batch[key][index] for key in ROW_KEYS if key in batch}
