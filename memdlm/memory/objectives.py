"""Inner objectives: one loss per position. An entry in `OBJECTIVES` adds one.

Shapes: N loss positions, V vocabulary, D hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dllm.core.losses import chunk_rows, token_nll
from memdlm.memory.config import MemoryConfig


class Readout:
    """What a network says at N positions: `hidden` [N, D], after the final norm, and `logits` [N, V], computed when
    asked for."""

    def __init__(self, hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.hidden = hidden
        self._head = head

    @functools.cached_property
    def logits(self) -> torch.Tensor:
        return self._head(self.hidden)


@dataclass(frozen=True)
class Objective:
    """A loss per position.

    function: (student, teacher or None, true tokens int64 [N], config) -> float32 [N].
    uses_teacher: whether the teacher (the same model on the next state, no gradients) is run and given.
    """

    function: Callable[[Readout, Readout | None, torch.Tensor, MemoryConfig], torch.Tensor]
    uses_teacher: bool


def cross_entropy(
    student: Readout, teacher: Readout | None, targets: torch.Tensor, config: MemoryConfig
) -> torch.Tensor:
    """-log p_student(true token), [N]."""
    return token_nll(student.logits, targets)


def distill(student: Readout, teacher: Readout | None, targets: torch.Tensor, config: MemoryConfig) -> torch.Tensor:
    """KL(teacher || student) of the distributions at temperature tau, [N]; no factor tau^2."""
    assert teacher is not None
    return _kl(teacher.logits, student.logits, config.distill_temperature)


def distill_reverse(
    student: Readout, teacher: Readout | None, targets: torch.Tensor, config: MemoryConfig
) -> torch.Tensor:
    """KL(student || teacher) of the distributions at temperature tau, [N]; no factor tau^2."""
    assert teacher is not None
    return _kl(student.logits, teacher.logits, config.distill_temperature)


def distill_hidden(
    student: Readout, teacher: Readout | None, targets: torch.Tensor, config: MemoryConfig
) -> torch.Tensor:
    """Distance of the last hidden states, both after the final norm, [N]: the mean square over D, or 1 - cosine."""
    assert teacher is not None
    return HIDDEN_DISTANCES[config.distill_hidden_type](_wide(student.hidden), _wide(teacher.hidden))


def _mean_square(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student - teacher).square().mean(dim=-1)


def _cosine_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def _kl(p_logits: torch.Tensor, q_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(softmax(p / temperature) || softmax(q / temperature)), [N], a chunk of positions at a time."""
    rows = chunk_rows(p_logits.shape[-1], p_logits.device)
    chunks = zip(p_logits.split(rows), q_logits.split(rows), strict=True)
    return torch.cat([_kl_of_chunk(p, q, temperature) for p, q in chunks])


def _kl_of_chunk(p_logits: torch.Tensor, q_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    p, q = _wide(p_logits), _wide(q_logits)
    if temperature != 1:  # a division is a pass over all logits, forward and backward
        p, q = p / temperature, q / temperature
    return F.kl_div(q.log_softmax(dim=-1), p.log_softmax(dim=-1), reduction="none", log_target=True).sum(dim=-1)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


HIDDEN_DISTANCES = {"mse": _mean_square, "cosine": _cosine_distance}

OBJECTIVES: dict[str, Objective] = {
    "ce": Objective(cross_entropy, uses_teacher=False),
    "distill": Objective(distill, uses_teacher=True),
    "distill_reverse": Objective(distill_reverse, uses_teacher=True),
    "distill_hidden": Objective(distill_hidden, uses_teacher=True),
}
