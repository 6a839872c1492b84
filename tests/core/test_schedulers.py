import math

import pytest
import torch

from dllm.core.schedulers import (
    BaseAlphaScheduler,
    CosineAlphaScheduler,
    LinearAlphaScheduler,
    get_alpha_scheduler_class,
    make_alpha_scheduler,
)


@pytest.mark.parametrize("scheduler", [LinearAlphaScheduler(), CosineAlphaScheduler()])
def test_alpha_falls_from_one_to_zero_and_its_derivative_is_the_slope(scheduler: BaseAlphaScheduler) -> None:
    ends = scheduler.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.allclose(ends, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-15)
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    step = 1e-6
    slope = (scheduler.alpha(t + step) - scheduler.alpha(t - step)) / (2 * step)
    # Central differences are exact to step**2 times the third derivative, plus rounding / step.
    assert torch.allclose(slope, scheduler.alpha_derivative(t), atol=1e-8)


def test_weights_against_formulas() -> None:
    t = torch.tensor([0.001, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert torch.allclose(LinearAlphaScheduler().weight(t), 1 / (t + 1e-6), rtol=1e-12)
    angle = [math.pi / 2 * (1 - float(v)) for v in t]
    expected = [math.pi / 2 * math.sin(a) / (math.cos(a) + 1e-6) for a in angle]
    assert torch.allclose(CosineAlphaScheduler().weight(t), torch.tensor(expected, dtype=torch.float64), rtol=1e-12)
    assert torch.isfinite(LinearAlphaScheduler().weight(torch.zeros(1))).all()


def test_names() -> None:
    assert get_alpha_scheduler_class("LinearAlphaScheduler") is LinearAlphaScheduler
    assert isinstance(make_alpha_scheduler("cosine"), CosineAlphaScheduler)
    with pytest.raises(ValueError, match="choose one of cosine, linear"):
        make_alpha_scheduler("square")
