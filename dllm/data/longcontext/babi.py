"""Questions about little stories, in the line format of the bAbI tasks (Weston et al., arXiv 1502.05698).

    1 Mary moved to the bathroom.
    2 John went to the hallway.
    3 Where is Mary?<TAB>bathroom<TAB>1

Numbers start again at 1 with every story; a question is asked of all facts above it in its story and names, by their
numbers, those that it follows from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dllm.utils.parsing import InputError

_LINE = re.compile(r"(\d+) (.*\S)\s*")


@dataclass(frozen=True)
class Question:
    """A question, the facts it is asked of, and its answer."""

    facts: tuple[str, ...]
    text: str
    answer: str
    supporting: tuple[int, ...]  # indices into facts, as the file orders them

    @property
    def first_supporting(self) -> int:
        """Index of the first fact that the answer follows from."""
        return min(self.supporting)


class _Story:
    """Facts of the story that is being read."""

    def __init__(self) -> None:
        self.facts: list[str] = []
        self.index_of: dict[int, int] = {}  # line number -> index into facts
        self.last = 0

    def add_fact(self, number: int, text: str) -> None:
        if "?" in text:
            raise ValueError("a question needs its answer and supporting lines behind it, separated by tabs")
        self.index_of[number] = len(self.facts)
        self.facts.append(text)

    def question(self, text: str) -> Question:
        parts = [part.strip() for part in text.split("\t")]
        if len(parts) != 3 or not all(parts):
            raise ValueError("a question line is QUESTION, ANSWER and supporting lines, separated by tabs")
        numbers = parts[2].split()
        unknown = [n for n in numbers if not (n.isascii() and n.isdigit() and int(n) in self.index_of)]
        if unknown:
            raise ValueError(f"supporting line {unknown[0]} is no fact above this question")
        supporting = tuple(self.index_of[int(number)] for number in numbers)
        return Question(tuple(self.facts), parts[0], parts[1], supporting)


def parse_babi(text: str, name: str) -> list[Question]:
    """The questions of a bAbI file, in order.

    Args:
        text: its content.
        name: of the file, for messages.

    Raises:
        InputError: a line out of form (file and line are named), or no question at all.
    """
    questions: list[Question] = []
    story = _Story()
    for place, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            match = _LINE.fullmatch(line)
            if match is None:
                raise ValueError("a line is NUMBER SENTENCE")
            number, rest = int(match[1]), match[2]
            if number == 1:
                story = _Story()
            if number != story.last + 1:
                raise ValueError(f"number {number} does not follow {story.last}; a story counts from 1")
            story.last = number
            if "\t" in rest:
                questions.append(story.question(rest))
            else:
                story.add_fact(number, rest)
        except ValueError as error:
            raise InputError(f"{name}, line {place}: {error}; correct it or fetch the file again") from error
    if not questions:
        raise InputError(f"{name} holds no question: fetch the file again")
    return questions


@lru_cache(maxsize=8)
def load_babi(data_dir: str, task: str) -> tuple[Question, ...]:
    """The questions of `data_dir`/babi/TASK_*_test.txt, or where there is none of TASK_*_train.txt.

    Args:
        data_dir: folder.
        task: "qa1" to "qa20".

    Raises:
        InputError: no such file, or more than one; see parse_babi.
    """
    folder = Path(data_dir).expanduser() / "babi"
    if not folder.is_dir():
        raise InputError(f"data_dir {data_dir} has no folder babi: put the files of the bAbI tasks (v1.2) there")
    for split in ("test", "train"):
        files = sorted(folder.glob(f"{task}_*_{split}.txt"))
        if len(files) > 1:
            raise InputError(f"{folder} holds {', '.join(file.name for file in files)}: keep one of them")
        if files:
            try:
                return tuple(parse_babi(files[0].read_text(encoding="utf-8"), str(files[0])))
            except UnicodeDecodeError as error:
                raise InputError(f"{files[0]} is no UTF-8 text (byte {error.start}): fetch it again") from error
    raise InputError(f"{folder} has neither {task}_*_test.txt nor {task}_*_train.txt: put one of them there")
