"""How training rows reach the steps: numbered, streamed, packed, grouped by length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from dllm.core.noising import make_generator
from dllm.data.collators import NoisingCollator
from dllm.data.examples import is_stream, row_lengths, with_example_ids
from dllm.data.packing import is_packed
from dllm.data.streaming import RowStream
from dllm.utils.args import TrainingArguments
from dllm.utils.parsing import InputError


class RowsTrainer(transformers.Trainer):
    """A Trainer whose rows have an `example_id`, that reads streams, and that groups rows by length in an order of
    (seed, epoch) alone.

    Overrides
        get_train_dataloader   tells a stream how many rows one step of all processes takes
        _get_train_sampler     `train_sampling_strategy` group_by_length without the global random state, which differs
                               between processes and is another one after a resumption
        _get_eval_sampler      evaluation in order, whatever the training strategy

    Raises:
        InputError: a stream without max_steps, with dispatch_batches or with a sampling strategy; a stream for
            evaluation; streamed or packed rows in a trainer that does not take them.
    """

    takes_streams = True
    takes_packed_rows = True

    args: TrainingArguments

    def __init__(
        self,
        *,
        args: TrainingArguments,
        data_collator: NoisingCollator,
        train_dataset=None,
        eval_dataset=None,
        **kwargs: Any,
    ) -> None:
        packed, streamed = is_packed(train_dataset), is_stream(train_dataset)
        refuse_rows(type(self), args, streamed=streamed, packed=packed)
        if packed:
            data_collator.check_packing()
        if streamed:
            loading: Any = args.accelerator_config
            loading.dispatch_batches = False  # each process collates its own rows
        if is_packed(eval_dataset):
            raise InputError("an evaluation looks at each document on its own: pack the training rows only")
        super().__init__(
            args=args,
            data_collator=data_collator,
            train_dataset=with_example_ids(train_dataset, may_stream=True),
            eval_dataset=with_example_ids(eval_dataset),
            **kwargs,
        )
        self._groups = _Groups()
        self.add_callback(self._groups)

    @classmethod
    def check_packing(cls, args: TrainingArguments) -> None:
        """Nothing, if packed rows can be trained on with these settings; for trainers with more of them.

        Raises:
            InputError: they cannot.
        """

    def get_train_dataloader(self) -> DataLoader:
        """As in Trainer; a stream learns how many rows one step of all processes takes."""
        if isinstance(self.train_dataset, RowStream):
            loading: Any = self.args.accelerator_config
            processes = 1 if loading.split_batches else self.accelerator.num_processes
            self.train_dataset.rows_per_turn = self._train_batch_size * processes
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or rows is None:
            return super()._get_train_sampler(train_dataset)
        # The rows of one step of all processes: the order must not depend on how many share it.
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * max(1, self.args.world_size)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._groups.sampler = LengthGroups(size, row_lengths(rows, self.args.length_column_name), seed)
        return self._groups.sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return SequentialSampler(eval_dataset)


def refuse_rows(trainer_class: type[RowsTrainer], args: TrainingArguments, *, streamed: bool, packed: bool) -> None:
    """Nothing, if the trainer can take training rows of this form; a script asks before it loads anything.

    Raises:
        InputError: see `RowsTrainer`.
    """
    if packed and not trainer_class.takes_packed_rows:
        raise InputError(f"{trainer_class.__name__} cannot train on packed rows: drop --packing")
    if packed:
        trainer_class.check_packing(args)
    if not streamed:
        return
    if not trainer_class.takes_streams:
        raise InputError(f"{trainer_class.__name__} needs rows with a length: drop --streaming")
    if args.max_steps <= 0:
        raise InputError("a stream has no end that an epoch could be counted by: give --max_steps")
    if args.train_sampling_strategy != "random":
        raise InputError(
            f"--train_sampling_strategy {args.train_sampling_strategy} has no effect on a stream, which is read in "
            "order: drop it"
        )
    loading: Any = args.accelerator_config
    if loading.dispatch_batches:
        raise InputError("dispatch_batches cannot cut up a stream's batches, whose loss positions are flat: drop it")


class LengthGroups(LengthGroupedSampler):
    """Indices in an order that brings rows of like length together, drawn from (seed, epoch).

    Args:
        batch_size: rows that are to be alike.
        lengths: of all rows.
        seed: of the draws.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration draw the order of `epoch`."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator: torch.Generator = make_generator(self.seed, "length groups", self.epoch)
        return super().__iter__()


class _Groups(transformers.TrainerCallback):
    """Tells the sampler its epoch: where batches are skipped and shared between processes, nothing else does."""

    def __init__(self) -> None:
        self.sampler: LengthGroups | None = None

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if self.sampler is not None:
            # Fractional when a run resumes inside an epoch; the small term absorbs the rounding of a division.
            self.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))
