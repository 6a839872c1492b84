"""From data arguments to training rows: whole or streamed, packed or not, for fine-tuning and for pretraining."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from dllm.core.noising import make_generator
from dllm.data.datasets import explain_reading, load_pt_dataset, load_sft_dataset, stream_sft_dataset
from dllm.data.packing import Packer, pack_dataset
from dllm.data.sft import (
    fit_row,
    group_tokens,
    map_row,
    post_process_dataset,
    processes_for,
    tokenize_sft_dataset,
)
from dllm.data.streaming import DROP, Row, RowStream, Step, read_rows
from dllm.utils.args import DataArguments
from dllm.utils.parsing import InputError

# Texts that are joined before they are cut into rows; what is left over at the end is dropped.
GROUP_TEXTS = 10_000

# Said, not guessed: a first batch may leave no row.
_IDS = datasets.List(datasets.Value("int64"))
_ROW = datasets.Features({"input_ids": _IDS, "labels": _IDS, "prompt_len": datasets.Value("int64")})

RowSets = Mapping[str, Any]  # train: a Dataset or a RowStream; test (where there is one): rows with a length


@dataclass
class PretrainingArguments(DataArguments):
    """`DataArguments` for plain text: rows are cut from joined texts, or with `packing` hold whole ones."""

    random_length_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training rows that are cut to a random length, uniform on [1, max_length], so that "
            "short inputs are known too (LLaDA, arXiv 2502.09992), in [0, 1]. None: 0.01, with packing 0."
        },
    )

    @property
    def hides_padding(self) -> bool:
        """True: padding stands for nothing in a text."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        for knob in fields(DataArguments):
            idle = knob.name in ("load_preprocessed_data", "truncation", "mask_prompt_loss")
            if idle and getattr(self, knob.name) != knob.default:
                raise InputError(f"--{knob.name} has no effect on plain text: drop it")
        if self.random_length_ratio is None:
            return
        if not 0 <= self.random_length_ratio <= 1:
            raise InputError(f"--random_length_ratio is {self.random_length_ratio} but must be in [0, 1]")
        if self.packing:
            raise InputError("--random_length_ratio has no effect with --packing, where texts keep their lengths")

    @property
    def cut_share(self) -> float:
        """The share that `random_length_ratio` stands for."""
        given = self.random_length_ratio
        return given if given is not None else 0.0 if self.packing else 0.01


def load_sft_rows(
    data_args: DataArguments, tokenizer: PreTrainedTokenizerBase, model_name_or_path: str, seed: int
) -> RowSets:
    """The fine-tuning rows that the data arguments name, cut to max_length, by split.

    Args:
        data_args: all settings.
        tokenizer: of the model.
        model_name_or_path: where preprocessed rows may lie.
        seed: of the order of a stream.

    Raises:
        InputError: see `load_sft_dataset`, `tokenize_sft_dataset` and `post_process_dataset`.
    """
    if data_args.streaming:
        return _stream_sft_rows(data_args, tokenizer, seed)
    rows = load_sft_dataset(
        data_args.dataset_args,
        data_args.load_preprocessed_data,
        model_name_or_path=model_name_or_path,
        tokenizer=tokenizer,
        mask_prompt_loss=data_args.mask_prompt_loss,
        num_proc=data_args.num_proc,
    )
    if not data_args.load_preprocessed_data:
        rows = tokenize_sft_dataset(rows, tokenizer, data_args.mask_prompt_loss, data_args.num_proc)
    rows = post_process_dataset(rows, data_args)
    # Evaluation looks at each document on its own.
    packs = {"train"} if data_args.packing else set()
    return {
        str(name): pack_dataset(part, data_args.max_length) if name in packs else part for name, part in rows.items()
    }


