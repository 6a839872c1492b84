"""What is to be answered: jobs made of lm-eval's requests, and what they will cost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dllm.core.eval.likelihood import Item
from dllm.core.samplers import BaseSamplerConfig

Kind = Literal["generate_until", "loglikelihood", "loglikelihood_rolling"]


@dataclass
class Job:
    """What is answered once, for all requests that ask it.

    args: of the first request, as lm-eval's own cache wants them.
    key: decides whether an answer of an earlier run is the one wanted.
    requests: positions of the requests.
    num_dropped: tokens that truncation took away.
    """

    args: tuple[Any, ...]
    key: str
    requests: list[int] = field(default_factory=list)
    num_dropped: int = 0


@dataclass
class GenerationJob(Job):
    """An answer to make behind `prompt`, up to one of `until`."""

    prompt: list[int] = field(default_factory=list)
    config: BaseSamplerConfig = field(default_factory=BaseSamplerConfig)
    until: list[str] = field(default_factory=list)


@dataclass
class LikelihoodJob(Job):
    """Continuations to score; the sum is the answer."""

    items: list[Item] = field(default_factory=list)


def decoding_batches(jobs: Sequence[GenerationJob], batch_size: int) -> Iterator[list[GenerationJob]]:
    """Jobs with equal settings, the longest prompts first, `batch_size` at a time."""
    groups: dict[str, list[GenerationJob]] = {}
    for job in jobs:
        groups.setdefault(repr(job.config), []).append(job)
    for group in groups.values():
        ordered = sorted(group, key=lambda job: -len(job.prompt))
        for start in range(0, len(ordered), batch_size):
            yield ordered[start : start + batch_size]


@dataclass(frozen=True)
class Part:
    """One continuation of a job."""

    job: LikelihoodJob
    item: Item
    num_states: int


def scoring_groups(parts: Sequence[Part], most_states: int, one_context: bool) -> Iterator[list[Part]]:
    """Parts that are scored together: at most `most_states` masked states (or one part), on request of one context.

    Jobs with the longest contexts come first and equal contexts stand together; parts of a job keep their order.
    """
    firsts = {id(part.job): part for part in reversed(parts)}

    def rank(part: Part) -> tuple[Any, ...]:
        first = firsts[id(part.job)].item
        return -len(first.context), first.context, -len(first.target)

    ordered = sorted(parts, key=rank)  # stable: a job's parts are neighbours unless jobs are equal
    for _, run in itertools.groupby(ordered, key=lambda part: part.item.context if one_context else None):
        group: list[Part] = []
        for part in run:
            if group and sum(other.num_states for other in group) + part.num_states > most_states:
                yield group
                group = []
            group.append(part)
        yield group
