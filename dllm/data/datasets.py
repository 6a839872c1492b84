"""Data sets by name: `name[train:5000,test:500]+other` -> rows, from the Hub, from files, or built in.

The grammar: parts joined by `+`; a part is a name, options after `?` (`key=value&key=value`), and a bracket that
selects splits. `[train:5000]` takes the first 5,000 rows of train and nothing else, `[train]` all of train; without
a bracket train and test are taken whole. A test count for a data set without a test split cuts the test rows off
the end of train.
"""

import itertools
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from dllm.data.builtin import DEFAULT_CONTEXT, load_docstrings
from dllm.data.files import READERS, TEST_WORDS, find_broken_line, load_files
from dllm.data.preprocessed import (
    TOKEN_COLUMNS,
    by_name,
    check_preprocessed,
    find_preprocessed,
    is_saved_dataset,
    load_saved,
    read_record,
)
from dllm.data.sft import processes_for, to_messages
from dllm.data.streaming import READ_ERRORS
from dllm.utils.args import resolve_with_base_env
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError, parse_spec

logger = get_default_logger(__name__)

SPLITS = ("train", "test")
DOCSTRINGS = "builtin:docstrings"


@dataclass(frozen=True)
class HubLayout:
    """Where a Hub data set keeps what: the names of its splits (None: it has no such split) and its columns."""

    columns: tuple[str, ...]
    train: str = "train"
    test: str | None = None


HUB_LAYOUTS = {
    "tatsu-lab/alpaca": HubLayout(columns=("instruction", "input", "output")),
    "Yukang/LongAlpaca-12k": HubLayout(columns=("instruction", "output")),
    "allenai/tulu-3-sft-mixture": HubLayout(columns=("messages",)),
    "HuggingFaceH4/ultrachat_200k": HubLayout(columns=("messages",), train="train_sft", test="test_sft"),
}


@dataclass(frozen=True)
class DatasetPart:
    """One part of dataset_args: `limits` maps the selected splits to a number of rows (None: all of them)."""

    name: str
    options: Mapping[str, str]
    limits: Mapping[str, int | None]


def _parse_options(text: str, part: str) -> dict[str, str]:
    options = {}
    for entry in text.split("&"):
        key, _, value = entry.partition("=")
        if not key or not value:
            raise InputError(f"{part!r}: {entry!r} after '?' is not key=value")
        options[key] = value
    return options


def _parse_part(part: str) -> DatasetPart:
    spec, limits = parse_spec(part)
    if spec is None:
        raise InputError(f"{part!r} names no data set; the form is name[train:5000,test:500]+other")
    for split, count in limits.items():
        if split not in SPLITS:
            raise InputError(f"{part!r}: split {split!r} is unknown; allowed: {', '.join(SPLITS)}")
        if count is not None and (not isinstance(count, int) or count < 1):
            raise InputError(f"{part!r}: the number of {split} rows must be a whole number above 0, not {count!r}")
    name, _, options = spec.partition("?")
    counts = {split: count for split, count in limits.items() if not isinstance(count, str)}
    return DatasetPart(name, _parse_options(options, part) if "?" in spec else {}, counts)


def parse_dataset_args(dataset_args: str) -> list[DatasetPart]:
    """The parts of `name[train:5000,test:500]+other`, in order.

    Raises:
        InputError: names the part with an unclosed bracket, an unknown split, a count that is no whole number
            above 0, an option without value, or no name.
    """
    parts = re.split(r"\+(?![^\[]*\])", dataset_args)  # a + within brackets is left for parse_spec to refuse
    if not all(part.strip() for part in parts):
        raise InputError(f"{dataset_args!r}: a name is missing beside '+'")
    return [_parse_part(part.strip()) for part in parts]


def spec_of(part: DatasetPart) -> str:
    """The part as it was written, without the bracket: name?key=value."""
    options = "&".join(f"{key}={value}" for key, value in part.options.items())
    return f"{part.name}?{options}" if options else part.name


def _take_options(part: DatasetPart, *allowed: str) -> list[str | None]:
    unknown = sorted(set(part.options) - set(allowed))
    if unknown:
        known = ", ".join(allowed) or "none here"
        raise InputError(f"{part.name!r}: option {unknown[0]!r} is unknown; allowed: {known}")
    return [part.options.get(name) for name in allowed]


