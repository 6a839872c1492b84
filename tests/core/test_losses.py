import math

import pytest
import torch

from dllm.core.losses import loss_weights, normalise, normaliser, row_sums, token_nll
from dllm.core.schedulers import LinearAlphaScheduler

ROWS, LENGTH, VOCABULARY = 3, 7, 11


def _batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    maskable = torch.rand(ROWS, LENGTH, generator=generator) < 0.8
    masked = maskable & (torch.rand(ROWS, LENGTH, generator=generator) < 0.5)
    t = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    return logits, ids, maskable, masked, t


def _naive(norm_type: str, weight_type: str) -> float:
    logits, ids, maskable, masked, t = _batch()
    total = 0.0
    for b in range(ROWS):
        for p in range(LENGTH):
            if not masked[b, p]:
                continue
            row = [math.exp(v) for v in logits[b, p].tolist()]
            nll = -math.log(row[int(ids[b, p])] / sum(row))
            weight = 1 / (float(t[b]) + 1e-6) if weight_type == "scheduler" else 1.0
            divisor = {
                "token": int(maskable.sum()),
                "sequence": int(maskable[b].sum()) * ROWS,
                "batch": ROWS,
            }[norm_type]
            total += nll * weight / divisor
    return total


@pytest.mark.parametrize("weight_type", ["scheduler", "uniform"])
@pytest.mark.parametrize("norm_type", ["token", "sequence", "batch"])
def test_loss_equals_naive_sums(norm_type: str, weight_type: str) -> None:
    logits, ids, maskable, masked, t = _batch()
    positions = masked.reshape(-1).nonzero()[:, 0]
    nll = token_nll(logits.reshape(-1, VOCABULARY)[positions], ids.reshape(-1)[positions])
    weights = loss_weights(t, LinearAlphaScheduler(), weight_type)
    loss = normalise(nll, positions, LENGTH, weights, maskable.sum(dim=1).double(), norm_type)
    # float64 on both sides: only the order of the sums differs.
    assert float(loss) == pytest.approx(_naive(norm_type, weight_type), rel=1e-12)


def test_row_sums_equal_a_loop() -> None:
    logits, ids, _, masked, t = _batch()
    positions = masked.reshape(-1).nonzero()[:, 0]
    nll = token_nll(logits.reshape(-1, VOCABULARY)[positions], ids.reshape(-1)[positions])
    weights = loss_weights(t, LinearAlphaScheduler(), "scheduler")
    naive = [
        sum(float(nll[i]) * float(weights[b]) for i, p in enumerate(positions.tolist()) if p // LENGTH == b)
        for b in range(ROWS)
    ]
    # float64 on both sides: only the order of the sums differs.
    assert row_sums(nll, positions, LENGTH, weights).tolist() == pytest.approx(naive, rel=1e-12)


def test_token_nll_is_computed_in_float32_for_bfloat16_logits() -> None:
    logits = torch.randn(5, VOCABULARY).bfloat16()
    targets = torch.arange(5)
    exact = -torch.log_softmax(logits.double(), dim=-1)[torch.arange(5), targets]
    # float32 rounding of a handful of terms; bfloat16 would be off by 1e-2.
    assert torch.allclose(token_nll(logits, targets).double(), exact, atol=1e-5)


@pytest.mark.parametrize("norm_type", ["token", "sequence", "batch"])
def test_nothing_to_predict_gives_zero_loss_and_zero_gradients(norm_type: str) -> None:
    logits = torch.randn(0, VOCABULARY, requires_grad=True)
    nll = token_nll(logits, torch.zeros(0, dtype=torch.int64))
    loss = normalise(nll, torch.zeros(0, dtype=torch.int64), LENGTH, torch.ones(2), torch.zeros(2), norm_type)
    loss.backward()
    assert float(loss.detach()) == 0.0 and logits.grad is not None


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="scheduler, uniform"):
        loss_weights(torch.ones(1), LinearAlphaScheduler(), "square")  # pyright: ignore
    with pytest.raises(ValueError, match="token, sequence, batch"):
        normaliser(torch.ones(1), "mean")  # pyright: ignore
