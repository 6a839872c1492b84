"""The metadata of the long-context tasks: one form for all of them, read once.

lm-eval merges `--metadata` over `--model_args` and hands a task the result, so the model's own arguments come along;
they are let through by name, and any other key is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dllm.models.auto import load_tokenizer
from dllm.models.checkpoint import one_line
from dllm.utils.parsing import InputError

TOKENS_PER_K = 1024
# What lm-eval itself puts beside the metadata of a task: `metadata` of its YAML file, and that file's path.
_ADDED_BY_LM_EVAL = ("version", "config_source")
_FORM = '"0k", "1k", 512, "1k,2k" or a list of these'


@dataclass(frozen=True)
class LongContextSettings:
    """What the documents of a task are made from. Give the same and get the same documents.

    Raises:
        InputError: a value of another type or out of its range.
    """

    lengths: tuple[int, ...] = field(
        default=(TOKENS_PER_K,),
        metadata={"help": f"Tokens of prompt and answer in all: {_FORM}; 1k is 1,024, 0k the facts alone."},
    )
    num_samples: int = field(default=100, metadata={"help": "Documents per length, at least 1."})
    # Not `seed`: that is an argument of the model, which comes along and must not change the documents.
    data_seed: int = field(default=42, metadata={"help": "Of the content; any whole number."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer folder or Hub name that counts the tokens; None: the model's."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with babi/*.txt and text/*.txt; None: made on the spot."}
    )
    depths: tuple[float, ...] | None = field(
        default=None,
        metadata={"help": "Where the needle goes, in [0, 1], in turn over the documents; None: random places."},
    )

    questions_fit: int | None = field(
        default=None,
        metadata={"help": "babilong: ask only what would fit into this length too, at least 1; None: into `lengths`."},
    )

    def __post_init__(self) -> None:
        for name in ("num_samples", "data_seed", "questions_fit"):
            value = self.__dict__[name]
            if name == "questions_fit" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"{name}={value!r}: must be a whole number")
        for name in ("num_samples", "questions_fit"):
            if self.__dict__[name] is not None and self.__dict__[name] < 1:
                raise InputError(f"{name}={self.__dict__[name]}: must be at least 1")
        for name in ("tokenizer", "data_dir"):
            value = self.__dict__[name]
            if value is not None and (not isinstance(value, str) or not value):
                raise InputError(f"{name}={value!r}: must be a path or name")
        object.__setattr__(self, "lengths", parse_lengths(self.lengths))
        if self.depths is not None:
            object.__setattr__(self, "depths", _parse_depths(self.depths))

    def depth(self, index: int) -> float | None:
        """The depth asked of document `index`; None: any."""
        return None if self.depths is None else self.depths[index % len(self.depths)]


def parse_lengths(value: Any) -> tuple[int, ...]:
    """Lengths in tokens, rising: of "1k,2k", 512, "512", ["0k", 300], ...

    Raises:
        InputError: not of this form; a length given twice.
    """
    if isinstance(value, str):
        parts: Sequence[Any] = [part.strip() for part in value.split(",")]
    elif isinstance(value, Sequence):
        parts = value
    else:
        parts = [value]
    lengths = [_parse_length(part, value) for part in parts]
    if not lengths:
        raise InputError("lengths is empty: give at least one")
    if len(set(lengths)) < len(lengths):
        raise InputError(f"lengths={value!r}: a length is given twice")
    return tuple(sorted(lengths))


def _parse_length(part: Any, value: Any) -> int:
    if isinstance(part, str):
        digits, factor = (part[:-1], TOKENS_PER_K) if part[-1:] in ("k", "K") else (part, 1)
        if digits.isascii() and digits.isdigit():
            return int(digits) * factor
    elif isinstance(part, int) and not isinstance(part, bool) and part >= 0:
        return part
    raise InputError(f"lengths={value!r}: {part!r} is no length; the form is {_FORM}")


def _parse_depths(value: Any) -> tuple[float, ...]:
    good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if good:
        good = all(isinstance(d, (int, float)) and not isinstance(d, bool) and 0 <= d <= 1 for d in value)
    if not good:
        raise InputError(f"depths={value!r}: must be a list of numbers from 0 to 1, e.g. [0, 0.25, 0.5, 0.75, 1]")
    if len({float(d) for d in value}) < len(value):
        raise InputError(f"depths={value!r}: a depth is given twice")
    return tuple(float(d) for d in value)


@contextlib.contextmanager
def errors_of(task: str) -> Iterator[None]:
    """Inside the block, an InputError says which task it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{task}: {error}") from error


def read_metadata(metadata: Mapping[str, Any]) -> tuple[LongContextSettings, PreTrainedTokenizerBase]:
    """Settings and tokenizer of a task, from what lm-eval hands to `custom_dataset`.

    Args:
        metadata: keys of LongContextSettings; arguments of the model are let through. The tokenizer is `tokenizer`, or
            else that of the model: of `pretrained`, over `base_model_name_or_path` where it is an adapter.

    Raises:
        InputError: an unknown key (the known ones are listed), a wrong value, no tokenizer.
    """
    known = [item.name for item in dataclasses.fields(LongContextSettings)]
    _check_keys(metadata, known)
    settings = LongContextSettings(**{key: value for key, value in metadata.items() if key in known})
    return settings, _tokenizer_of(settings, metadata)


def _check_keys(metadata: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(metadata) - set(known) - set(_ADDED_BY_LM_EVAL))
    # The names of the arguments are asked for only where they matter, since they need lm-eval.
    if unknown:
        unknown = sorted(set(unknown) - set(model_argument_names()))
    if unknown:
        raise InputError(
            f"unknown metadata {', '.join(unknown)}; known: {', '.join(known)} (and the arguments of the model)"
        )


def model_argument_names() -> list[str]:
    """Names of the arguments of all adapters that this process has loaded."""
    # Only here: the harness needs lm-eval, which the tasks' content does not.
    from dllm.core.eval import BaseEvalConfig

    return sorted({item.name for config in _family(BaseEvalConfig) for item in dataclasses.fields(config)})


def _family(config: Any) -> Iterator[Any]:
    yield config
    for child in config.__subclasses__():
        yield from _family(child)


def _tokenizer_of(settings: LongContextSettings, metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    trust_remote_code = metadata.get("trust_remote_code") is True
    if settings.tokenizer is not None:
        return _plain_tokenizer(settings.tokenizer, trust_remote_code)
    pretrained = metadata.get("pretrained")
    if not pretrained:
        raise InputError("no tokenizer to count tokens with: give tokenizer in the metadata, or the model's pretrained")
    return _model_tokenizer(str(pretrained), metadata.get("base_model_name_or_path"), trust_remote_code)


@lru_cache(maxsize=4)
def _plain_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"tokenizer {name} cannot be read: {one_line(error)}") from error
    return _counting(tokenizer, name)


@lru_cache(maxsize=4)
def _model_tokenizer(name: str, base: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(name, base_model_name_or_path=base, trust_remote_code=trust_remote_code)
    return _counting(tokenizer, name)


def _counting(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    # transformers makes an empty tokenizer of a folder that has none: every length would then seem to fit.
    if len(tokenizer("two words", add_special_tokens=False)["input_ids"]) == 0:
        raise InputError(f"the tokenizer of {name} makes no tokens of text: give another one")
    return tokenizer
