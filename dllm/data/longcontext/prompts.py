"""A prompt as lm-eval puts it together, how many tokens it has, and how much content fits into a length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

SHOT_END = "\n\n"


@dataclass(frozen=True)
class Prompt:
    """The parts of a prompt. `plain()` and `chats()` are what lm-eval sends without and with a chat template."""

    text: str
    instruction: str = ""
    shots: tuple[tuple[str, str], ...] = ()  # (text, answer) of the solved examples
    prefix: str = ""  # how the answer begins
    delimiter: str = " "  # between text and answer

    def plain(self) -> str:
        """The whole prompt as one text."""
        solved = "".join(f"{text}{self.delimiter}{answer}{SHOT_END}" for text, answer in self.shots)
        return self.instruction + solved + self.text + (self.delimiter + self.prefix if self.prefix else "")

    def chats(self) -> list[list[dict[str, str]]]:
        """Its messages: with the examples as turns of their own, and, where there are any, with all in one message."""
        turns = [
            message
            for text, answer in self.shots
            for message in ({"role": "user", "content": text}, {"role": "assistant", "content": answer})
        ]
        head = [{"role": "system", "content": self.instruction}] if self.instruction else []
        tail = [{"role": "assistant", "content": self.prefix}] if self.prefix else []
        solved = "".join(f"{text}{self.delimiter}{answer}{SHOT_END}" for text, answer in self.shots)
        several = [*head, *turns, {"role": "user", "content": self.text}, *tail]
        single = [*head, {"role": "user", "content": solved + self.text}, *tail]
        return [several, single] if self.shots else [single]


class TokenCounter:
    """Counts tokens of prompts with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.has_chats = tokenizer.chat_template is not None and self._renders(Prompt("a", "b", (("c", "d"),)))

    def count(self, text: str, special: bool = True) -> int:
        """Tokens of a text, with those that the tokenizer adds by itself."""
        return len(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def plain(self, prompt: Prompt) -> int:
        """Tokens of the prompt without a chat template."""
        return self.count(prompt.plain())

    def most(self, prompt: Prompt, budget: float = math.inf) -> int:
        """Tokens of the prompt in its longest form: plain, or in the tokenizer's chat template if it has one.

        A form longer than `budget` is answer enough: the others are not counted then.
        """
        longest = self.plain(prompt)
        for chat in prompt.chats() if self.has_chats else []:
            if longest > budget:
                break
            longest = max(longest, self.count(self._render(chat, prompt), special=False))
        return longest

    def _render(self, chat: list[dict[str, str]], prompt: Prompt) -> str:
        rendered: Any = self.tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            add_generation_prompt=not prompt.prefix,
            continue_final_message=bool(prompt.prefix),
        )
        return rendered

    def _renders(self, prompt: Prompt) -> bool:
        try:
            for chat in prompt.chats():
                self._render(chat, prompt)
        except TemplateError:
            return False  # e.g. no system role: such a template cannot be applied to these tasks at all
        return True


def largest_fitting(cost: Callable[[int], int], least: int, most: int, budget: int) -> int | None:
    """The largest n in [least, most] with cost(n) <= budget, or None if not even `least` fits.

    `cost` grows with n, about linearly: the places to look at are interpolated, so that few calls are made. Where it
    does not quite grow (tokens across a border), cost of the n returned is still within the budget.
    """
    fits, cost_fits = least, cost(least)
    if cost_fits > budget:
        return None
    slope = max(1.0, cost_fits / max(least, 1) / 4)
    fails: int | None = None
    while fits < most if fails is None else fails - fits > 1:
        guess = fits + max(1, int((budget - cost_fits) / slope))
        guess = min(guess, most if fails is None else fails - 1)
        cost_guess = cost(guess)
        slope = max(0.5, (cost_guess - cost_fits) / (guess - fits))
        if cost_guess <= budget:
            fits, cost_fits = guess, cost_guess
        else:
            fails = guess
    return fits


def place(
    background: Sequence[str],
    facts: Sequence[str],
    fractions: Sequence[float],
    anchor: int = 0,
    depth: float | None = None,
) -> tuple[str, float]:
    """Facts, in their order, between sentences: (text, depth of the fact `anchor` in it).

    A fact's depth is the share of the text's characters, its own left out, that stand before it, in [0, 1].

    Args:
        background: sentences.
        facts: sentences to put between them.
        fractions: one number in [0, 1) per fact, rising: where it goes.
        anchor: index of the fact whose depth counts.
        depth: wanted for the anchor; the others keep to their side of it. None: as `fractions` say.
    """
    slots = _slots(background, facts, fractions, anchor, depth)
    pieces: list[str] = []
    done = before = 0
    for index, (fact, slot) in enumerate(zip(facts, slots, strict=True)):
        pieces += background[done:slot]
        if index == anchor:
            before = sum(len(piece) + 1 for piece in pieces)
        pieces.append(fact)
        done = slot
    text = " ".join([*pieces, *background[done:]])
    others = len(text) - len(facts[anchor])
    return text, before / others if others else 0.0


def _slots(
    background: Sequence[str], facts: Sequence[str], fractions: Sequence[float], anchor: int, depth: float | None
) -> list[int]:
    """For each fact, the number of sentences before it."""
    num = len(background)
    if depth is None:
        return [int(fraction * (num + 1)) for fraction in fractions]
    # The slot that brings the anchor nearest to its depth, counted in characters.
    ahead = sum(len(fact) + 1 for fact in facts[:anchor])
    others = ahead + sum(len(fact) + 1 for fact in facts[anchor + 1 :]) + sum(len(line) + 1 for line in background)
    places = [ahead]
    for line in background:
        places.append(places[-1] + len(line) + 1)
    middle = min(range(num + 1), key=lambda slot: (abs(places[slot] - depth * others), slot))
    earlier = [int(fraction * (middle + 1)) for fraction in fractions[:anchor]]
    later = [middle + int(fraction * (num - middle + 1)) for fraction in fractions[anchor + 1 :]]
    return [*earlier, middle, *later]
