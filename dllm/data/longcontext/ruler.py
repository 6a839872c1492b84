"""Six tasks of RULER (arXiv 2404.06654): needles, variable tracking, common and frequent words.

`ruler_dataset` is the `custom_dataset` of the tasks memdlm_ruler_*. A task draws what must be found, which is always
in the prompt whole, and fills the length up with what surrounds it.
"""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets

from dllm.data.longcontext.background import Background, Excerpt, load_background
from dllm.data.longcontext.documents import Content, Sample, make_documents, sample_rng
from dllm.data.longcontext.prompts import Prompt, TokenCounter, place
from dllm.data.longcontext.settings import LongContextSettings, errors_of, read_metadata
from dllm.data.longcontext.words import compound_words, needle_keys

Forms = Callable[[int, int], Sequence[Sample]]

NUM_VALUES = 4  # needles of one key in niah_multivalue
NUM_KEYS = 4  # keys in niah_multikey; one is asked for
NUM_HOPS = 4  # assignments of a variable to the next in vt
NUM_COMMON = 10  # words to name in cwe
_NOISE = ("Rain falls on the roof.", "The clock ticks on.", "Bread is on the table.", "So the day goes.", "Then night.")
_EXAMPLE_SENTENCES = 10  # around the chain of the solved example of vt
_EXAMPLE_SHARE = 4  # the example may take one part in this many of the length
# Of the common and the other words in cwe: from 4,096 tokens on, below, and where even that is too much.
_REPEATS_LONG = (30, 3)
_REPEATS_SHORT = ((6, 1), (5, 1), (4, 1), (3, 1), (2, 1))
_LONG = 4096
_NUM_FREQUENT = 3  # words to name in fwe
_ALPHA = 2.0  # exponent of the frequencies in fwe
_CODED_LETTERS = 6
_FEWEST_CODED = 100  # so that there is a size to try, and to name, at any length
_TOKENS_PER_CODED_WORD = 50  # the vocabulary of fwe has one word per so many tokens of length


def ruler_dataset(task_name: str, **metadata: Any) -> dict[str, datasets.Dataset]:
    """{"test": documents} of a task, for lm-eval's `custom_dataset`.

    Columns: those of `make_row`, `input` (the whole prompt but for `gen_prefix`), `outputs` (what the answer must
    name) and `num_examples` (solved ones at the head of the prompt). The prompt, in the chat template if the tokenizer
    has one, and the answer together have at most `length` tokens.

    Args:
        task_name: "memdlm_ruler_" and one of TASKS.
        metadata: see dllm.data.longcontext.settings.

    Raises:
        InputError: wrong metadata, missing data, a length that is too short (the smallest that works is named).
    """
    with errors_of(task_name):
        settings, tokenizer = read_metadata(metadata)
        maker, reserve = TASKS[task_name.removeprefix("memdlm_ruler_")]
        scene = _Scene(task_name, settings, TokenCounter(tokenizer))
        return {"test": make_documents(task_name, settings, scene.counter, reserve, maker(scene))}


@dataclass(frozen=True)
class _Scene:
    """What the makers share."""

    task: str
    settings: LongContextSettings
    counter: TokenCounter

    def rng(self, index: int) -> random.Random:
        return sample_rng(self.settings, self.task, index)

    @cached_property
    def background(self) -> Background:
        return load_background(self.settings.data_dir)


def _content(
    text: str, prefix: str, outputs: list[str], depth: float | None = None, delimiter: str = " ", num_examples: int = 0
) -> Content:
    columns = {"input": text, "outputs": outputs, "num_examples": num_examples}
    return Content(Prompt(text, prefix=prefix, delimiter=delimiter), depth, columns)


def _number(rng: random.Random, digits: int, taken: Sequence[str] = ()) -> str:
    while True:
        number = str(rng.randrange(10 ** (digits - 1), 10**digits))
        if number not in taken:
            return number