def load_pretraining_rows(
    data_args: PretrainingArguments, tokenizer: PreTrainedTokenizerBase, model_name_or_path: str, seed: int
) -> RowSets:
    """The rows of plain text that the data arguments name, by split: every token is one to learn.

    An end-of-text token follows each text. Without packing texts are joined and cut into rows of max_length; with it
    each is a document, cut where it is longer.

    Args:
        data_args: all settings.
        tokenizer: of the model, with an end-of-text token.
        model_name_or_path: not used: there is nothing preprocessed.
        seed: of random lengths and of the order of a stream.

    Raises:
        InputError: see `load_pt_dataset`; no end-of-text token; texts too short for a row.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("texts are told apart by an end-of-text token: name eos_token in tokenizer_config.json")
    loaded: Any = load_pt_dataset(data_args.dataset_args, data_args.streaming)
    rows: dict[str, Any] = {}
    if "test" in loaded:
        test: Any = _read_whole(loaded["test"], data_args) if data_args.streaming else loaded["test"]
        rows["test"] = _text_rows("test", test, tokenizer, data_args)
    if "train" not in loaded:
        return rows
    if data_args.streaming:
        make: Step = Packer(data_args.max_length) if data_args.packing else _Joiner(data_args.max_length)
        steps: list[Step] = [_Cutter(data_args.max_length)] if data_args.packing else []
        steps += [make, *([] if data_args.packing else [_Shortener(data_args.cut_share, seed)])]
        fit = functools.partial(_fit_text, tokenizer=tokenizer)
        return {**rows, "train": _row_stream(loaded["train"], data_args, seed, fit, steps)}
    train = _text_rows("train", loaded["train"], tokenizer, data_args)
    if data_args.packing:
        return {**rows, "train": pack_dataset(train, data_args.max_length)}
    if data_args.cut_share:
        options = {"share": data_args.cut_share, "seed": seed}
        train = train.map(_shorten, fn_kwargs=options, desc="cutting rows to random lengths")
    return {**rows, "train": train}


def _row_stream(
    rows: datasets.IterableDataset, data_args: DataArguments, seed: int, fit: Callable[..., Row], steps: Sequence[Step]
) -> RowStream:
    size = data_args.shuffle_buffer_size
    shuffled = rows.shuffle(seed=seed, buffer_size=size) if size > 1 else rows
    return RowStream(shuffled, fit, steps, functools.partial(explain_reading, data_args.dataset_args))


def _read_whole(rows: datasets.IterableDataset, data_args: DataArguments) -> datasets.Dataset:
    explain = functools.partial(explain_reading, data_args.dataset_args)
    return datasets.Dataset.from_list(list(read_rows(rows, explain)))


def _stream_sft_rows(data_args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> RowSets:
    loaded = stream_sft_dataset(data_args.dataset_args)
    rows: dict[str, Any] = {}
    if "test" in loaded:
        test = datasets.DatasetDict({"test": _read_whole(loaded["test"], data_args)})
        test = tokenize_sft_dataset(test, tokenizer, data_args.mask_prompt_loss)
        rows["test"] = post_process_dataset(test, data_args)["test"]
    if "train" in loaded:
        fit = functools.partial(_fit_messages, tokenizer=tokenizer, data_args=data_args)
        steps = [Packer(data_args.max_length)] if data_args.packing else []
        rows["train"] = _row_stream(loaded["train"], data_args, seed, fit, steps)
    return rows


def _fit_messages(row: Row, index: int, *, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments) -> Row:
    tokens = map_row(
        row, index, "train as streamed (shuffled)", tokenizer=tokenizer, mask_prompt_loss=data_args.mask_prompt_loss
    )
    return fit_row(tokens, index, data_args.max_length, data_args.truncation)


def _fit_text(row: Row, index: int, *, tokenizer: PreTrainedTokenizerBase) -> Row:
    (ids,) = _text_ids({"text": [row["text"]]}, tokenizer)["input_ids"] or [[]]
    return _document(ids, "" if ids else "no text")


def _document(ids: list[Any], drop: str = "") -> Row:
    return {"input_ids": ids, "labels": list(ids), "prompt_len": 0, DROP: drop}


def _text_ids(columns: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokens of each text, with an end-of-text token behind them; texts without any are left out."""
    texts: Any = tokenizer(list(columns["text"]), add_special_tokens=False, verbose=False)["input_ids"]
    return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in texts if ids]}


def _text_rows(
    split: str, texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, data_args: PretrainingArguments
) -> datasets.Dataset:
    """Rows {input_ids, labels, prompt_len, example_id} of one split: joined and cut texts, or with packing pieces of
    single ones."""
    documents = texts.map(
        _text_ids,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns=texts.column_names,
        features=datasets.Features({"input_ids": _IDS}),
        num_proc=processes_for(data_args.num_proc, texts),
        desc=f"tokenising {split}",
    )
    # In one process: the rows must not depend on how many there are.
    made = documents.map(
        _pieces if data_args.packing else _joined,
        batched=True,
        batch_size=GROUP_TEXTS,
        fn_kwargs={"max_length": data_args.max_length},
        remove_columns=["input_ids"],
        features=_ROW,
        desc=f"cutting rows of {split}",
    )
    if not len(made):
        raise InputError(
            f"split {split}: its {len(texts):,} texts do not fill one row of {data_args.max_length} tokens: lower "
            "--max_length, or name more data"
        )
    return made.add_column("example_id", list(range(len(made))))


def _joined(columns: Mapping[str, list[list[int]]], max_length: int) -> dict[str, Any]:
    return group_tokens(columns["input_ids"], max_length)


def _pieces(columns: Mapping[str, list[list[int]]], max_length: int) -> dict[str, Any]:
    cut = list(_Cutter(max_length)(_document(ids) for ids in columns["input_ids"]))
    return {key: [row[key] for row in cut] for key in ("input_ids", "labels", "prompt_len")}


class _Cutter:
    """Cuts documents into pieces of at most max_length tokens, each a document of its own with its running number.

    Where the end-of-text token alone would be left for a last piece, there is none.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def __call__(self, rows: Iterator[Row]) -> Iterator[Row]:
        number = 0
        for row in rows:
            ids = row["input_ids"]
            for start in range(0, max(1, len(ids) - 1), self.max_length):
                yield {**_document(ids[start : start + self.max_length]), "example_id": number}
                number += 1


class _Joiner:
    """Joins documents and cuts rows of max_length tokens out of them."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def __call__(self, rows: Iterator[Row]) -> Iterator[Row]:
        tokens = itertools.chain.from_iterable(row["input_ids"] for row in rows)
        for number in itertools.count():
            yield {**_document(list(itertools.islice(tokens, self.max_length))), "example_id": number}


class _Shortener:
    """Cuts a share of the rows to random lengths."""

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.seed = share, seed

    def __call__(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            yield _shorten(row, self.share, self.seed)


def _shorten(row: Row, share: float, seed: int) -> Row:
    """The row, or with probability `share` its first u tokens, u uniform on [1, all]; drawn from its example id."""
    generator = make_generator(seed, "random length", int(row["example_id"]))
    if float(torch.rand(1, generator=generator)) >= share:
        return dict(row)
    length = int(torch.randint(1, len(row["input_ids"]) + 1, (1,), generator=generator))
    return {**row, "input_ids": row["input_ids"][:length], "labels": row["labels"][:length]}
