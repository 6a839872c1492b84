"""From likelihood jobs to answers: which continuations are scored together, and with what in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from dllm.core.eval.answers import Answer
from dllm.core.eval.jobs import LikelihoodJob, Part, scoring_groups
from dllm.core.eval.likelihood import Item, Scorer, greedy_matches, item_states, log_likelihoods
from dllm.core.eval.progress import Totals

# Masked states that are handed to the model together are this many batches: of these only the last may be small.
_BATCHES_PER_GROUP = 8


@dataclass(frozen=True)
class Scoring:
    """How likelihood jobs are answered.

    scorer: the model.
    context: see `BaseEvalHarness.context`.
    one_context: whether states of several contexts must not share a forward.
    mc_num, seed: see `log_likelihoods`.
    totals: takes up the time that was spent.
    """

    scorer: Scorer
    context: Callable[..., AbstractContextManager[list[str | None]]]
    one_context: bool
    mc_num: int
    seed: int
    totals: Totals

    def run(self, jobs: Sequence[LikelihoodJob], greedy: bool) -> Iterator[tuple[LikelihoodJob, Answer]]:
        """Jobs with [log-likelihood, whether greedy decoding gives all of it], as soon as all their parts are scored.

        Args:
            jobs: to be answered.
            greedy: look whether greedy decoding gives it; if not, the answer says False.
        """
        parts = [Part(job, item, self._states(item)) for job in jobs for item in job.items]
        num_open = {job.key: len(job.items) for job in jobs}
        so_far = {job.key: Answer([0.0, greedy], 0, 0) for job in jobs}
        for job in jobs:
            if not job.items:  # a text without tokens
                yield job, so_far[job.key]
        most = _BATCHES_PER_GROUP * self.scorer.batch_size
        for group in scoring_groups(parts, most, self.one_context):
            for part, answer in zip(group, self._score([part.item for part in group], greedy), strict=True):
                key = part.job.key
                so_far[key] = _joined(so_far[key], answer)
                num_open[key] -= 1
                if not num_open[key]:
                    yield part.job, so_far[key]

    def _score(self, items: Sequence[Item], greedy: bool) -> list[Answer]:
        contexts = [item.context for item in items]
        if self.one_context:
            contexts = contexts[:1]
        with self.context(contexts, shared=self.one_context) as failures:
            started = time.perf_counter()
            values = log_likelihoods(self.scorer, items, self.mc_num, self.seed)
            matches = greedy_matches(self.scorer, items) if greedy else [(False, 0)] * len(items)
            self.totals.seconds += time.perf_counter() - started
        if self.one_context:
            failures = failures * len(items)
        answers = []
        for item, value, (is_greedy, steps), failure in zip(items, values, matches, failures, strict=True):
            nfe = (self._states(item) + steps) * self.scorer.forwards_per_row
            answers.append(Answer([value, is_greedy], nfe, len(item.target), failure))
        return answers

    def _states(self, item: Item) -> int:
        return item_states(item, self.mc_num, self.scorer.block_size)


def _joined(first: Answer, second: Answer) -> Answer:
    value = [first.value[0] + second.value[0], first.value[1] and second.value[1]]
    failure = first.without_memory or second.without_memory
    return Answer(value, first.nfe + second.nfe, first.num_tokens + second.num_tokens, failure)
