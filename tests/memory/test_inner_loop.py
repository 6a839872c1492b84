"""The pieces of the inner loop against plain float64 versions."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from dllm.core import losses
from dllm.core.schedulers import LinearAlphaScheduler
from memdlm.memory import inner_loop
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import Network, clip_gradient, fit
from memdlm.memory.plan import InnerPlan, InnerStep

ROWS, LENGTH, VOCABULARY = 3, 7, 11


@pytest.mark.parametrize("kind", ["tensor", "global"])
@pytest.mark.parametrize("max_norm", [0.0, 0.01, 1.0, 100.0])
def test_clip_equals_the_formula(kind: str, max_norm: float) -> None:
    sizes = (6, 1, 12, 3)
    gradient = torch.randn(2, sum(sizes), dtype=torch.float64)
    gradient[:, 6] = 0.0  # a tensor with zero gradient stays zero
    gradient[1] *= 7  # each memory is clipped on its own
    parts = [part for memory in gradient for part in (memory.split(sizes) if kind == "tensor" else [memory])]
    expected = []
    for part in parts:
        norm = math.sqrt(sum(float(g) ** 2 for g in part))
        expected += [float(g) * (max_norm / norm if max_norm and norm > max_norm else 1.0) for g in part]
    clipped = clip_gradient(gradient, sizes, max_norm, kind)
    # CLIP_EPSILON (1e-12) in the denominator.
    assert torch.allclose(clipped, torch.tensor(expected, dtype=torch.float64).view(2, -1), rtol=1e-9, atol=0)


class _Toy:
    """One linear with a dense fast weight per memory, read out at every position of B rows."""

    def __init__(self, config: MemoryConfig) -> None:
        generator = torch.Generator().manual_seed(4)
        self.config = config
        self.linear = nn.Linear(5, 5, bias=False)
        self.inputs = torch.randn(ROWS, LENGTH, 5, generator=generator)
        self.head = torch.randn(5, VOCABULARY, generator=generator)
        self.fast = FastWeights({"linear": self.linear}, [], config, torch.float32)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(5, 5, generator=generator))
        targets = torch.randint(0, VOCABULARY, (ROWS * LENGTH,), generator=generator)
        masked = torch.rand(ROWS * LENGTH, generator=generator) < 0.6
        self.positions = masked.nonzero()[:, 0]
        self.step = InnerStep(0, None, self.positions, targets[self.positions], torch.full((ROWS,), 0.5))

    def fit(self, step: InnerStep | None = None, **options):
        plan = InnerPlan(
            [torch.zeros(ROWS, LENGTH, dtype=torch.int64)], [step or self.step], None, None, False, range(ROWS)
        )
        network = Network(
            # Another state has other inputs.
            lambda state, positions: self.linear(self.inputs * (1 + state)).flatten(0, 1)[positions],
            lambda hidden: hidden @ self.head,
            VOCABULARY,
        )
        memories = ROWS if self.config.scope == "row" else 1
        initial = torch.zeros(memories, self.fast.numel)
        with self.fast.attached():
            report = fit(self.fast, initial, plan, network, self.config, LinearAlphaScheduler(), **options)
            assert self.fast.value is not None
            return report, self.fast.value.clone()


def _toy(**settings) -> _Toy:
    return _Toy(MemoryConfig(inner_adapter_type="full", inner_grad_clip=0.0, **settings))


@pytest.mark.parametrize("scope", ["batch", "row"])
def test_a_row_whose_loss_is_not_finite_is_left_out_and_counted(scope: str) -> None:
    toy = _toy(scope=scope)
    toy.inputs[1] *= torch.tensor(1e30)  # logits of about 1e31, which are finite; a loss beyond float32 is not
    toy.inputs[1] *= torch.tensor(1e8)
    report, written = toy.fit()
    assert report.bad_rows.tolist() == [1.0] and report.empty_rows.tolist() == [0.0]
    mine = toy.positions // LENGTH != 1
    kept = InnerStep(0, None, toy.positions[mine], toy.step.targets[mine], toy.step.t)
    toy.inputs[1] = 0.0
    expected_report, expected = toy.fit(kept)
    # The same float32 terms, some of them in products of another size.
    assert torch.allclose(written, expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(report.losses, expected_report.losses, rtol=1e-5)
    assert bool(written.isfinite().all()) and bool(written.any())
    assert report.skipped[0].tolist() == ([0.0, 1.0, 0.0] if scope == "row" else [0.0])


def test_a_gradient_whose_norm_is_not_finite_skips_the_step() -> None:
    toy = _toy()
    report, written = toy.fit(reduce_gradient=lambda gradient: torch.full_like(gradient, 1e25))
    assert report.skipped.tolist() == [[1.0]] and not bool(written.any())


def test_an_activation_that_is_not_a_number_stays_in_its_row() -> None:
    toy = _toy(scope="row")
    expected = toy.fit()[1]
    toy.inputs[2] = torch.nan
    report, written = toy.fit()
    assert torch.equal(written[:2], expected[:2]) and not bool(written[2].any())
    assert report.skipped[0].tolist() == [0.0, 0.0, 1.0]
    shared = _toy()
    shared.inputs[2] = torch.nan
    report, written = shared.fit()
    # One memory for all rows: 0 * nan reaches its gradient, and the step is left out for all.
    assert report.skipped.tolist() == [[1.0]] and not bool(written.any()) and report.bad_rows.tolist() == [1.0]


@pytest.mark.parametrize("scope", ["batch", "row"])
def test_a_row_with_nothing_to_predict_is_counted(scope: str) -> None:
    toy = _toy(scope=scope)
    mine = toy.positions // LENGTH != 0
    report, written = toy.fit(InnerStep(0, None, toy.positions[mine], toy.step.targets[mine], toy.step.t))
    assert report.empty_rows.tolist() == [1.0] and report.bad_rows.tolist() == [0.0]
    assert report.skipped[0].tolist() == ([1.0, 0.0, 0.0] if scope == "row" else [0.0])
    assert bool(written[-1].any()) and (scope == "batch" or not bool(written[0].any()))


@pytest.mark.parametrize("objective", ["ce", "distill", "distill_hidden"])
def test_the_size_of_a_chunk_does_not_matter(objective: str, monkeypatch) -> None:
    toy = _toy(inner_loss_type=objective)
    step = dataclasses.replace(toy.step, teacher=None if objective == "ce" else 1)
    whole, written = toy.fit(step)
    assert bool(written.any())
    monkeypatch.setattr(losses, "CPU_CHUNK_LOGITS", 2 * VOCABULARY)
    monkeypatch.setattr(inner_loop, "HEAD_CPU_CHUNK_LOGITS", 5 * VOCABULARY)
    parts, written_in_parts = toy.fit(step)
    # Products over fewer rows may round in another way.
    assert torch.allclose(written, written_in_parts, rtol=1e-5, atol=1e-7)
    assert torch.allclose(whole.losses, parts.losses, rtol=1e-5, atol=1e-7)


def test_a_gradient_from_other_ranks_moves_a_memory_with_nothing_of_its_own() -> None:
    toy = _toy()
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = InnerStep(0, None, nothing, nothing, toy.step.t)
    report, written = toy.fit(empty, reduce_gradient=lambda gradient: gradient + 1)
    assert torch.allclose(written, torch.full_like(written, -0.1)) and report.skipped.tolist() == [[0.0]]
    report, written = toy.fit(empty)
    assert not bool(written.any()) and report.skipped.tolist() == [[1.0]] and report.empty_rows.tolist() == [3.0]
