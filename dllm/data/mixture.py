"""A mixture of fine-tuning rows: so many of each source, filtered, without repeated prompts and benchmark problems.

A source is `NAME?key=value&key=value:NUMBER`. NAME is a data file or folder, `builtin:docstrings` or a Hub name; NUMBER
is how many rows to take; the keys are those of SourceOptions and `config` (of a Hub data set).
"""

import dataclasses
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import datasets
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dllm.core.noising import derive_seed
from dllm.data.datasets import load_raw_dataset
from dllm.data.overlap import LeakFilter, Seen
from dllm.data.sft import Messages, default_sft_map_fn, to_messages
from dllm.utils.distributed import is_main_process
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError

logger = get_default_logger(__name__)


@dataclass(frozen=True)
class SourceOptions:
    """What a source's rows look like and which of them are taken. None: as the known layout says, or no such filter.

    Raises:
        InputError: a number out of its range.
    """

    split: str | None = None  # of the data set; None: train
    prompt: str | None = None  # column of the question
    response: str | None = None  # column of the answer; both or neither
    score: str | None = None  # column with a number; needs min_score
    results: str | None = None  # column with a list of test results (or its JSON text); needs all_pass
    min_score: float | None = None  # lowest score that is taken
    all_pass: bool | None = None  # take only rows with test results that are all "pass"
    contains: str | None = None  # text that the answer must hold, capitals and spaces included
    max_prompt_chars: int | None = None  # at least 1
    max_response_chars: int | None = None  # at least 1

    def __post_init__(self) -> None:
        for name in ("max_prompt_chars", "max_response_chars"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.min_score is not None and math.isnan(self.min_score):
            raise InputError("min_score must be a number, got nan")
        if (self.prompt is None) != (self.response is None):
            raise InputError("prompt and response are columns of one row: give both, or neither")


# Data sets whose columns do not say what they are: recognised by these columns together.
LAYOUTS: dict[str, tuple[tuple[str, ...], SourceOptions]] = {
    "open_code_instruct": (
        ("input", "output", "average_test_score", "tests_execution_status"),
        SourceOptions(prompt="input", response="output", score="average_test_score", results="tests_execution_status"),
    ),
    "open_math_instruct_2": (
        ("problem", "generated_solution"),
        SourceOptions(prompt="problem", response="generated_solution"),
    ),
}


@dataclass(frozen=True)
class MixturePreset:
    """Published settings: sources, options by the layout of a source, and the settings of the mixture."""

    sources: tuple[str, ...]
    options: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]


# "c40m60" (arXiv 2605.22967): 40 % code with passing tests, 60 % mathematics.
MIXTURE_PRESETS = {
    "c40m60": MixturePreset(
        sources=("nvidia/OpenCodeInstruct:24000", "nvidia/OpenMathInstruct-2?split=train_1M:36000"),
        options={
            "open_code_instruct": {"min_score": 1.0, "all_pass": True, "contains": "def "},
            "open_math_instruct_2": {"max_prompt_chars": 4000, "max_response_chars": 6000},
        },
        settings={"seed": 42, "max_tokens": 2048, "system": "You are a helpful assistant."},
    )
}


@dataclass(frozen=True)
class Source:
    """One source as it was asked for.

    name: of the data set.
    count: rows to take, at least 1.
    options: what the user gave; the layout fills in the rest.
    loading: options of the data set itself.
    """

    name: str
    count: int
    options: SourceOptions = field(default_factory=SourceOptions)
    loading: Mapping[str, str] = field(default_factory=dict)


def _typed(name: str, text: str, spec: str) -> Any:
    try:
        if name == "min_score":
            return float(text)
        if name in ("max_prompt_chars", "max_response_chars"):
            return int(text)
    except ValueError:
        raise InputError(f"{spec!r}: {name}={text} is no number") from None
    if name == "all_pass":
        if text.lower() not in ("true", "false"):
            raise InputError(f"{spec!r}: all_pass is True or False, not {text!r}")
        return text.lower() == "true"
    return text


