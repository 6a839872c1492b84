"""Fast-dLLM v2 against transformers' Qwen2, its configuration, its template."""

import json

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from dllm.core.attention import block_causal_mask
from dllm.models import Fast_dLLM_QwenConfig, block_size_of, find_spec, load_config, spec_of
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.spec import DEFAULT_BLOCK_SIZE
from dllm.models.tiny import make_tiny_checkpoint

SIZES = {
    "vocab_size": 23,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 20,
    "initializer_range": 0.3,
}
TEXT = "Some words to learn pieces from, and some more words. " * 5


class Angles(nn.Module):
    """cos and sin of the rotary angles in float64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = 5000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)

    def forward(self, hidden, position_ids):
        angles = (position_ids[..., None] * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def widen(qwen: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """Qwen2 in float64 throughout: its own norms and angles are computed in float32 whatever the weights are."""
    qwen.model.rotary_emb = Angles(qwen.model.layers[0].self_attn.head_dim)
    for name, module in list(qwen.named_modules()):
        if isinstance(module, Qwen2RMSNorm):
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
            norm.weight = module.weight
            qwen.set_submodule(name, norm)
    return qwen.double()


def both(tied: bool, implementation: str = "eager", **settings):
    """(Qwen2, ours) with the same random weights, biases and norms too."""
    sizes = {**SIZES, **settings, "tie_word_embeddings": tied}
    qwen = Qwen2ForCausalLM._from_config(
        Qwen2Config(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
        attn_implementation="sdpa",  # its eager attention takes the softmax in float32
    )
    ours = find_spec({"model_type": "Fast_dLLM_Qwen"}).model_class._from_config(
        Fast_dLLM_QwenConfig(**sizes, rope_theta=5000.0), attn_implementation=implementation
    )
    for parameter in qwen.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3 + (parameter.dim() == 1)
    report = ours.load_state_dict(qwen.state_dict())
    assert not report.missing_keys and not report.unexpected_keys
    return qwen.eval(), ours.eval()


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", [{}, {"head_dim": 10}])
def test_block_size_1_is_qwen2(tied, implementation, heads, ids) -> None:
    qwen, ours = both(tied, implementation, **heads)
    qwen, ours = widen(qwen), ours.double()
    logits = ours(ids, attention_mask=block_causal_mask(7, 1)).logits
    torch.testing.assert_close(logits, qwen(ids).logits, atol=1e-10, rtol=0)
    # A longer block sees more: the mask is what makes the difference.
    assert (ours(ids, attention_mask=block_causal_mask(7, 2)).logits - logits)[:, 0].abs().max() > 1e-3


@torch.no_grad()
def test_block_size_1_is_qwen2_as_it_is_in_float32(ids) -> None:
    qwen, ours = both(True)
    expected = qwen(ids).logits
    logits = ours(ids, attention_mask=block_causal_mask(7, 1)).logits
    # Angles and norms are rounded at other places: some roundings of the largest logit.
    torch.testing.assert_close(logits, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_of_qwen2(tied) -> None:
    qwen, ours = both(tied)
    shapes = [{name: tuple(w.shape) for name, w in model.state_dict().items()} for model in (qwen, ours)]
    assert shapes[0] == shapes[1]
    assert "model.layers.0.self_attn.q_proj.bias" in shapes[1] and "lm_head.weight" in shapes[1]


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_qwen2(tied, ids) -> None:
    qwen, ours = both(tied)
    qwen, ours = widen(qwen), ours.double()
    qwen(ids).logits.square().sum().backward()
    ours(ids, attention_mask=block_causal_mask(7, 1)).logits.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in qwen.named_parameters()}
    assert expected.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        scale = expected[name].abs().max()
        torch.testing.assert_close(parameter.grad / scale, expected[name] / scale, atol=1e-10, rtol=0)


@torch.no_grad()
def test_a_tied_head_is_the_embedding_also_after_loading_and_resizing(make_model, ids, tmp_path) -> None:
    model = make_model("fast_dllm_v2", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=0)  # other alignment
    model.resize_token_embeddings(29)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model(ids).logits.shape[-1] == 29


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_load_tied_and_untied(tied, tmp_path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "tiny", "fast_dllm_v2", TEXT, 300, tie_word_embeddings=tied)
    model = load_model(str(folder))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    tokenizer = load_tokenizer(str(folder), model=model)
    assert tokenizer.mask_token == "|<MASK>|" and tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_the_published_config_loads_unedited(tmp_path) -> None:
    published = {
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "auto_map": {"AutoConfig": "configuration.Fast_dLLM_QwenConfig"},
        "model_type": "Fast_dLLM_Qwen",
        "bd_size": 32,
        "conplemenrary_mask": True,
        "hidden_act": "silu",
        "layer_types": ["full_attention"] * 28,
        "max_window_layers": 21,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "use_cache": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    config, spec = load_config(tmp_path)
    assert spec.name == "fast_dllm_v2" and type(config) is Fast_dLLM_QwenConfig
    assert (config.hidden_size, config.key_heads, config.head_width, config.rope_theta) == (1536, 2, 128, 1e6)
    assert config.conplemenrary_mask is True and config.tie_word_embeddings is True


def test_both_spellings_of_the_rotary_base(tmp_path) -> None:
    old = Fast_dLLM_QwenConfig(rope_theta=1234.0)
    new = Fast_dLLM_QwenConfig(rope_parameters={"rope_type": "default", "rope_theta": 1234.0})
    assert old.rope_theta == new.rope_theta == 1234.0
    old.save_pretrained(tmp_path)
    assert load_config(tmp_path)[0].to_diff_dict() == old.to_diff_dict()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "'yarn'"),
        ({"bd_size": 0}, "bd_size=0"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"output_router_logits": True}, "output_router_logits"),
        ({"rope_theta": float("nan")}, "rope_theta=nan must be a positive number"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta='x'"),
        ({"pad_token_id": 10**6}, "pad_token_id"),
        ({"mask_token_id": 151936}, "mask_token_id=151936 lies outside the vocabulary of 151936"),
        ({"bos_token_id": -1}, "bos_token_id=-1"),
        ({"eos_token_id": [3, 10**6]}, "eos_token_id=1000000"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be a whole number of at least 1"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"num_attention_heads": 2048, "num_key_value_heads": 2}, "head_dim=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"bd_size": True}, "bd_size=True"),
    ],
)
def test_refusals(settings, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Fast_dLLM_QwenConfig(**settings)
    assert "\n" not in str(error.value)


def test_the_block_size_is_the_one_asked_for_or_the_checkpoints_or_the_familys(make_model) -> None:
    model = make_model("fast_dllm_v2", bd_size=8)
    assert (block_size_of(model), block_size_of(model, 4)) == (8, 4)
    assert block_size_of(make_model("fast_dllm_v2")) == spec_of(model).block_size == 32
    assert block_size_of(make_model("llada2_moe")) == 32
    assert block_size_of(make_model("llada")) == DEFAULT_BLOCK_SIZE
    assert block_size_of(make_model("llada"), 5) == 5


def test_the_template_names_the_published_system_prompt(tmp_path) -> None:
    tokenizer = load_tokenizer(str(make_tiny_checkpoint(tmp_path / "tiny", "fast_dllm_v2", TEXT, 300)))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    system = "<|im_start|>system\n{}<|im_end|>\n"
    rest = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == system.format("You are a helpful assistant.") + rest
    own = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *turns], tokenize=False)
    assert own == system.format("Be brief.") + rest