def _load_builtin(part: DatasetPart) -> datasets.DatasetDict:
    if part.name != DOCSTRINGS:
        raise InputError(f"{part.name!r} is not built in; there is {DOCSTRINGS}")
    (context,) = _take_options(part, "context")
    if context is not None and not context.isdecimal():
        raise InputError(f"{DOCSTRINGS}?context={context}: must be a whole number of characters")
    return load_docstrings(DEFAULT_CONTEXT if context is None else int(context))


def _load_hub(part: DatasetPart, streaming: bool) -> dict[str, Any]:
    (config,) = _take_options(part, "config")
    help_offline = f"give a local file, or {DOCSTRINGS}, which needs no network"
    try:
        loaded: Any = datasets.load_dataset(part.name, config, streaming=streaming)
    except (DatasetNotFoundError, DataFilesNotFoundError):
        raise InputError(f"the Hub has no data set {part.name!r} that you may read: {help_offline}") from None
    except (ConnectionError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{part.name!r} could not be reached ({reason:.200}): {help_offline}") from None
    except ValueError as error:
        if "onfig" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{part.name!r} needs a configuration, {part.name}?config=NAME: {reason}") from None
    layout = HUB_LAYOUTS.get(part.name)
    if layout is None:
        return by_name(loaded)
    names = {"train": layout.train, "test": layout.test}
    return {
        split: loaded[name].select_columns(list(layout.columns)) for split, name in names.items() if name is not None
    }


def _load_raw(part: DatasetPart, streaming: bool = False) -> dict[str, Any]:
    """{split: rows} as they are in the source."""
    if part.name.startswith("builtin:"):
        return by_name(_load_builtin(part))
    path = pathlib.Path(resolve_with_base_env(part.name, "BASE_DATASETS_DIR"))
    if path.exists():
        _take_options(part)
        if is_saved_dataset(path):
            return by_name(load_saved(path))
        return load_files(path, streaming)
    looks_local = path.suffix in (*READERS, ".gz") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", part.name)
    if looks_local or part.name.startswith("."):
        raise InputError(f"data file {part.name!r} does not exist (working folder {pathlib.Path.cwd()})")
    return _load_hub(part, streaming)


def load_raw_dataset(name: str, options: Mapping[str, str] | None = None, streaming: bool = False) -> dict[str, Any]:
    """{split: rows} of one data set as it is in its source, the names of splits and columns included.

    Args:
        name: a file or folder, builtin:docstrings, or a Hub name, as in the grammar at the top of this module.
        options: what stands after the ? there.
        streaming: read while iterating where the source can.

    Raises:
        InputError: it cannot be read, or an option is unknown.
    """
    return _load_raw(DatasetPart(name, options or {}, {}), streaming)


def _standard_splits(loaded: dict[str, Any]) -> dict[str, Any]:
    """Only train and test; a validation split serves as test where there is no other."""
    test = next((name for name in TEST_WORDS if name in loaded), None)
    found = {"train": loaded["train"]} if "train" in loaded else {}
    return {**found, "test": loaded[test]} if test is not None else found


def _first(rows: Any, count: int | None, place: str) -> Any:
    if isinstance(rows, datasets.IterableDataset):
        return rows if count is None else rows.take(count)
    if count is not None and count > len(rows):
        logger.warning(f"{place}: {count:,} rows asked for, {len(rows):,} there, all taken")
    return rows if count is None else rows.select(range(min(count, len(rows))))


def _carve_test(part: DatasetPart, splits: dict[str, Any]) -> dict[str, Any]:
    """Test rows off the end of train, where a count of them is asked for and there is no test split."""
    count = part.limits.get("test")
    if "test" in splits or "train" not in splits or count is None:
        return splits
    train = splits["train"]
    if isinstance(train, datasets.IterableDataset):
        raise InputError(f"{part.name!r} has no test split, and a stream has no end to cut one from: drop test:{count}")
    if count >= len(train):
        raise InputError(f"{part.name!r}: test:{count} leaves nothing of its {len(train):,} train rows: ask for fewer")
    border = len(train) - count
    return {"train": train.select(range(border)), "test": train.select(range(border, len(train)))}


def _select(part: DatasetPart, loaded: dict[str, Any]) -> dict[str, Any]:
    splits = _carve_test(part, _standard_splits(loaded))
    wanted = part.limits or dict.fromkeys(splits)
    for split in wanted:
        if split not in splits:
            raise InputError(f"{part.name!r} has no split {split!r}; it has: {', '.join(map(str, loaded))}")
    if not splits:
        raise InputError(f"{part.name!r} has neither train nor test; it has: {', '.join(map(str, loaded))}")
    return {split: _first(splits[split], count, f"{part.name}, {split}") for split, count in wanted.items()}


def _join(parts: list[dict[str, Any]]) -> dict[Any, Any]:
    joined: dict[Any, Any] = {}
    for split in SPLITS:
        rows = [part[split] for part in parts if split in part]
        if rows:
            joined[split] = rows[0] if len(rows) == 1 else datasets.concatenate_datasets(rows)
    return joined


def _messages_of_row(row: Mapping[str, Any], index: int, place: str) -> dict[str, Any]:
    try:
        return {"messages": to_messages(row)}
    except InputError as error:
        raise InputError(f"{place}, row {index}: {error}") from None
    except UnicodeDecodeError as error:  # the JSON reader does not look inside strings
        raise InputError(f"{place}, row {index}: {error}; save the file as UTF-8") from None


_MESSAGES = datasets.Features(
    {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})}
)


