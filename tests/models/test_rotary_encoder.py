"""The rotary encoder: published size, a naive forward, how weights are drawn, tied heads, refusals."""

import math

import pytest
import torch

from dllm.models import RotaryEncoderConfig, RotaryEncoderLM
from dllm.models.relay_norm import RelayKeys


@pytest.mark.parametrize("tied, published", [(True, 7_099_776), (False, 7_106_304)])
def test_the_published_number_of_parameters(tied, published):
    """With the relay's norm, as published (arXiv 2605.22967)."""
    with torch.device("meta"):
        model = RotaryEncoderLM(RotaryEncoderConfig(tie_word_embeddings=tied))
        model.backbone.add_relay_norm(RelayKeys())
    assert sum(parameter.numel() for parameter in model.parameters()) == published


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """[L, d]: pairs (i, i + d / 2) turned by position * theta^(-2 i / d), as complex numbers."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[:, :half], x[:, half:])
    for position in range(len(x)):
        for i in range(half):
            pairs[position, i] *= complex(math.cos(a := position * theta ** (-i / half)), math.sin(a))
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def normed(x: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


@torch.no_grad()
def naive_logits(model: RotaryEncoderLM, ids: torch.Tensor) -> torch.Tensor:
    """Row by row and head by head: [B, L, V]."""
    width = model.config.head_dim
    rows = []
    for row in ids:
        x = model.model.embed_tokens.weight[row]
        for layer in model.model.layers:
            y, heads = normed(x, layer.attention_norm), []
            for start in range(0, x.shape[-1], width):
                q, k, v = (
                    y @ proj.weight[start : start + width].T for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
                )
                scores = rotated(q, 1e4) @ rotated(k, 1e4).T / width**0.5
                heads.append(torch.softmax(scores, dim=-1) @ v)
            x = x + torch.cat(heads, dim=-1) @ layer.o_proj.weight.T
            y = (normed(x, layer.mlp_norm) @ layer.up_proj.weight.T + layer.up_proj.bias).clamp(min=0)
            x = x + y @ layer.down_proj.weight.T + layer.down_proj.bias
        rows.append(normed(x, model.model.norm) @ model.lm_head.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize("tied", [False, True])
def test_the_forward_is_the_naive_one(make_model, ids, tied):
    model = make_model("rotary_encoder", dtype=torch.float64, tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # biases and norms too
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(model(ids).logits, naive_logits(model, ids), atol=1e-11, rtol=0)


def test_weights_are_drawn_as_published():
    sizes = {"hidden_size": 144, "intermediate_size": 200, "vocab_size": 150, "pad_token_id": 3}
    for tied, deviation in ((True, 1 / 12), (False, 1.0)):
        model = RotaryEncoderLM(RotaryEncoderConfig(tie_word_embeddings=tied, **sizes))
        table = model.model.embed_tokens.weight
        assert not table[3].any()
        # The deviation of 21,000 draws is within 3 % of its own.
        assert table[4:].std().item() == pytest.approx(deviation, rel=0.03)
        assert (model.lm_head.weight is table) == tied
        layer = model.model.layers[1]
        for linear in (layer.q_proj, layer.up_proj, layer.down_proj):
            bound = linear.in_features**-0.5
            assert 0.97 * bound < linear.weight.abs().max() <= bound
            assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert layer.up_proj.bias is not None and layer.up_proj.bias.abs().max() <= 1 / 12 and layer.q_proj.bias is None


def test_a_tied_model_comes_back_from_disk(make_model, ids, tmp_path):
    model = make_model("rotary_encoder", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = RotaryEncoderLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    # Weights mapped from a file may be summed in another order.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"hidden_size": 30}, "hidden_size=30 must be a multiple of 2 "),
        ({"output_router_logits": True}, "has no router"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling is not supported"),
        ({"attention_dropout": 1.5}, "attention_dropout"),
    ],
)
def test_settings_that_it_does_not_have(settings, message):
    with pytest.raises(ValueError, match=message):
        RotaryEncoderLM(RotaryEncoderConfig(**settings))
