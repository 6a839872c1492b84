"""What a run will cost, how far it is, what it did."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from dllm.utils.distributed import is_main_process


def say(line: str) -> None:
    """Prints a line on stderr, beside progress bars, on the main process only."""
    if is_main_process():
        tqdm.write(line, file=sys.stderr)


def progress_bar(total: int, kind: str) -> tqdm:
    """A bar over requests, with the time that is left; shown on the main process only. The longest requests come
    first, so that time is overestimated rather than underestimated."""
    return tqdm(total=total, desc=kind, unit="request", disable=not is_main_process(), dynamic_ncols=True)


class Interrupted(KeyboardInterrupt):
    """The run was interrupted; the message says what was kept and how to go on."""


@contextlib.contextmanager
def interruptible(kind: str, results: Sequence[Any], answers_dir: str | None) -> Iterator[None]:
    """A block in which Ctrl-C becomes an `Interrupted`.

    Args:
        kind: of the requests.
        results: None for those that are not answered yet, looked at when it happens.
        answers_dir: where answers are kept; None: nowhere.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        done = sum(result is not None for result in results)
        kept = (
            f"kept in {answers_dir}; the same command goes on from there"
            if answers_dir is not None
            else "not kept: give answers_dir=FOLDER among the model arguments to keep them"
        )
        raise Interrupted(
            f"interrupted: {done} of {len(results)} {kind} requests of this process are answered and {kept}"
        ) from error


@dataclass
class Cost:
    """What the requests of one kind will take, of this process.

    A forward of one row of n tokens counts n token-forwards. Writing a memory of a prompt of p tokens counts p *
    (forwards per write), see `BaseEvalHarness.forwards_per_write`.

    num_requests: to be answered.
    num_known: answered by an earlier run.
    num_prompt_tokens, num_answer_tokens: of those to be answered.
    num_forwards: rows of forwards, at most.
    decoding: token-forwards of them.
    num_written: contexts to write a memory of.
    adapting: token-forwards of writing.
    num_truncated: prompts whose beginning is dropped.
    """

    num_requests: int = 0
    num_known: int = 0
    num_prompt_tokens: int = 0
    num_answer_tokens: int = 0
    num_forwards: int = 0
    decoding: float = 0.0
    num_written: int = 0
    adapting: float = 0.0
    num_truncated: int = 0

    def add(self, num_prompt_tokens: int, num_answer_tokens: int, num_forwards: int, token_forwards: int) -> None:
        """Counts one prompt with the forwards behind it."""
        self.num_prompt_tokens += num_prompt_tokens
        self.num_answer_tokens += num_answer_tokens
        self.num_forwards += num_forwards
        self.decoding += token_forwards

    @property
    def share_of_adaptation(self) -> float:
        """adapting / (adapting + decoding), 0 where nothing is to be done."""
        return self.adapting / max(self.adapting + self.decoding, 1.0)

    def line(self, kind: str, num_processes: int) -> str:
        """One line for people."""
        known = f" ({self.num_known} answered before)" if self.num_known else ""
        cut = f", {self.num_truncated} prompts cut on the left" if self.num_truncated else ""
        where = f" on each of {num_processes} processes, about" if num_processes > 1 else ""
        memories = f"; {self.num_written} memories to write, {self.share_of_adaptation:.0%} of the work"
        return (
            f"{kind}{where}: {self.num_requests} requests{known}, {self.num_prompt_tokens:,} prompt tokens{cut}, "
            f"{self.num_answer_tokens:,} answer tokens, at most {self.num_forwards:,} forwards of one row"
            f"{memories if self.num_written else ''}"
        )


@dataclass
class Totals:
    """What one process did, in all kinds of requests.

    num_requests: answered, those of an earlier run included.
    num_resumed: of an earlier run.
    num_answers: different ones among them.
    nfe, cache_forwards, num_tokens: over the different ones (see `dllm.core.eval.answers.Answer`).
    fresh_tokens, seconds: answer tokens made or scored by this run, and the time that took (without adaptation).
    num_truncated: prompts whose beginning was dropped.
    without_memory: one entry per request that was answered without the memory asked for.
    """

    num_requests: int = 0
    num_resumed: int = 0
    num_answers: int = 0
    nfe: int = 0
    cache_forwards: int = 0
    num_tokens: int = 0
    fresh_tokens: int = 0
    seconds: float = 0.0
    num_truncated: int = 0
    without_memory: list[dict[str, Any]] = field(default_factory=list)

    def failures_line(self) -> str:
        """How many requests were answered without the memory asked for, and why the first one was."""
        reason = self.without_memory[0]["reason"]
        return f"{len(self.without_memory)} request(s) answered without memory so far; the first: {reason}"
