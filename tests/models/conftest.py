"""Tiny models of every family."""

from collections.abc import Callable

import pytest
import torch

from dllm.models import DiffusionLM, get_spec

SIZES = {
    "llada": {
        "vocab_size": 23,
        "d_model": 24,
        "n_heads": 2,
        "n_kv_heads": 1,
        "n_layers": 3,
        "mlp_hidden_size": 20,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
    },
    "llada_moe": {
        "vocab_size": 23,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "expert_intermediate_size": 12,
        "dense_intermediate_size": 20,
        "shared_expert_intermediate_size": 8,
        "moe_layer_freq": [0, 1, 1],
    },
    "llada2_moe": {
        "vocab_size": 23,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "n_group": 3,
        "topk_group": 2,
        "moe_intermediate_size": 12,
        "intermediate_size": 20,
    },
    "fast_dllm_v2": {
        "vocab_size": 23,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "intermediate_size": 20,
        "tie_word_embeddings": False,
    },
    "rotary_encoder": {
        "vocab_size": 23,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 20,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
    },
}


@pytest.fixture(params=sorted(SIZES))
def family(request) -> str:
    """Name of each family in turn."""
    return request.param


@pytest.fixture(scope="session")
def make_model() -> Callable[..., DiffusionLM]:
    """make_model(family, attn_implementation="sdpa", dtype=float32, **configuration fields) -> model in eval mode."""

    def make(family: str, attn_implementation: str = "sdpa", dtype=torch.float32, **overrides) -> DiffusionLM:
        spec = get_spec(family)
        config = spec.config_class(initializer_range=0.3, **{**SIZES[family], **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = spec.model_class._from_config(config, attn_implementation=attn_implementation)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """Random tokens, [3, 7]."""
    return torch.randint(0, 23, (3, 7), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def padding_mask() -> torch.Tensor:
    """[3, 7]; the second row ends in two padded positions, the third in one."""
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    mask[2, 6:] = 0
    return mask
