"""Writing and reading checkpoints, resizing embeddings, weight tying, the Auto tables."""

import importlib

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

import dllm.models.llada
from dllm.models import DiffusionLM, find_spec, spec_of


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left, right)


def aligned(model):
    """The model with weights in memory of their own: products of weights mapped from a file may sum in another order,
    because they begin at addresses that are no multiple of the vector width."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def test_round_trip_is_bitwise(family, make_model, ids, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert all(same(w, model.state_dict()[name]) for name, w in loaded.state_dict().items())
    assert same(aligned(loaded)(ids).logits, model(ids).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()


def test_auto_classes(family, make_model, ids, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    for auto in (AutoModelForCausalLM, AutoModelForMaskedLM):
        assert same(aligned(auto.from_pretrained(tmp_path))(ids).logits, model(ids).logits)
    backbone = aligned(AutoModel.from_pretrained(tmp_path))
    assert same(backbone(ids).last_hidden_state, model.backbone(ids).last_hidden_state)
    assert spec_of(backbone) is spec_of(model) is find_spec(model.config)


def test_importing_twice_is_harmless():
    importlib.reload(dllm.models)
    assert find_spec({"model_type": "llada"}).name == "llada"


def test_a_truncated_file_is_reported(family, make_model, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(SafetensorError, match="incomplete"):
        type(model).from_pretrained(tmp_path)


def test_new_weights_are_drawn_with_the_configured_deviation(family, make_model):
    model = make_model(family)
    for name, weight in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            assert same(weight, torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0)), name
        elif weight.numel() >= 200:
            # The deviation of 200 and more draws of a normal is within 15 % of its own.
            assert weight.std().item() == pytest.approx(0.3, rel=0.15), name


def test_missing_weights_are_initialised(family, make_model, tmp_path):
    model = make_model(family)
    state = model.state_dict()
    dropped = next(name for name in state if name.endswith(("q_proj.weight", "query_key_value.weight")))
    model.save_pretrained(tmp_path, state_dict={name: w for name, w in state.items() if name != dropped})
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.get_parameter(dropped).std().item() == pytest.approx(0.3, rel=0.15)
    assert all(same(w, state[name]) for name, w in loaded.state_dict().items() if name != dropped)


def test_the_padding_row(make_model, tmp_path):
    model = make_model("llada_moe", pad_token_id=4)
    table = model.get_input_embeddings().weight
    assert not table[4].any()
    with torch.no_grad():
        table[4] = 1.0
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).get_input_embeddings().weight
    assert same(loaded, table)


def check_size(model: DiffusionLM, size: int, ids: torch.Tensor) -> None:
    assert model.get_input_embeddings().weight.shape[0] == size
    assert model(ids).logits.shape[-1] == size
    assert model.config.vocab_size == size


@pytest.mark.parametrize("size", [19, 29])
def test_resizing(family, make_model, ids, tmp_path, size):
    model = make_model(family)
    before = model(ids % 19).logits
    model.resize_token_embeddings(size)
    check_size(model, size, ids % 19)
    common = min(size, 23)
    # The head's product has another shape, which may sum in another order.
    torch.testing.assert_close(model(ids % 19).logits[..., :common], before[..., :common], atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    check_size(loaded, size, ids % 19)


def test_resizing_keeps_the_embedding_size_in_step(make_model, ids):
    model = make_model("llada", embedding_size=32)
    assert model(ids).logits.shape[-1] == 32
    model.resize_token_embeddings(29)
    check_size(model, 29, ids)
    assert model.config.embedding_size == 29


def test_tied_dense_model(make_model, ids, tmp_path):
    model = make_model("llada", weight_tying=True, scale_logits=True, input_emb_norm=True)
    assert "model.transformer.ff_out.weight" not in model.state_dict()
    assert model.get_output_embeddings() is None
    hidden = model.backbone(ids).last_hidden_state
    expected = hidden @ model.get_input_embeddings().weight.T / 24**0.5
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    scaled = model.backbone(ids, stop_at=0).hidden
    assert same(scaled, model.get_input_embeddings()(ids) * 24**0.5)
    model.save_pretrained(tmp_path)
    assert same(type(model).from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    model.resize_token_embeddings(29)
    check_size(model, 29, ids)
    with pytest.raises(ValueError, match="weight_tying"):
        model.set_output_embeddings(torch.nn.Linear(2, 2))


def test_optional_parameters(make_model, ids):
    dense = make_model("llada", include_qkv_bias=True, attention_layer_norm=True).state_dict()
    first = "model.transformer.blocks.0."
    assert {first + name for name in ("q_proj.bias", "q_norm.weight", "k_norm.weight")} <= dense.keys()
    assert dense[first + "k_norm.weight"].shape == (12,) and first + "ff_out.bias" not in dense
    biased = make_model("llada", include_bias=True).state_dict()
    assert {first + "ff_out.bias", "model.transformer.ff_out.bias", first + "k_proj.bias"} <= biased.keys()
    sparse = make_model("llada_moe", moe_router_enable_expert_bias=True, attention_bias=True, qk_layernorm=False)
    names = sparse.state_dict().keys()
    assert {"model.layers.1.mlp.expert_bias", "model.layers.1.shared_expert.up_proj.weight"} <= names
    assert "model.layers.0.self_attn.o_proj.bias" in names and "model.layers.0.mlp.up_proj.weight" in names
    assert not any("q_norm" in name or "layers.0.shared" in name for name in names)
    assert sparse(ids).logits.isfinite().all()


def test_clamped_queries(make_model, ids):
    free, clamped = (make_model("llada_moe", clip_qkv=limit, qk_layernorm=False) for limit in (None, 0.1))
    assert not torch.allclose(free(ids).logits, clamped(ids).logits)
    assert same(make_model("llada_moe", clip_qkv=1e6, qk_layernorm=False)(ids).logits, free(ids).logits)


def test_partial_rotation(make_model, ids):
    model = make_model("llada_moe", partial_rotary_factor=0.5)
    assert model.backbone.rotary_emb.dim == 6
    assert not torch.allclose(model(ids).logits, make_model("llada_moe")(ids).logits)
