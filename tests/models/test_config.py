"""Configurations: old and published files load unedited, what is not supported is refused, what has no effect warns."""

import json
import logging

import pytest
from transformers import AutoConfig

from dllm.models import LLaDAConfig, LLaDAMoEConfig, find_spec, load_config
from dllm.models.spec import ModelSpec

# What transformers 4.57 wrote around the model's own fields.
OLD_FIELDS = {
    "return_dict": True,
    "torchscript": False,
    "dtype": None,
    "tie_word_embeddings": True,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "max_length": 20,
    "top_k": 50,
    "temperature": 1.0,
    "transformers_version": "4.57.0",
    "use_cache": False,
}


def write(folder, **fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_old_dense_config(tmp_path):
    fields = {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "mlp_hidden_size": 40,
        "init_device": "cpu",
        "alibi_bias_max": 8.0,
    }
    write(tmp_path, model_type="llada", architectures=["LLaDAModelLM"], weight_tying=False, **OLD_FIELDS, **fields)
    config, spec = load_config(tmp_path)
    assert (spec.name, config.hidden_size, config.num_key_value_heads, config.rope_theta) == ("llada", 32, 4, 500000.0)
    assert config.tie_word_embeddings is False
    assert config.init_device == "cpu"


def test_published_moe_config_shares_the_dense_model_type(tmp_path):
    write(
        tmp_path,
        model_type="llada",
        architectures=["LLaDAMoEModelLM"],
        auto_map={"AutoModel": "modeling_lladamoe.LLaDAMoEModelLM"},
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        rope_scaling=None,
        head_dim=8,
        rope_theta=50000,
        moe_layer_freq=[1, 1],
        num_experts=4,
        num_experts_per_tok=2,
    )
    config, spec = load_config(tmp_path)
    assert (spec.name, type(config), config.model_type) == ("llada_moe", LLaDAMoEConfig, "lladamoe")
    assert config.hidden_size == 32 and config.rope_theta == 50000


@pytest.mark.parametrize("config_class", [LLaDAConfig, LLaDAMoEConfig])
def test_save_and_load(config_class, tmp_path):
    config = config_class(vocab_size=31, rope_theta=7.0, mask_token_id=3, pad_token_id=4)
    config.save_pretrained(tmp_path)
    loaded, _ = load_config(tmp_path)
    assert loaded.name_or_path == str(tmp_path)
    assert loaded.to_diff_dict() == AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"block_type": "sequential"}, "block_type='sequential' \\(only 'llama'\\)"),
        ({"alibi": True}, "alibi"),
        ({"rope": False}, "rope"),
        ({"layer_norm_type": "default"}, "layer_norm_type"),
        ({"activation_type": "gelu"}, "activation_type"),
        ({"multi_query_attention": True}, "n_kv_heads=1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"bias_for_layer_norm": True}, "biases in norms"),
        ({"include_bias": True, "bias_for_layer_norm": None}, "biases in norms"),
        ({"block_group_size": 2}, "block_group_size"),
        ({"head_dim": 64}, "heads are 128 wide"),
        ({"layer_norm_with_affine": False}, "layer_norm_with_affine"),
        ({"embedding_size": 5, "vocab_size": 7}, "embedding_size=5"),
        ({"n_kv_heads": 5}, "n_kv_heads=5"),
        ({"output_router_logits": True}, "output_router_logits"),
        ({"architectures": ["LLaDAMoEModelLM"]}, "load_model"),
    ],
)
def test_dense_refuses(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        LLaDAConfig(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"moe_layer_freq": [1, 0]}, "moe_layer_freq"),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"partial_rotary_factor": -1}, "partial_rotary_factor"),
        ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size"),
        ({"pad_token_id": 10**6}, "pad_token_id"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 64}, "heads are 128 wide"),
    ],
)
def test_moe_refuses(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        LLaDAMoEConfig(**fields)
    assert "\n" not in str(error.value)


@pytest.fixture
def warnings_seen(monkeypatch):
    seen: list[str] = []
    logger = logging.getLogger("dllm.models.llada_moe")
    monkeypatch.setattr(logger, "warning", lambda message, *_: seen.append(message))
    return seen


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_topk_prob": True},
        {"moe_router_score_function": "sigmoid"},
        {"routed_scaling_factor": 2.5},
        {"router_num_group": 4},
        {"router_topk_group": 2},
    ],
)
def test_settings_without_effect_warn(fields, warnings_seen):
    LLaDAMoEConfig(**fields)
    assert len(warnings_seen) == 1 and next(iter(fields)) in warnings_seen[0]


