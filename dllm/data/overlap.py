"""Which texts are the same, but for case and white space, and which repeat the words of a benchmark."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"[^\W_]+")
NGRAM_WORDS = 13  # as in the decontamination of GPT-3 (arXiv 2005.14165, appendix C)
_TASK_BEGINS = (("write", "a", "function", "to"), ("write", "a", "python", "function", "to"))
FEWEST_WORDS = 6  # shorter benchmark prompts say too little: only a prompt that equals them repeats them


def words(text: str) -> list[str]:
    """The words and numbers of a text, in lower case and Unicode's compatible form; names_like_this are three words."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def digest(parts: Iterable[str]) -> bytes:
    """16 bytes that stand for a sequence of words without white space."""
    return hashlib.blake2b(" ".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Seen:
    """Which prompts came before, but for case and white space. Signs count: x + 1 is not x - 1."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def add(self, prompt: str) -> bool:
        """Whether the prompt is new; from now on it is not."""
        key = digest(prompt.casefold().split())
        is_new = key not in self._digests
        self._digests.add(key)
        return is_new


class LeakFilter:
    """Finds rows that repeat a benchmark's prompts.

    A row leaks if its prompt or its answer holds NGRAM_WORDS words in a row that a benchmark prompt holds too; of a
    shorter benchmark prompt, all its words in a row. One of fewer than FEWEST_WORDS words must be the whole prompt of
    the row. A benchmark prompt also counts without "Write a (Python) function to" at its beginning.

    Args:
        prompts: of the benchmarks.
    """

    def __init__(self, prompts: Iterable[str]) -> None:
        self._by_length: dict[int, set[bytes]] = {}
        self._whole: set[bytes] = set()
        self.num_prompts = 0
        for prompt in prompts:
            self.num_prompts += 1
            for found in _wordings(words(prompt)):
                self._add(found)

    def _add(self, found: Sequence[str]) -> None:
        if len(found) < FEWEST_WORDS:
            self._whole.add(digest(found))
            return
        length = min(len(found), NGRAM_WORDS)
        self._by_length.setdefault(length, set()).update(_ngrams(found, length))

    def leaks(self, prompt: str, answer: str) -> bool:
        """Whether a row repeats a benchmark prompt."""
        if any(digest(found) in self._whole for found in _wordings(words(prompt))):
            return True
        return any(
            not known.isdisjoint(_ngrams(found, length))
            for found in (words(prompt), words(answer))
            for length, known in self._by_length.items()
        )


def _wordings(found: Sequence[str]) -> list[Sequence[str]]:
    """The words, and if they begin as a task does, what the task is."""
    begins = next((len(start) for start in _TASK_BEGINS if tuple(found[: len(start)]) == start), 0)
    return [found, found[begins:]] if 0 < begins < len(found) else [found]


def _ngrams(found: Sequence[str], length: int) -> set[bytes]:
    return {digest(found[start : start + length]) for start in range(len(found) - length + 1)}