def parse_source(spec: str) -> Source:
    """The source that `NAME?key=value&...:NUMBER` names.

    Raises:
        InputError: no number, an unknown key, or a value that is none.
    """
    match = re.fullmatch(r"(?P<name>[^?]+?)(?:\?(?P<options>.*))?:(?P<count>\d[\d_]*)", spec.strip(), re.DOTALL)
    if match is None or int(match["count"]) < 1:
        raise InputError(f"{spec!r}: the form is FILE:NUMBER, or FILE?key=value&key=value:NUMBER, the number above 0")
    known = [option.name for option in dataclasses.fields(SourceOptions)]
    given: dict[str, Any] = {}
    loading: dict[str, str] = {}
    for entry in (match["options"] or "").split("&") if match["options"] else []:
        key, _, value = entry.partition("=")
        if not value or key not in (*known, "config"):
            raise InputError(f"{spec!r}: {entry!r} is no key=value; the keys are {', '.join(known)}, config")
        if key == "config":
            loading[key] = value
        else:
            given[key] = _typed(key, value, spec)
    return Source(match["name"], int(match["count"]), SourceOptions(**given), loading)


def _layout(source: Source, columns: Sequence[str]) -> str | None:
    """Name of the known layout that a source has; None: it has none, or the user names its columns."""
    fits = (name for name, (needed, _) in LAYOUTS.items() if set(needed) <= set(columns))
    return None if source.options.prompt is not None else next(fits, None)


def _fill(source: Source, columns: Sequence[str], by_layout: Mapping[str, Mapping[str, Any]]) -> SourceOptions:
    """The source's options over the preset's over those of its layout.

    Raises:
        InputError: a column that is not there, a filter without its column, or a column without its filter.
    """
    layout = _layout(source, columns)
    base = SourceOptions() if layout is None else LAYOUTS[layout][1]
    given = {name: value for name, value in vars(source.options).items() if value is not None}
    options = dataclasses.replace(base, **{**by_layout.get(layout or "", {}), **given})
    for name in ("prompt", "response", "score", "results"):
        column = vars(options)[name]
        if column is not None and column not in columns:
            raise InputError(f"{source.name}: there is no column {column!r}; columns found: {', '.join(columns)}")
    for filter_name, column in (("min_score", "score"), ("all_pass", "results")):
        asked = vars(options)[filter_name]
        is_asked = asked is not None and asked is not False  # a score of 0 is asked for, too
        if is_asked and vars(options)[column] is None:
            raise InputError(f"{source.name}: {filter_name} needs the column to look at: add &{column}=COLUMN")
        if column in given and not is_asked:
            raise InputError(f"{source.name}: {column} has no effect without {filter_name}: give both, or drop it")
    return options


