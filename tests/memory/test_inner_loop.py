"""The pieces of the inner loop against plain float64 versions."""

import math

import pytest
import torch

from dllm.core.schedulers import LinearAlphaScheduler
from memdlm.memory.config import MemoryConfig
from memdlm.memory.inner_loop import InnerStep, clip_gradient, inner_loss

ROWS, LENGTH, VOCABULARY = 3, 7, 11


@pytest.mark.parametrize("kind", ["tensor", "global"])
@pytest.mark.parametrize("max_norm", [0.0, 0.01, 1.0, 100.0])
def test_clip_equals_the_formula(kind: str, max_norm: float) -> None:
    sizes = [6, 1, 12, 3]
    gradient = torch.randn(sum(sizes), dtype=torch.float64)
    gradient[6] = 0.0  # a tensor with zero gradient stays zero
    parts = gradient.split(sizes) if kind == "tensor" else [gradient]
    expected = []
    for part in parts:
        norm = math.sqrt(sum(float(g) ** 2 for g in part))
        expected += [float(g) * (max_norm / norm if max_norm and norm > max_norm else 1.0) for g in part]
    clipped = clip_gradient(gradient, sizes, max_norm, kind)
    # CLIP_EPSILON (1e-12) in the denominator.
    assert torch.allclose(clipped, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def _step(masked: torch.Tensor, t: torch.Tensor) -> InnerStep:
    positions = masked.reshape(-1).nonzero()[:, 0]
    return InnerStep(positions, t, torch.zeros(ROWS, LENGTH, dtype=torch.int64), is_anchor=False)


@pytest.mark.parametrize("weight_type", ["scheduler", "uniform"])
def test_inner_loss_equals_the_naive_mean(weight_type: str) -> None:
    masked = torch.rand(ROWS, LENGTH) < 0.5
    t = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    step = _step(masked, t)
    logits = torch.randn(len(step.loss_positions), VOCABULARY, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (len(step.loss_positions),))
    total = 0.0
    for row_logits, target, position in zip(
        logits.tolist(), targets.tolist(), step.loss_positions.tolist(), strict=True
    ):
        nll = math.log(sum(math.exp(v) for v in row_logits)) - row_logits[target]
        total += nll * (1 / (float(t[position // LENGTH]) + 1e-6) if weight_type == "scheduler" else 1.0)
    config = MemoryConfig(loss_weight_type=weight_type)  # pyright: ignore
    loss = inner_loss(logits, targets, step, config, LinearAlphaScheduler())
    # float64 throughout; only the order of the sum differs.
    assert float(loss) == pytest.approx(total / len(step.loss_positions), rel=1e-12)


def test_a_row_with_a_loss_that_is_not_finite_is_left_out() -> None:
    masked = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    masked[:, :2] = True
    step = _step(masked, torch.full((ROWS,), 0.5))
    logits = torch.randn(6, VOCABULARY)
    targets = torch.randint(0, VOCABULARY, (6,))
    logits[2, targets[2]] = -torch.inf  # row 1
    config = MemoryConfig()
    loss = inner_loss(logits, targets, step, config, LinearAlphaScheduler())
    keep = torch.tensor([0, 1, 4, 5])
    expected = torch.nn.functional.cross_entropy(logits[keep], targets[keep])
    # Same four float32 terms, summed in another order.
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
