"""BABILong (arXiv 2406.10149): the facts of a bAbI story in order between sentences of an unrelated text.

`babilong_dataset` is the `custom_dataset` of the tasks memdlm_babilong_qa1 to qa5.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import datasets

from dllm.data.longcontext.babi import Question, load_babi
from dllm.data.longcontext.background import Excerpt, load_background
from dllm.data.longcontext.documents import Content, Sample, fit, make_row, sample_rng, smallest_length, too_short
from dllm.data.longcontext.prompts import Prompt, TokenCounter, place
from dllm.data.longcontext.settings import LongContextSettings, errors_of, read_metadata
from dllm.data.longcontext.stories import make_question
from dllm.utils.parsing import InputError

ANSWER_TOKENS = 16
NUM_MADE_UP = 1000  # questions per task where no data_dir is given, as many as a bAbI file holds
_FACTS_ONLY = 0  # the length "0k"


@dataclass(frozen=True)
class _Task:
    instruction: str
    shots: tuple[tuple[str, str, str], ...]  # facts, question, answer

    def prompt_shots(self) -> tuple[tuple[str, str], ...]:
        return tuple((f"{facts}\n{question}", answer) for facts, question, answer in self.shots)


_PLACE = "Reply with the place, in one word.\n\n"
_CARRIED = "A thing goes where the person who has it goes, and stays where it was put down. "
TASKS = {
    "qa1": _Task(
        "The text below hides a few facts about where people are. Answer the question after it from these facts alone; "
        "the last place of a person counts. " + _PLACE,
        (
            (
                "Peter moved to the cellar. Anna went to the balcony. Peter went to the attic.",
                "Where is Peter?",
                "attic",
            ),
            (
                "Anna travelled to the garage. Peter journeyed to the cellar. Tom went to the garage. "
                "Anna moved to the terrace.",
                "Where is Peter?",
                "cellar",
            ),
        ),
    ),
    "qa2": _Task(
        "The text below hides a few facts about where people are and what they carry. Answer the question after it "
        "from these facts alone. " + _CARRIED + _PLACE,
        (
            ("Anna went to the attic. Anna took the lamp. Anna moved to the garage.", "Where is the lamp?", "garage"),
            (
                "Peter went to the cellar. Peter got the book. Peter travelled to the balcony. Peter dropped the book. "
                "Peter journeyed to the attic.",
                "Where is the book?",
                "balcony",
            ),
        ),
    ),
    "qa3": _Task(
        "The text below hides a few facts about where people are and what they carry. Answer the question after it, "
        "about an earlier place of a thing, from these facts alone. " + _CARRIED + _PLACE,
        (
            (
                "Tom moved to the attic. Tom took the lamp. Tom went to the cellar. Anna went to the attic. "
                "Tom journeyed to the garage.",
                "Where was the lamp before the garage?",
                "cellar",
            ),
            (
                "Anna went to the balcony. Peter went to the cellar. Anna got the book. Anna travelled to the terrace. "
                "Anna left the book.",
                "Where was the book before the terrace?",
                "balcony",
            ),
        ),
    ),
    "qa4": _Task(
        "The text below hides two facts about how places lie to each other. Answer the question after it from these "
        "facts alone. " + _PLACE,
        (
            (
                "The cellar is north of the attic. The garage is south of the attic.",
                "What is north of the attic?",
                "cellar",
            ),
            (
                "The balcony is east of the garage. The terrace is west of the garage.",
                "What is the garage east of?",
                "terrace",
            ),
        ),
    ),
    "qa5": _Task(
        "The text below hides a few facts about people and what they hand to each other. Answer the question after it "
        "from these facts alone. Reply with the person or the thing, in one word.\n\n",
        (
            (
                "Anna took the lamp there. Anna handed the lamp to Peter. Peter went to the attic.",
                "Who received the lamp?",
                "Peter",
            ),
            (
                "Tom got the book there. Tom went to the cellar. Tom gave the book to Anna. Anna moved to the garage.",
                "What did Tom give to Anna?",
                "book",
            ),
        ),
    ),
}


def shots_of(qa: str) -> Callable[[], list[dict[str, str]]]:
    """The `samples` of an lm-eval `fewshot_config`: the solved examples of "qa1" to "qa5" as documents."""

    def samples() -> list[dict[str, str]]:
        return [{"input": facts, "question": question, "target": answer} for facts, question, answer in TASKS[qa].shots]

    return samples


# lm-eval names a function by its module and name, with no arguments.
shots_qa1, shots_qa2, shots_qa3, shots_qa4, shots_qa5 = (shots_of(qa) for qa in TASKS)


def babilong_dataset(task_name: str, **metadata: Any) -> dict[str, datasets.Dataset]:
    """{"test": documents} of a task, for lm-eval's `custom_dataset`.

    Columns: those of `make_row`, `input` (the text), `question`, `target`, `labels` (every answer that the task knows)
    and `num_facts`. A prompt, with the examples and the chat template if the tokenizer has one, and the answer together
    have at most `length` tokens; at length 0 the text holds the facts alone, as many tokens as they have.
    The questions are those that fit into the smallest length above 0, and the same at all lengths.

    Args:
        task_name: "memdlm_babilong_qa1" to "memdlm_babilong_qa5".
        metadata: see dllm.data.longcontext.settings.

    Raises:
        InputError: wrong metadata, missing or damaged data, a length in which too few questions fit.
    """
    with errors_of(task_name):
        settings, tokenizer = read_metadata(metadata)
        qa = task_name.rpartition("_")[2]
        questions = _questions(qa, settings)
        labels = sorted({question.answer for question in questions})
        maker = _Maker(task_name, TASKS[qa], settings, TokenCounter(tokenizer), questions, labels)
        # All lengths of an index together: lm-eval's --limit takes the first rows.
        numbers = enumerate(maker.chosen())
        rows = [maker.document(index, number, length) for index, number in numbers for length in settings.lengths]
    return {"test": datasets.Dataset.from_list(rows)}


def _questions(qa: str, settings: LongContextSettings) -> Sequence[Question]:
    """All questions of the task in the order in which they are asked, which the seed decides."""
    if settings.data_dir is None:
        count = max(NUM_MADE_UP, settings.num_samples)
        return [make_question(qa, random.Random(f"{settings.data_seed}|{qa}|{index}")) for index in range(count)]
    found = list(load_babi(settings.data_dir, qa))
    if len(found) < settings.num_samples:
        raise InputError(
            f"{settings.data_dir} has {len(found)} questions: give num_samples of at most that many, "
            f"not {settings.num_samples}"
        )
    random.Random(f"{settings.data_seed}|{qa}").shuffle(found)
    return found


@dataclass(frozen=True)
class _Maker:
    """Makes the documents of one task."""

    name: str
    task: _Task
    settings: LongContextSettings
    counter: TokenCounter
    questions: Sequence[Question]
    labels: list[str]

    def chosen(self) -> list[int]:
        """The numbers of the questions to ask, one per index: the first whose facts fit into every length.

        The others are passed over, as in BABILong, but at all lengths, so that the same questions are compared.
        """
        limits = [length for length in self.settings.lengths if length != _FACTS_ONLY]
        if self.settings.questions_fit is not None:
            limits.append(self.settings.questions_fit)
        limit = min(limits, default=None)
        if limit is None:
            return list(range(self.settings.num_samples))
        numbers = []
        for number in range(len(self.questions)):
            if fit([self.sample(number)], limit, ANSWER_TOKENS, self.counter) is not None:
                numbers.append(number)
            if len(numbers) == self.settings.num_samples:
                return numbers
        enough = self.smallest_length()
        if not numbers:
            raise too_short(limit, enough)
        raise InputError(
            f"only {len(numbers)} of {len(self.questions)} questions fit into length {limit}: give num_samples of at "
            f"most {len(numbers)}, or a length of at least {enough}"
        )

    def smallest_length(self) -> int:
        """The length into which as many questions fit as are asked for."""
        samples = [self.sample(number) for number in range(len(self.questions))]
        # What a chat template adds is the same for all, so that the plain prompts tell which are the shortest.
        samples.sort(key=lambda sample: self.counter.plain(sample.build(0).prompt))
        shortest = samples[: self.settings.num_samples]
        return max(smallest_length([sample], ANSWER_TOKENS, self.counter) for sample in shortest)

    def document(self, index: int, number: int, length: int) -> dict[str, Any]:
        """Question `number`, one of `chosen()`, as document `index`."""
        sample = self.sample(number, index, length)
        content = sample.build(0) if length == _FACTS_ONLY else fit([sample], length, ANSWER_TOKENS, self.counter)
        assert content is not None  # what fits into the smallest length fits into every other
        return make_row(self.name, index, length, content, self.counter)

    def sample(self, number: int, index: int = 0, most: int = 0) -> Sample:
        """Question `number` as document `index`, with an open number of sentences, up to `most`, around its facts."""
        question = self.questions[number]
        rng = sample_rng(self.settings, self.name, number)
        start = rng.random()
        fractions = sorted(rng.random() for _ in question.facts)

        @cache
        def excerpt() -> Excerpt:
            background = load_background(self.settings.data_dir)
            return Excerpt(background, int(start * len(background.sentences)), _names(question))

        def build(amount: int) -> Content:
            depth = self.settings.depth(index) if amount else None
            text, depth = place(
                excerpt().first(amount) if amount else [], question.facts, fractions, question.first_supporting, depth
            )
            columns = {
                "input": text,
                "question": question.text,
                "target": question.answer,
                "labels": self.labels,
                "num_facts": len(question.facts),
            }
            prompt = Prompt(f"{text}\n{question.text}", self.task.instruction, self.task.prompt_shots())
            return Content(prompt, depth, columns)

        # A sentence has a token at least.
        return Sample(build, least=0, most=most)


def _names(question: Question) -> set[str]:
    """People of the story: a sentence about one of them could contradict it."""
    return {name for fact in question.facts for name in re.findall(r"\b[A-Z]\w+", fact)} - {"The"}