@dataclass
class MixtureSettings:
    """How sources become one data set.

    Raises:
        InputError: a value out of its range, or max_tokens without a tokenizer.
    """

    seed: int = 0  # of the order of rows
    shuffle_buffer: int | None = None  # rows held while streaming, at least 1; None: read whole sources and shuffle all
    system: str | None = None  # system message of rows that have none; None: no such message
    max_tokens: int | None = None  # of a conversation in the chat template, at least 1; None: any number
    tokenizer: PreTrainedTokenizerBase | None = None  # that counts them; with a chat template
    leaks: LeakFilter | None = None  # None: nothing is looked for

    def __post_init__(self) -> None:
        for name in ("shuffle_buffer", "max_tokens"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.max_tokens is not None and self.tokenizer is None:
            raise InputError("max_tokens counts the tokens of a model: give --model_name_or_path too")


def _shuffled(source: Source, index: int, settings: MixtureSettings) -> tuple[Iterator[dict[str, Any]], list[str]]:
    """(rows of the source's split in random order, its columns)."""
    streaming = settings.shuffle_buffer is not None
    loaded = load_raw_dataset(source.name, source.loading, streaming)
    split = source.options.split or "train"
    if split not in loaded:
        raise InputError(f"{source.name} has no split {split!r}; it has: {', '.join(loaded)}: give ?split=NAME")
    rows, seed = loaded[split], derive_seed(settings.seed, index)
    columns = rows.column_names or list(next(iter(rows), {}))
    if settings.shuffle_buffer is not None and isinstance(rows, datasets.IterableDataset):
        return iter(rows.shuffle(seed=seed % 2**32, buffer_size=settings.shuffle_buffer)), columns
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return (rows[position] for position in order), columns


def _all_pass(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    return isinstance(value, list) and bool(value) and all(result == "pass" for result in value)


def _score(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("-inf")


class Mixer:
    """Takes rows that hold against everything asked, and counts why the others do not.

    Args:
        settings: of the mixture.
        by_layout: options of a preset, by the layout of a source.
    """

    def __init__(self, settings: MixtureSettings, by_layout: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.settings, self.by_layout = settings, by_layout or {}
        self.seen = Seen()
        self.report: list[dict[str, Any]] = []

    def mix(self, sources: Sequence[Source]) -> list[dict[str, Any]]:
        """Rows {"messages", "source"} of all sources in one random order; a prompt comes once.

        Raises:
            InputError: a source that cannot be read or gives no row; a row without messages.
        """
        if not sources:
            raise InputError("a mixture needs sources: give --source FILE:NUMBER")
        rows = [row for index, source in enumerate(sources) for row in self._take(source, index)]
        random.Random(derive_seed(self.settings.seed, "order")).shuffle(rows)
        return rows

    def _take(self, source: Source, index: int) -> list[dict[str, Any]]:
        found, columns = _shuffled(source, index, self.settings)
        options, layout = _fill(source, columns, self.by_layout), _layout(source, columns)
        if self.by_layout and layout not in self.by_layout:
            logger.warning(
                f"{source.name}: NONE of the preset's filters is applied, its columns ({', '.join(columns)}) are of no "
                f"layout that the preset knows: {_known(self.by_layout)}; give filters of your own, ?key=value"
            )
        dropped: Counter[str] = Counter()
        taken: list[dict[str, Any]] = []
        num_read = 0
        with tqdm(total=source.count, desc=source.name, unit="row", disable=not is_main_process()) as bar:
            for row in found:
                num_read += 1
                messages = self._messages(row, options, source)
                why = self._refusal(row, messages, options)
                if why is None:
                    taken.append({"messages": messages, "source": source.name})
                    bar.update()
                else:
                    dropped[why] += 1
                if len(taken) == source.count:
                    break
        counts = {"read": num_read, "taken": len(taken), "dropped": dict(sorted(dropped.items()))}
        used = {name: value for name, value in vars(options).items() if value is not None}
        self.report.append({"source": source.name, "asked": source.count, **counts, "layout": layout, "options": used})
        if not taken:
            raise InputError(
                f"{source.name}: none of its {num_read:,} rows is left ({_listed(dropped)}): loosen a filter"
            )
        if len(taken) < source.count:
            logger.warning(f"{source.name}: {source.count:,} rows asked for, {len(taken):,} left ({_listed(dropped)})")
        return taken

    def _messages(self, row: Mapping[str, Any], options: SourceOptions, source: Source) -> Messages:
        if options.prompt is not None and options.response is not None:
            texts = [row[options.prompt], row[options.response]]
            if not all(text is None or isinstance(text, str) for text in texts):
                raise InputError(f"{source.name}: columns {options.prompt!r} and {options.response!r} must hold text")
            messages = [
                {"role": role, "content": text or ""} for role, text in zip(("user", "assistant"), texts, strict=True)
            ]
        else:
            try:
                messages = to_messages(row)
            except InputError as error:
                raise InputError(
                    f"{source.name}: {error}; or name the columns, ?prompt=COLUMN&response=COLUMN"
                ) from None
        if self.settings.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.settings.system}, *messages]
        return messages

    def _refusal(self, row: Mapping[str, Any], messages: Messages, options: SourceOptions) -> str | None:
        """Why the row is not taken; None: it is. What costs most comes last."""
        prompt = "\n".join(message["content"] for message in messages[:-1] if message["role"] != "system")
        answer = messages[-1]["content"]
        rules = (
            ("empty", bool(prompt.strip() and answer.strip())),
            ("score", options.min_score is None or _score(row[cast(str, options.score)]) >= options.min_score),
            ("tests", not options.all_pass or _all_pass(row[cast(str, options.results)])),
            ("contains", options.contains is None or options.contains in answer),
            ("prompt_chars", len(prompt) <= (options.max_prompt_chars or len(prompt))),
            ("response_chars", len(answer) <= (options.max_response_chars or len(answer))),
        )
        for name, holds in rules:
            if not holds:
                return name
        if self.settings.leaks is not None and self.settings.leaks.leaks(prompt, answer):
            return "benchmark"
        if self._is_too_long(messages):
            return "tokens"
        # Last: a row that is dropped for another reason must not keep a later one with its prompt out.
        return None if self.seen.add(prompt) else "repeated_prompt"

    def _is_too_long(self, messages: Messages) -> bool:
        most, tokenizer = self.settings.max_tokens, self.settings.tokenizer
        if most is None or tokenizer is None:
            return False
        return len(default_sft_map_fn({"messages": messages}, tokenizer=tokenizer)["input_ids"]) > most


def _known(by_layout: Mapping[str, Any]) -> str:
    return "; ".join(f"{name} ({', '.join(LAYOUTS[name][0])})" for name in by_layout)


def _listed(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(dropped.items())) or "nothing dropped"
