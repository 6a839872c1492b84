"""Collators: rows of token ids -> a padded, noised batch, on the CPU.

Masks, times, flat loss positions and counts are made here, so that a training step never waits for the device to count.
Shapes: B rows, L positions, N masked positions of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from dllm.core.editing import EditPlanner
from dllm.core.noising import (
    apply_mask,
    block_times,
    draw_noise,
    draw_times,
    flat_positions,
    make_generator,
    mask_tokens,
)
from dllm.core.packing import lay_out
from dllm.core.schedulers import BaseAlphaScheduler
from dllm.data.packing import DOCUMENT_LENGTHS, split_documents
from dllm.utils.parsing import InputError

IGNORE_INDEX = -100  # label of a position that is never masked and never in the loss

Batch = dict[str, Any]
TimePer = Literal["block", "row"]


class PaddingCollator:
    """Pads rows on the right to the longest one: {"input_ids", "labels"}, int64 [B, L], no attention mask.

    Padding is end-of-text that stays visible to attention and, with `train_on_padding` (LLaDA's way: the model learns
    where an answer ends), is masked and trained on like any other token of the answer.

    Args:
        pad_token_id: id put behind the end of a row.
        train_on_padding: label padding with `pad_token_id` (True) or with -100 (False).
        hide_padding: hide padding from attention, so that a row does not depend on those beside it: where rows differ
            in length the batch has an `attention_mask`, int64 [B, L]. Excludes `train_on_padding`.

    Raises:
        InputError: padding that is hidden and trained on.
    """

    def __init__(self, pad_token_id: int, train_on_padding: bool = True, hide_padding: bool = False) -> None:
        if train_on_padding and hide_padding:
            raise InputError("padding that is hidden cannot be trained on: drop train_on_padding or hide_padding")
        self.pad_token_id, self.hide_padding = pad_token_id, hide_padding
        self.label_pad_token_id = pad_token_id if train_on_padding else IGNORE_INDEX

    def __call__(self, rows: Sequence[Batch]) -> Batch:
        def pad(key: str, value: int) -> torch.Tensor:
            tensors = [torch.as_tensor(row[key], dtype=torch.int64) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        batch = {
            "input_ids": pad("input_ids", self.pad_token_id),
            "labels": pad("labels", self.label_pad_token_id),
        }
        if self.hide_padding and len({len(row["input_ids"]) for row in rows}) > 1:
            batch["attention_mask"] = is_inside(rows, batch["input_ids"]).long()
        return batch


class BlockPaddingCollator:
    """Pads rows on the right for block diffusion: {"input_ids", "labels"}, int64 [B, L], no attention mask.

    Each row is filled up with end-of-text to the end of its last block. With `train_on_fill` that is masked and trained
    on if the row's last token is: the model learns to end a block. What a shorter row then still lacks is padding that
    is never masked or trained on; it stands in blocks of its own, which no block before it sees. So a row's loss does
    not depend on the rows beside it.

    Args:
        pad_token_id: id put behind the end of a row.
        block_size: positions of a block, at least 1.
        train_on_fill: see above. False: it is in sight like a prompt, so the rest of the block tells where it ends.
    """

    def __init__(self, pad_token_id: int, block_size: int, train_on_fill: bool = True) -> None:
        self.pad_token_id, self.block_size, self.train_on_fill = pad_token_id, block_size, train_on_fill

    def __call__(self, rows: Sequence[Batch]) -> Batch:
        ids = [self._fill(row["input_ids"], self.pad_token_id) for row in rows]
        fills = [self.pad_token_id if self._trains_on(row["labels"]) else IGNORE_INDEX for row in rows]
        labels = [self._fill(row["labels"], fill) for row, fill in zip(rows, fills, strict=True)]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }

    def _trains_on(self, labels: Sequence[int]) -> bool:
        return self.train_on_fill and len(labels) > 0 and labels[-1] != IGNORE_INDEX

    def _fill(self, values: Sequence[int], fill: int) -> torch.Tensor:
        own = torch.as_tensor(values, dtype=torch.int64)
        return torch.cat([own, own.new_full((-len(own) % self.block_size,), fill)])


class NoisingCollator:
    """Pads with another collator, then draws the outer denoising state of every row.

    A row's draws depend on (seed, stream, epoch, example id) alone, not on its batch, the device, the world size or a
    resumption. The documents of packed rows (`dllm.data.packing`) are the rows of the batch: B counts documents, and
    `packing` says where the network sees them (`dllm.core.packing.lay_out`). Calling it returns
        input_ids        int64 [B, L]  clean tokens
        noised_ids       int64 [B, L]  the mask token at the masked positions
        maskable         bool  [B, L]  label != -100 (and, for families with a logit shift, not the first position)
        is_masked        bool  [B, L]
        t                float32 [B]   diffusion time, U(time_epsilon, 1); of rows with several, the mean over their
                                       maskable positions
        loss_positions   int64 [N]     flat indices of the masked positions into [B * L]
        loss_t           float32 [N]   diffusion time of each
        num_maskable     int64 [B]
        num_tokens       int64 [B]     tokens of each row before padding
        example_id       int64 [B]
        attention_mask   int64 [B, L]  only if `pad` makes one
        packing          dict          only for packed rows
        edit             dict          only with `editing`: what it returns
        complement       dict          only with `complementary`: noised_ids, loss_positions and loss_t of the same rows
                                       where exactly the maskable positions that are visible above are masked

    Args:
        pad: collator of {"input_ids", "labels"} rows; gets nothing but the keys of `model_keys`.
        scheduler, mask_token_id, time_epsilon: see `dllm.core.noising.mask_tokens`.
        seed: seed of all draws.
        stream: "train" draws anew every epoch; any other name (such as "eval") has the same masks in each.
        logit_shift: 1 where the logit of position p - 1 predicts token p; the first position has no such logit.
        block_size: positions of a block under block diffusion; None: full-sequence diffusion.
        time_per: "row": one time for the whole row; "block": one for each block (needs `block_size`).
        editing: what replaces these entries under the editing objective; None: no wrong tokens.
        complementary: add `complement`; excludes `editing`.

    Raises:
        InputError: `editing` and `complementary` together; packed rows under block diffusion or beside others;
            a row lacks a key, is empty, or has labels that differ from its input_ids at a maskable position.
    """

    model_keys = ("input_ids", "labels", "attention_mask")

    def __init__(
        self,
        pad: Callable[[Sequence[Batch]], Batch],
        *,
        scheduler: BaseAlphaScheduler,
        mask_token_id: int,
        time_epsilon: float = 1e-3,
        seed: int = 42,
        stream: str = "train",
        logit_shift: int = 0,
        block_size: int | None = None,
        time_per: TimePer = "row",
        editing: EditPlanner | None = None,
        complementary: bool = False,
    ) -> None:
        if complementary and editing is not None:
            raise InputError("editing and complementary masks exclude each other: drop one")
        self.pad = pad
        self.scheduler = scheduler
        self.mask_token_id = mask_token_id
        self.time_epsilon = time_epsilon
        self.seed = seed
        self.stream = stream
        self.logit_shift = logit_shift
        self.block_size, self.time_per = block_size, time_per
        self.editing, self.complementary = editing, complementary
        # In shared memory: worker processes that outlive an epoch must see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Makes the following batches draw the masks of `epoch`; no effect on a stream other than "train"."""
        if self.stream == "train":
            self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The epoch whose masks are drawn."""
        return int(self._epoch)

    def row_generators(self, example_id: torch.Tensor, purpose: str) -> list[torch.Generator]:
        """One CPU generator per row for `purpose`; two purposes of one row never share draws."""
        epoch = self.epoch
        return [make_generator(self.seed, self.stream, epoch, int(i), purpose) for i in example_id]

    def find_maskable(self, rows: Sequence[Batch], padded: Batch) -> torch.Tensor:
        """The positions that may be masked, bool [B, L]: those with a label, if the model has a logit for them.

        Args:
            rows: what the collator was called with.
            padded: what `pad` made of them.
        """
        maskable = padded["labels"] != IGNORE_INDEX
        maskable[:, : self.logit_shift] = False
        return maskable

    def check_packing(self) -> None:
        """Nothing, if packed rows can be collated.

        Raises:
            InputError: block diffusion.
        """
        if self.block_size is not None:
            raise InputError("packing and block diffusion cannot be combined: drop --packing")

    def __call__(self, rows: Sequence[Batch]) -> Batch:
        num_packed = sum(DOCUMENT_LENGTHS in row for row in rows)
        if not num_packed:
            return self.collate(rows)
        if num_packed < len(rows):
            raise InputError(f"{num_packed} of the {len(rows)} rows of a batch are packed: pack all of them, or none")
        self.check_packing()
        documents = split_documents(rows)
        return {**self.collate(documents, packed=True), "packing": lay_out([row[DOCUMENT_LENGTHS] for row in rows])}

    def collate(self, rows: Sequence[Batch], packed: bool = False) -> Batch:
        """The batch of `rows`, without `packing`; `packed`: the rows are documents that the network sees unpadded."""
        example_id = torch.tensor([_example_id(row) for row in rows])
        padded = self.pad([{key: row[key] for key in self.model_keys if key in row} for row in rows])
        if packed:
            padded = _unpadded(rows, padded)
        input_ids = padded["input_ids"]
        _check_labels(input_ids, padded["labels"], example_id)
        maskable = self.find_maskable(rows, padded)  # [B, L]

        generators = self.row_generators(example_id, "outer")
        t = draw_times(generators, self.time_epsilon)
        noise = draw_noise(generators, input_ids.shape[1])
        times = t[:, None].expand(input_ids.shape)  # [B, L]
        if self.block_size is not None and self.time_per == "block":
            others = self.row_generators(example_id, "block times")
            times = block_times(t, others, self.time_epsilon, input_ids.shape[1], self.block_size)
            t = (times * maskable).sum(dim=1) / maskable.sum(dim=1).clamp(min=1)
        noised = mask_tokens(
            input_ids, maskable, times, noise=noise, scheduler=self.scheduler, mask_token_id=self.mask_token_id
        )
        positions = flat_positions(noised.is_masked)
        batch = {
            "input_ids": input_ids,
            "noised_ids": noised.noised_ids,
            "maskable": maskable,
            "is_masked": noised.is_masked,
            "t": t,
            "loss_positions": positions,
            "loss_t": times.reshape(-1)[positions],
            "num_maskable": maskable.sum(dim=1),
            "num_tokens": torch.tensor([len(row["input_ids"]) for row in rows]),
            "example_id": example_id,
        }
        if "attention_mask" in padded:
            batch["attention_mask"] = padded["attention_mask"]
        if self.editing is not None:
            batch["edit"] = self.editing(batch, times, lambda purpose: self.row_generators(example_id, purpose))
        if self.complementary:
            batch["complement"] = self._complement(batch, times)
        return batch

    def _complement(self, batch: Batch, times: torch.Tensor) -> Batch:
        is_masked = batch["maskable"] & ~batch["is_masked"]
        positions = flat_positions(is_masked)
        return {
            "noised_ids": apply_mask(batch["input_ids"], is_masked, self.mask_token_id),
            "loss_positions": positions,
            "loss_t": times.reshape(-1)[positions],
        }


def is_inside(rows: Sequence[Batch], padded_ids: torch.Tensor) -> torch.Tensor:
    """Which places of `padded_ids` [B, L] hold a row's own tokens rather than padding behind it: bool [B, L].

    Raises:
        InputError: the rows are not padded on the right.
    """
    for row, padded_row in zip(rows, padded_ids, strict=True):
        own = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        if not torch.equal(padded_row[: len(own)], own):
            raise InputError(
                "what is padding must be known here, so rows have to be padded on the right: the data collator changed "
                f"example {row.get('example_id', '(no id)')}"
            )
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return torch.arange(padded_ids.shape[1]) < lengths[:, None]


def _unpadded(rows: Sequence[Batch], padded: Batch) -> Batch:
    """What `pad` made of documents, without what it says of their padding, which the network does not see."""
    labels = padded["labels"].masked_fill(~is_inside(rows, padded["input_ids"]), IGNORE_INDEX)
    return {"input_ids": padded["input_ids"], "labels": labels}


def _example_id(row: Batch) -> int:
    for key in ("input_ids", "labels", "example_id"):
        if key not in row:
            raise InputError(
                f"a row has no {key!r} (it has: {', '.join(row)}): tokenise the data with default_sft_map_fn "
                "and pass it through post_process_dataset"
            )
    if len(row["input_ids"]) == 0 or len(row["input_ids"]) != len(row["labels"]):
        raise InputError(
            f"example {row['example_id']} has {len(row['input_ids'])} input_ids and {len(row['labels'])} labels: "
            "give it as many labels as tokens, at least one"
        )
    return row["example_id"]


def _check_labels(input_ids: torch.Tensor, labels: torch.Tensor, example_id: torch.Tensor) -> None:
    wrong = ((labels != IGNORE_INDEX) & (labels != input_ids)).any(dim=1)
    if wrong.any():
        raise InputError(
            f"labels differ from input_ids at maskable positions of example {int(example_id[wrong][0])}: a diffusion "
            "model predicts the token in place, so set each label to its input id or to -100 (do not shift them)"
        )