def _columns_of(part: DatasetPart, rows: Any) -> list[str]:
    # A stream may not know its columns before a row.
    if rows.column_names:
        return rows.column_names
    try:
        return list(next(iter(rows), {}))
    except READ_ERRORS as error:
        raise InputError(_explain_parts([part], error)) from None


def explain_reading(dataset_args: str, error: Exception) -> str:
    """One line on an error while a stream of these data sets is read: the broken line of a file, if it is found.

    Args:
        dataset_args: the grammar at the top of this module.
        error: what the reader raised.
    """
    return _explain_parts(parse_dataset_args(dataset_args), error)


def _explain_parts(parts: list[DatasetPart], error: Exception) -> str:
    for part in parts:
        if part.name.startswith("builtin:"):
            continue
        place = find_broken_line(pathlib.Path(resolve_with_base_env(part.name, "BASE_DATASETS_DIR")))
        if place is not None:
            return place
    names = " + ".join(part.name for part in parts)
    return f"{names} cannot be read: {' '.join(str(error.__cause__ or error).split())}"


def _to_messages(part: DatasetPart, splits: dict[str, Any], num_proc: int | None) -> dict[str, Any]:
    converted = {}
    for split, rows in splits.items():
        columns = _columns_of(part, rows)
        if "input_ids" in columns:
            raise InputError(f"{part.name!r} is tokenised already: pass --load_preprocessed_data True")
        options: dict[str, Any] = {}
        if isinstance(rows, datasets.Dataset):
            options = {"num_proc": processes_for(num_proc, rows), "desc": f"reading {part.name} {split}"}
        converted[split] = rows.map(
            _messages_of_row,
            with_indices=True,
            fn_kwargs={"place": f"{part.name}, {split}"},
            remove_columns=columns,
            features=_MESSAGES,
            **options,
        )
    return converted


def _load_tokens(
    part: DatasetPart,
    model_name_or_path: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    mask_prompt_loss: bool | None,
) -> dict[str, Any]:
    folder = find_preprocessed(spec_of(part), model_name_or_path)
    if tokenizer is not None and read_record(folder) is None:
        logger.warning(f"{folder} has no record of its tokenizer: whether it fits cannot be checked")
    elif tokenizer is not None:
        check_preprocessed(folder, tokenizer, mask_prompt_loss)
    loaded = by_name(load_saved(folder))
    for split, rows in loaded.items():
        missing = [column for column in TOKEN_COLUMNS if column not in rows.column_names]
        if missing:
            raise InputError(
                f"{folder}, {split} lacks {', '.join(missing)}: it is not tokenised, drop --load_preprocessed_data"
            )
    return {split: rows.select_columns(list(TOKEN_COLUMNS)) for split, rows in loaded.items()}