def _niah(scene: _Scene, num_keys: int, num_values: int) -> Forms:
    """Needles "a secret number for KEY is VALUE" in prose; all values of one key are asked for."""
    keys_known = needle_keys()

    def forms(index: int, length: int) -> list[Sample]:
        rng = scene.rng(index)
        keys = rng.sample(keys_known, num_keys)
        values: list[str] = []
        for _ in range(num_values + num_keys - 1):
            values.append(_number(rng, 7, values))
        needles = [_needle(keys[0], value) for value in values[:num_values]]
        others = [_needle(key, value) for key, value in zip(keys[1:], values[num_values:], strict=True)]
        fractions = sorted(rng.random() for _ in needles)
        other_fractions = sorted(rng.random() for _ in others)
        excerpt = Excerpt(scene.background, rng.randrange(len(scene.background.sentences)))

        def build(amount: int) -> Content:
            sentences = excerpt.first(amount)
            for fraction, other in reversed(list(zip(other_fractions, others, strict=True))):
                sentences.insert(int(fraction * (amount + 1)), other)
            text, depth = place(sentences, needles, fractions, 0, scene.settings.depth(index))
            asked, prefix = _needle_prompt(text, keys[0], num_values)
            return _content(asked, prefix, values[:num_values], depth)

        return [Sample(build, least=0, most=length)]

    return forms


def _needle(key: str, value: str) -> str:
    return f"A secret number for {key} is {value}."


def _needle_prompt(text: str, key: str, num_values: int) -> tuple[str, str]:
    """(prompt, beginning of the answer)."""
    if num_values == 1:
        head, asked = "A secret number is hidden in the text below.", f"What is the secret number for {key}?"
        return f"{head}\n{text}\n{asked}", f"The secret number for {key} in the text is"
    head, asked = "Some secret numbers are hidden in the text below.", f"What are all the secret numbers for {key}?"
    return f"{head}\n{text}\n{asked}", f"The secret numbers for {key} in the text are"


def _chain(rng: random.Random, letters: int) -> tuple[list[str], str, list[str]]:
    """(variables, value, assignments): the first variable gets the value, each further one the variable before it."""
    names: list[str] = []
    while len(names) <= NUM_HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = _number(rng, 5)
    told = [f"VAR {names[0]} = {value}."]
    told += [f"VAR {later} = VAR {earlier}." for earlier, later in itertools.pairwise(names)]
    return names, value, told


def _tracking_prompt(text: str, value: str) -> tuple[str, str]:
    """(prompt, beginning of the answer)."""
    asked = f"Question: Which variables have the value {value} in the text above?"
    prefix = f"Answer: By the assignments in the text above, these {NUM_HOPS + 1} variables have the value {value}:"
    return f"Follow the assignments of variables that are hidden in the text below.\n\n{text}\n{asked}", prefix


def _variable_tracking(scene: _Scene) -> Forms:
    """One chain of assignments among repeated sentences; every variable of the chain is asked for."""

    def noise(amount: int) -> list[str]:
        return [_NOISE[i % len(_NOISE)] for i in range(amount)]

    def forms(index: int, length: int) -> list[Sample]:
        rng = scene.rng(index)
        names, value, told = _chain(rng, 5)
        fractions = sorted(rng.random() for _ in told)
        shown, shown_value, shown_told = _chain(rng, 3)
        shown_text, _ = place(noise(_EXAMPLE_SENTENCES), shown_told, sorted(rng.random() for _ in shown_told))
        example = " ".join([*_tracking_prompt(shown_text, shown_value), *shown]) + "\n\n"

        def builder(head: str) -> Callable[[int], Content]:
            def build(amount: int) -> Content:
                text, depth = place(noise(amount), told, fractions, 0, scene.settings.depth(index))
                asked, prefix = _tracking_prompt(text, value)
                return _content(head + asked, prefix, names, depth, num_examples=int(bool(head)))

            return build

        heads = [example, ""] if scene.counter.count(example) * _EXAMPLE_SHARE <= length else [""]
        return [Sample(builder(head), least=0, most=length) for head in heads]

    return forms