def test_published_values_do_not_warn(warnings_seen):
    LLaDAMoEConfig(
        norm_topk_prob=None,
        moe_router_score_function="softmax",
        routed_scaling_factor=1,
        router_num_group=-2,
        router_topk_group=-2,
    )
    assert not warnings_seen


def test_unknown_family_lists_the_known_ones(tmp_path):
    write(tmp_path, model_type="bert", architectures=["BertModel"])
    with pytest.raises(ValueError, match="llada_moe"):
        load_config(tmp_path)
    config, spec = load_config(tmp_path, trust_remote_code=True)
    assert spec is None and config.model_type == "bert"


def test_architectures_come_first():
    assert find_spec({"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]}).name == "llada_moe"
    assert find_spec({"model_type": "llada", "architectures": None}).name == "llada"
    assert find_spec({"model_type": "lladamoe"}).name == "llada_moe"
    assert find_spec(LLaDAMoEConfig()).name == "llada_moe"


def test_spec_checks_itself(family):
    from dataclasses import asdict

    from dllm.models import get_spec

    fields = {**asdict(get_spec(family)), "linear_roles": {"qq_proj": "q"}}
    with pytest.raises(ValueError, match="qq_proj"):
        ModelSpec(**fields)
    with pytest.raises(ValueError, match="block_size"):
        ModelSpec(**{**asdict(get_spec(family)), "attention": "bidirectional", "block_size": 4})
    with pytest.raises(ValueError, match="block_size"):
        ModelSpec(**{**asdict(get_spec(family)), "attention": "block_causal", "block_size": None})


def test_sizes_may_be_given_under_the_names_of_transformers() -> None:
    config = LLaDAConfig(hidden_size=256, num_attention_heads=64, num_hidden_layers=3, intermediate_size=48)
    assert (config.d_model, config.n_heads, config.n_layers, config.mlp_hidden_size) == (256, 64, 3, 48)
    assert config.n_kv_heads == 64 and config.head_dim == 4
    assert LLaDAConfig(num_attention_heads=16, hidden_size=256).key_heads == 16
    assert LLaDAConfig(num_attention_heads=16, num_key_value_heads=4, hidden_size=256).key_heads == 4


@pytest.mark.parametrize("name", ["llada_moe", "llada2_moe"])
def test_rotary_sizes_under_other_names(name) -> None:
    from dllm.models import get_spec

    cls = get_spec(name).config_class
    plain = cls()
    assert cls(rotary_dim=plain.rotary_dim).rotary_dim == plain.rotary_dim
    assert cls(rope_parameters={"rope_type": "default", "rope_theta": 1234.0}).rope_theta == 1234.0
    with pytest.raises(ValueError, match="rotary_dim=6 is not supported"):
        cls(rotary_dim=6)
    with pytest.raises(ValueError, match="'yarn' are not supported"):
        cls(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000.0})


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_topk_prob": False},
        {"score_function": "softmax"},
        {"moe_router_enable_expert_bias": False},
        {"moe_shared_expert_intermediate_size": 99},
        {"attention_dropout": 2.0},
        {"num_attention_heads": 0},
        {"hidden_size": 0},
    ],
)
def test_settings_that_llada2_does_not_have(settings) -> None:
    from dllm.models import LLaDA2MoeConfig

    with pytest.raises(ValueError, match=next(iter(settings))):
        LLaDA2MoeConfig(**settings)


def test_settings_of_llada2_at_their_only_values() -> None:
    from dllm.models import LLaDA2MoeConfig

    LLaDA2MoeConfig(norm_topk_prob=True, score_function="sigmoid", moe_shared_expert_intermediate_size=512)
