"""Where the time of a training step goes: a clock with parts, and the marks that tell it which part runs."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dllm.core.trainers import MDLMTrainer
from memdlm import MemDLMTrainer
from memdlm.memory import ParametricMemory

PREFIX, ANCHOR = "pre-anchor prefix", "anchor prefix"
SUFFIX, OBJECTIVE = "inner suffix, forward and backward", "inner head and objective, forward and backward"
OUTER_FORWARD, FORWARD = "outer suffix, head and loss", "forward and loss"
BACKWARD, OPTIMIZER, OTHER = "outer backward", "clip, optimizer, zero_grad", "other"
# In order.
PARTS = {
    "plain": (FORWARD, BACKWARD, OPTIMIZER, OTHER),
    "memdlm": (PREFIX, ANCHOR, SUFFIX, OBJECTIVE, OUTER_FORWARD, BACKWARD, OPTIMIZER, OTHER),
}


class PartClock:
    """Adds up seconds by part: what runs after `mark(part)` belongs to that part until the next mark."""

    def __init__(self, parts: Sequence[str], synchronize: Callable[[], None]) -> None:
        self.seconds = dict.fromkeys(parts, 0.0)
        self._synchronize = synchronize
        self._part, self._since = "", 0.0

    def mark(self, part: str) -> None:
        """From here on, time is spent on `part`; an empty name stops the clock."""
        self._synchronize()
        now = time.perf_counter()
        if self._part:
            self.seconds[self._part] += now - self._since
        self._part, self._since = part, now


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the block; afterwards the method of its class again."""
    owner.__dict__[name] = value
    try:
        yield
    finally:
        del owner.__dict__[name]


@contextlib.contextmanager
def marking(trainer: MDLMTrainer, clock: PartClock) -> Iterator[None]:
    """Steps of `trainer` inside the block tell `clock` which part they are in."""
    memory = trainer.memory if isinstance(trainer, MemDLMTrainer) else None
    compute_loss = trainer.compute_loss

    def marked_compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        clock.mark(BACKWARD)
        return loss

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(trainer, "compute_loss", marked_compute_loss))
        forward = FORWARD if memory is None else ANCHOR
        stack.callback(trainer.model.register_forward_pre_hook(lambda *_: clock.mark(forward)).remove)
        if memory is not None:
            stack.enter_context(_marking_memory(memory, clock))
        yield


@contextlib.contextmanager
def _marking_memory(memory: ParametricMemory, clock: PartClock) -> Iterator[None]:
    """The inner loop puts a leaf in place, gets its hidden states, differentiates the objective and then the layers;
    at the end it puts a constant in place, with which the outer forward goes on."""
    prefixes, hidden_at, put = memory.prefixes, memory.hidden_at, memory.fast.set

    def marked_prefixes(*args: Any, **kwargs: Any) -> Any:
        clock.mark(PREFIX)
        result = prefixes(*args, **kwargs)
        clock.mark(OTHER)
        return result

    def marked_hidden_at(*args: Any, **kwargs: Any) -> torch.Tensor:
        clock.mark(SUFFIX)
        hidden = hidden_at(*args, **kwargs)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: clock.mark(SUFFIX))  # the backward of the layers begins
        clock.mark(OBJECTIVE)
        return hidden

    def marked_set(flat: torch.Tensor | None) -> None:
        if flat is not None and flat.requires_grad:
            clock.mark(OTHER)
            flat.register_hook(lambda _: clock.mark(OTHER))  # the backward of the layers is done
        put(flat)
        if flat is not None and not flat.requires_grad:
            clock.mark(OUTER_FORWARD)

    with (
        replaced(memory, "prefixes", marked_prefixes),
        replaced(memory, "hidden_at", marked_hidden_at),
        replaced(memory.fast, "set", marked_set),
    ):
        yield