def _common_words(scene: _Scene) -> Forms:
    """A numbered list in which ten words stand more often than the others."""
    words = compound_words()

    def forms(index: int, length: int) -> list[Sample]:
        rng = scene.rng(index)
        drawn = rng.sample(words, len(words))
        common, rest = drawn[:NUM_COMMON], drawn[NUM_COMMON:]
        order = rng.random()
        head = "Below is a numbered list in which some words stand more often than others. Remember these."
        asked = f"Question: Which {NUM_COMMON} words stand most often in the list above?"
        prefix = f"Answer: The {NUM_COMMON} words that stand most often in the list are:"

        def builder(often: int, seldom: int) -> Callable[[int], Content]:
            def build(amount: int) -> Content:
                listed = common * often + rest[:amount] * seldom
                random.Random(f"{order}|{often}|{amount}").shuffle(listed)
                text = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
                return _content(f"{head}\n{text}\n{asked}", prefix, common, delimiter="\n\n")

            return build

        repeats = (_REPEATS_LONG, *_REPEATS_SHORT) if length >= _LONG else _REPEATS_SHORT
        return [Sample(builder(*pair), least=NUM_COMMON, most=min(length, len(rest))) for pair in repeats]

    return forms


def frequencies(num_words: int, num_kinds: int) -> list[int]:
    """How often each rank stands among about `num_words`: floor(N * rank^-a / zeta(a)) with a = 2."""
    zeta = math.pi**2 / 6
    return [int(num_words * rank**-_ALPHA / zeta) for rank in range(1, num_kinds + 1)]


def _distinct_sizes(largest: int) -> list[int]:
    """The sizes up to `largest` at which the words to name all stand more often than the next one, so that there is one
    right answer."""
    found = []
    for size in range(1, largest + 1):
        *_, last_named, next_one = frequencies(size, _NUM_FREQUENT + 2)
        if last_named > next_one:
            found.append(size)
    return found


def _frequent_words(scene: _Scene) -> Forms:
    """A coded text with word frequencies of a power law; its first rank is dots, the next three are asked for."""
    sizes: dict[int, list[int]] = {}

    def forms(index: int, length: int) -> list[Sample]:
        rng = scene.rng(index)
        kinds = max(_NUM_FREQUENT + 2, length // _TOKENS_PER_CODED_WORD)
        if length not in sizes:
            sizes[length] = _distinct_sizes(max(length, _FEWEST_CODED))
        order = rng.random()
        words = ["..."]
        while len(words) < kinds:
            word = "".join(rng.choices(string.ascii_lowercase, k=_CODED_LETTERS))
            if word not in words:
                words.append(word)

        def build(amount: int) -> Content:
            counts = frequencies(sizes[length][amount], kinds)
            coded = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
            random.Random(f"{order}|{amount}").shuffle(coded)
            head = "Count the words of the coded text below."
            asked = "Question: Which three coded words, leaving the dots aside, stand most often in the text above?"
            prefix = "Answer: The three coded words that stand most often are:"
            return _content(f"{head}\n{' '.join(coded)}\n{asked}", prefix, words[1 : 1 + _NUM_FREQUENT])

        return [Sample(build, least=0, most=len(sizes[length]) - 1)]

    return forms


# Name -> (maker, tokens of the answer). The YAML files say the latter again, as max_gen_toks.
TASKS: dict[str, tuple[Callable[[_Scene], Forms], int]] = {
    "niah_single": (lambda scene: _niah(scene, 1, 1), 128),
    "niah_multivalue": (lambda scene: _niah(scene, 1, NUM_VALUES), 128),
    "niah_multikey": (lambda scene: _niah(scene, NUM_KEYS, 1), 128),
    "vt": (_variable_tracking, 30),
    "cwe": (_common_words, 120),
    "fwe": (_frequent_words, 50),
}
