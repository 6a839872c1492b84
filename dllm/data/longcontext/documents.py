"""From samples that can hold more or less content to documents of the lengths asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets

from dllm.data.longcontext.prompts import Prompt, TokenCounter, largest_fitting
from dllm.data.longcontext.settings import LongContextSettings
from dllm.utils.parsing import InputError


@dataclass(frozen=True)
class Content:
    """A prompt, where in it the needle lies (None: there is none), and further columns of the document."""

    prompt: Prompt
    depth: float | None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One document with its amount of content still open: `build(n)` for n in [least, most]; more n, more tokens."""

    build: Callable[[int], Content]
    least: int
    most: int


def sample_rng(settings: LongContextSettings, task: str, index: int) -> random.Random:
    """The draws of one sample: of (seed, task, index), so that a sample is alike at every length and in every run."""
    return random.Random(f"{settings.data_seed}|{task}|{index}")


def fit(samples: Sequence[Sample], length: int, reserve: int, counter: TokenCounter) -> Content | None:
    """The first sample that fits, with as much content as `length` - `reserve` tokens hold; None if none fits.

    Args:
        samples: forms of one sample, the best first, the smallest last.
        length: tokens of prompt and answer.
        reserve: tokens of the answer.
        counter: counts the prompt in its longest form (see TokenCounter.most).
    """
    budget = length - reserve
    for sample in samples:
        amount = largest_fitting(_cost_of(sample, counter, budget), sample.least, sample.most, budget)
        if amount is not None:
            return sample.build(amount)
    return None


def _cost_of(sample: Sample, counter: TokenCounter, budget: int) -> Callable[[int], int]:
    return lambda amount: counter.most(sample.build(amount).prompt, budget)


def smallest_length(samples: Sequence[Sample], reserve: int, counter: TokenCounter) -> int:
    """Tokens of prompt and answer of the last, smallest form with the least content."""
    return counter.most(samples[-1].build(samples[-1].least).prompt) + reserve


def make_documents(
    task: str,
    settings: LongContextSettings,
    counter: TokenCounter,
    reserve: int,
    forms: Callable[[int, int], Sequence[Sample]],
) -> datasets.Dataset:
    """One row per index and length, all lengths of an index together, so that a limit cuts every length alike.

    Args:
        task: name; column `task`.
        settings: lengths and number of samples.
        counter: of the tokenizer.
        reserve: tokens of the answer.
        forms: (index, length) -> forms of that sample, as `fit` takes them.

    Raises:
        InputError: a length in which some sample does not fit; the smallest that holds all is named.
    """
    rows = []
    for index in range(settings.num_samples):
        for length in settings.lengths:
            content = fit(forms(index, length), length, reserve, counter)
            if content is None:
                every = range(settings.num_samples)
                smallest = max(smallest_length(forms(i, length), reserve, counter) for i in every)
                raise too_short(length, smallest)
            rows.append(make_row(task, index, length, content, counter))
    return datasets.Dataset.from_list(rows)


def too_short(length: int, smallest: int) -> InputError:
    """The error of a length in which nothing fits."""
    return InputError(f"length {length} is too short with this tokenizer: the smallest that works is {smallest}")


def make_row(task: str, index: int, length: int, content: Content, counter: TokenCounter) -> dict[str, Any]:
    """The document: columns that every task has, and the task's own."""
    return {
        "task": task,
        "index": index,
        "length": length,
        "num_tokens": counter.plain(content.prompt),
        "depth": content.depth,
        "instruction": content.prompt.instruction,
        "gen_prefix": content.prompt.prefix,
        **content.columns,
    }
