"""A tiny checkpoint, its tokenizer, and rows made with it."""

import pytest
import torch
from transformers import AutoTokenizer

from dllm.models.spec import load_config
from dllm.models.tiny import make_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a tiny LLaDA-MoE with five layers."""
    folder = tmp_path_factory.mktemp("tiny") / "llada_moe"
    return make_tiny_checkpoint(folder, "llada_moe", hidden_size=32, num_hidden_layers=5, num_experts=4)


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture
def load(checkpoint):
    """A function that loads the checkpoint anew, in float32."""

    def load_again(folder=checkpoint):
        config, spec = load_config(folder)
        assert spec is not None
        return spec.model_class.from_pretrained(folder, config=config, dtype=torch.float32)

    return load_again


@pytest.fixture(scope="session")
def llada2_checkpoint(tmp_path_factory):
    """Folder of a tiny LLaDA2 with three layers."""
    folder = tmp_path_factory.mktemp("tiny") / "llada2_moe"
    return make_tiny_checkpoint(folder, "llada2_moe", hidden_size=32, num_hidden_layers=3, num_experts=4, n_group=2)


@pytest.fixture(scope="session")
def llada2_tokenizer(llada2_checkpoint):
    return AutoTokenizer.from_pretrained(llada2_checkpoint)


@pytest.fixture
def load_llada2(llada2_checkpoint):
    """A function that loads the LLaDA2 checkpoint anew, in float32."""
    config, spec = load_config(llada2_checkpoint)
    assert spec is not None
    return lambda: spec.model_class.from_pretrained(llada2_checkpoint, config=config, dtype=torch.float32)


@pytest.fixture(scope="session")
def fast_dllm_checkpoint(tmp_path_factory):
    """Folder of a tiny Fast-dLLM v2 with three layers and blocks of eight."""
    folder = tmp_path_factory.mktemp("tiny") / "fast_dllm_v2"
    return make_tiny_checkpoint(folder, "fast_dllm_v2", hidden_size=32, num_hidden_layers=3, bd_size=8)


@pytest.fixture(scope="session")
def rows():
    """Twelve rows of equal length: eight prompt tokens, twelve answer tokens."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for index in range(12):
        ids = torch.randint(20, 200, (20,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * 8 + ids[8:], "prompt_len": 8, "example_id": index})
    return made