def load_sft_dataset(
    dataset_args: str,
    load_preprocessed_data: bool = False,
    *,
    model_name_or_path: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    mask_prompt_loss: bool | None = None,
    num_proc: int | None = None,
) -> datasets.DatasetDict:
    """Splits train and test (those there are) of fine-tuning rows.

    Raw data sets give one column `messages` (see to_messages), preprocessed ones input_ids, labels and prompt_len.

    Args:
        dataset_args: the grammar at the top of this module.
        load_preprocessed_data: read token rows made by dllm.tools.preprocess_sft_dataset (find_preprocessed).
        model_name_or_path: for finding them under data/sft/MODEL; None: not looked for there.
        tokenizer: the preprocessed rows must have been made with it (check_preprocessed); None: not checked.
        mask_prompt_loss: the preprocessed rows must have been made with it; None: not checked.
        num_proc: processes that convert rows; None: no extra process.

    Raises:
        InputError: one line that names the part of dataset_args, the file and line, or the row.
    """
    parts = []
    for part in parse_dataset_args(dataset_args):
        if load_preprocessed_data:
            parts.append(_select(part, _load_tokens(part, model_name_or_path, tokenizer, mask_prompt_loss)))
        else:
            parts.append(_to_messages(part, _select(part, _load_raw(part)), num_proc))
    return datasets.DatasetDict(_join(parts))


def _only_text(part: DatasetPart, splits: dict[str, Any]) -> dict[str, Any]:
    for split, rows in splits.items():
        columns = _columns_of(part, rows)
        if "text" not in columns:
            raise InputError(f"{part.name!r}, {split} has no column 'text'; columns found: {', '.join(columns)}")
    return {
        split: _checked_texts(rows.select_columns(["text"]), f"{part.name}, {split}") for split, rows in splits.items()
    }


def _checked_texts(rows: Any, place: str) -> Any:
    """The rows: a stream's are checked as they come."""
    if isinstance(rows, datasets.IterableDataset):
        return rows.map(_checked_text, with_indices=True, fn_kwargs={"place": place})
    numbers = itertools.count()
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        for value, index in zip(batch["text"], numbers, strict=False):
            _checked_text({"text": value}, index, place)
    return rows


def _checked_text(row: Mapping[str, Any], index: int, place: str) -> dict[str, str]:
    try:
        text = row["text"].as_py() if isinstance(row["text"], pyarrow.Scalar) else row["text"]
    except UnicodeDecodeError as error:  # the JSON reader does not look inside strings
        raise InputError(f"{place}, row {index}: {error}; save the file as UTF-8") from None
    if not isinstance(text, str):
        raise InputError(
            f"{place}, row {index}: column 'text' must be text but is {type(text).__name__}: correct or delete the row"
        )
    return {"text": text}


def _as_stream(rows: Any) -> datasets.IterableDataset:
    # What save_to_disk wrote is memory-mapped: it comes whole, and costs nothing until it is read.
    return rows if isinstance(rows, datasets.IterableDataset) else rows.to_iterable_dataset()


def stream_sft_dataset(dataset_args: str) -> datasets.IterableDatasetDict:
    """As `load_sft_dataset` of raw data sets, read while iterating instead of first.

    Args:
        dataset_args: the grammar at the top of this module.

    Raises:
        InputError: those of `load_sft_dataset`, of a row while iterating.
    """
    parts = []
    for part in parse_dataset_args(dataset_args):
        splits = _select(part, _load_raw(part, streaming=True))
        parts.append(_to_messages(part, {name: _as_stream(rows) for name, rows in splits.items()}, None))
    return datasets.IterableDatasetDict(_join(parts))


def load_pt_dataset(dataset_args: str, streaming: bool = False) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Splits train and test (those there are) of pretraining rows {"text": str}, for tokenize_and_group.

    A .txt file gives one row per line, line ends kept, so that joined rows are the file again.

    Args:
        dataset_args: the grammar at the top of this module.
        streaming: read while iterating instead of first.

    Raises:
        InputError: one line that names the part of dataset_args, the file and line, or the missing column.
    """
    parts = []
    for part in parse_dataset_args(dataset_args):
        splits = _only_text(part, _select(part, _load_raw(part, streaming)))
        parts.append({name: _as_stream(rows) for name, rows in splits.items()} if streaming else splits)
    return datasets.IterableDatasetDict(_join(parts)) if streaming else datasets.DatasetDict(_join(parts))
