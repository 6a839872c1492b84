"""The inner objectives against plain sums in float64."""

import math

import pytest
import torch

from memdlm.memory.config import MemoryConfig
from memdlm.memory.objectives import OBJECTIVES, Readout

COUNT, HIDDEN, VOCABULARY = 3, 5, 7


def _case():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, COUNT, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(HIDDEN, VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (COUNT,), generator=generator)
    return student, teacher, head, targets


def _softmax(logits: list[float], tau: float) -> list[float]:
    powers = [math.exp(value / tau) for value in logits]
    return [power / sum(powers) for power in powers]


def _naive(name: str, student: list, teacher: list, logits: list, wanted: list, target: int, tau: float) -> float:
    p, q = _softmax(wanted, tau), _softmax(logits, tau)
    dot = sum(a * b for a, b in zip(student, teacher, strict=True))
    return {
        "ce": -math.log(_softmax(logits, 1.0)[target]),
        "distill": sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
        "distill_reverse": sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
        "mse": sum((a - b) ** 2 for a, b in zip(student, teacher, strict=True)) / HIDDEN,
        "cosine": 1 - dot / math.sqrt(sum(a * a for a in student) * sum(b * b for b in teacher)),
    }[name]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ce", {}),
        ("distill", {"inner_loss_type": "distill", "distill_temperature": 1.7}),
        ("distill_reverse", {"inner_loss_type": "distill_reverse", "distill_temperature": 0.6}),
        ("mse", {"inner_loss_type": "distill_hidden"}),
        ("cosine", {"inner_loss_type": "distill_hidden", "distill_hidden_type": "cosine"}),
    ],
)
def test_objective_equals_the_naive_sum(name: str, settings: dict) -> None:
    student, teacher, head, targets = _case()
    config = MemoryConfig(**settings)
    objective = OBJECTIVES[config.inner_loss_type]
    wanted = Readout(teacher, lambda hidden: hidden @ head) if objective.uses_teacher else None
    values = objective.function(Readout(student, lambda hidden: hidden @ head), wanted, targets, config)
    expected = [
        _naive(
            name, s.tolist(), t.tolist(), (s @ head).tolist(), (t @ head).tolist(), int(y), config.distill_temperature
        )
        for s, t, y in zip(student, teacher, targets, strict=True)
    ]
    # float64 on both sides.
    assert values.tolist() == pytest.approx(expected, rel=1e-10)


def test_low_precision_is_read_in_float32() -> None:
    student, teacher, head, targets = _case()
    half = head.bfloat16()
    for settings in ({}, {"inner_loss_type": "distill"}, {"inner_loss_type": "distill_hidden"}):
        config = MemoryConfig(**settings)
        readouts = [Readout(hidden.bfloat16(), lambda hidden: hidden @ half) for hidden in (student, teacher)]
        values = OBJECTIVES[config.inner_loss_type].function(readouts[0], readouts[1], targets, config)
        assert values.dtype == torch.float32 and values.shape == (COUNT,)


def test_a_head_runs_once_and_only_where_it_is_needed() -> None:
    student, teacher, head, targets = _case()
    calls = []

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return hidden @ head

    for settings, count in (({}, 1), ({"inner_loss_type": "distill"}, 2), ({"inner_loss_type": "distill_hidden"}, 0)):
        calls.clear()
        config = MemoryConfig(**settings)
        OBJECTIVES[config.inner_loss_type].function(
            Readout(student, counted), Readout(teacher, counted), targets, config
        )
        assert len(calls) == count
