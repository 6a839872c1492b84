"""Norm and rotary positions against naive versions in float64."""

import math

import torch

from dllm.models.layers import RMSNorm, RotaryEmbedding, apply_rotary


def test_rms_norm():
    norm = RMSNorm(5, eps=1e-3).double()
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    for row, got in zip(x.reshape(-1, 5), norm(x).reshape(-1, 5), strict=True):
        size = math.sqrt(sum(float(v) ** 2 for v in row) / 5 + 1e-3)
        torch.testing.assert_close(got, row / size * norm.weight, atol=1e-14, rtol=1e-12)


def test_rms_norm_rounds_before_the_weight():
    norm = RMSNorm(8, eps=1e-5).bfloat16()
    x = torch.randn(4, 8).bfloat16()
    wide = x.float()
    expected = norm.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert torch.equal(norm(x), expected)


def test_rotary_turns_pairs():
    dim, width, theta = 6, 8, 11.0  # two dimensions pass through
    x = torch.randn(2, 3, 4, width, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3], [5, 4, 9, 1]])
    cos, sin = RotaryEmbedding(dim, theta)(x, positions)
    got = apply_rotary(x, cos, sin)
    for row in range(2):
        for place in range(4):
            for pair in range(dim // 2):
                angle = float(positions[row, place]) * theta ** (-2 * pair / dim)
                a, b = x[row, :, place, pair], x[row, :, place, pair + dim // 2]
                turned = got[row, :, place]
                expected = a * math.cos(angle) - b * math.sin(angle)
                torch.testing.assert_close(turned[:, pair], expected, atol=1e-13, rtol=0)
                expected = b * math.cos(angle) + a * math.sin(angle)
                torch.testing.assert_close(turned[:, pair + dim // 2], expected, atol=1e-13, rtol=0)
    assert torch.equal(got[..., dim:], x[..., dim:])


def test_rotary_precision():
    hidden = torch.zeros(1, 2, 4, dtype=torch.bfloat16)
    positions = torch.tensor([[1000, 1001]])
    exact = RotaryEmbedding(8, 10000.0)(hidden.float(), positions)[0]
    assert RotaryEmbedding(8, 10000.0)(hidden, positions)[0].dtype == torch.bfloat16
    assert torch.equal(RotaryEmbedding(8, 10000.0, full_precision=True).bfloat16()(hidden, positions)[0], exact)
    assert torch.equal(RotaryEmbedding(8, 10000.0).bfloat16()(hidden, positions)[0], exact.bfloat16())
