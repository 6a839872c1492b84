"""Sentences between which facts and needles are hidden."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from dllm.data.longcontext.words import made_up_prose
from dllm.utils.parsing import InputError

FEWEST_WORDS, MOST_WORDS = 4, 40
# Short sentences keep prompts close to the length asked for; long runs of digits could pass for a needle.
_LONG_NUMBER = re.compile(r"\d{5}")
# A sentence ends at . ! or ? (and closing quotes) before a capital or an opening quote, but not after a title.
_END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?]+[\"'\u2019\u201d)\]]*(?=\s+[\"'\u2018\u201c(\[]*[A-Z]|\s*$)"
)


class Background:
    """Sentences in reading order; after the last one comes the first again.

    Args:
        sentences: at least one.
        source: where they are from, for messages.
    """

    def __init__(self, sentences: Iterable[str], source: str):
        self.sentences = tuple(sentences)
        self.source = source
        if not self.sentences:
            raise InputError(f"{source} holds no sentence of {FEWEST_WORDS} to {MOST_WORDS} words")

    def read(self, start: int, avoid: Iterable[str] = ()) -> Iterator[str]:
        """Sentences from number `start` on, without end, leaving out those that hold one of the words `avoid`.

        Raises:
            InputError: every sentence holds one.
        """
        words = sorted(set(avoid))
        unwanted = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b") if words else None
        while True:
            found = False
            for position in range(len(self.sentences)):
                sentence = self.sentences[(start + position) % len(self.sentences)]
                if unwanted is None or not unwanted.search(sentence):
                    found = True
                    yield sentence
            if not found:
                raise InputError(f"every sentence of {self.source} holds one of {', '.join(words)}: give other texts")


class Excerpt:
    """The first sentences of a background from number `start` on; see Background.read."""

    def __init__(self, background: Background, start: int, avoid: Iterable[str] = ()):
        self._source = background.read(start, avoid)
        self._read: list[str] = []

    def first(self, amount: int) -> list[str]:
        """The first `amount` sentences; the same ones at every call."""
        while len(self._read) < amount:
            self._read.append(next(self._source))
        return self._read[:amount]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text that are fit for a background: whole, 4 to 40 words, no number of five or more digits."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        start = 0
        for end in _END.finditer(line):
            found.append(line[start : end.end()].strip())
            start = end.end()
    return [sentence for sentence in found if _is_fit(sentence)]


def _is_fit(sentence: str) -> bool:
    begins = re.match(r"[\"'\u2018\u201c(\[]*[A-Z]", sentence)
    return (
        begins is not None
        and not sentence.isupper()
        and FEWEST_WORDS <= len(sentence.split()) <= MOST_WORDS
        and _LONG_NUMBER.search(sentence) is None
    )


@lru_cache(maxsize=4)
def load_background(data_dir: str | None) -> Background:
    """Sentences of `data_dir`/text/*.txt, file after file by name; or made-up prose where data_dir is None.

    Raises:
        InputError: no such folder or file; a file that is no UTF-8 text; no usable sentence.
    """
    if data_dir is None:
        return Background(made_up_prose(), "the made-up prose")
    folder = Path(data_dir).expanduser() / "text"
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    if not files:
        raise InputError(f"data_dir {data_dir}: no text/*.txt in it: put plain texts there, or leave data_dir out")
    sentences: list[str] = []
    for file in files:
        try:
            sentences += split_sentences(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is no UTF-8 text (byte {error.start}): convert it") from error
    return Background(sentences, str(folder))
