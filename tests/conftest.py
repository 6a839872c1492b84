"""Fixtures that every test folder shares."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """Folder with recorded tensors and public data sets (MEMDLM_SHARED); tests that need it skip without it."""
    folder = os.environ.get("MEMDLM_SHARED", "")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("set MEMDLM_SHARED to the folder with golden/ and data/ to run this test")
    return pathlib.Path(folder)


# The kernel's own interface, and nothing of ours: a sandbox that is broken must fail its tests, not skip them.
_CAN_FILTER = """
import ctypes, struct
library = ctypes.CDLL(None)
allow = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000), 8)
program = ctypes.c_char_p(struct.pack("@HP", 1, ctypes.addressof(allow)))
raise SystemExit(library.prctl(38, 1, 0, 0, 0) or library.prctl(22, 2, program, 0, 0))
"""


@pytest.fixture(scope="session")
def confining_kernel() -> None:
    """Skips where the kernel has no seccomp filters, so that generated programs cannot be run."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("generated programs run on Linux on x86_64 and aarch64 alone")
    if subprocess.run([sys.executable, "-c", _CAN_FILTER], timeout=60).returncode != 0:
        pytest.skip("this kernel, or container, allows no seccomp filter")


TINY = {
    "llada": {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 3,
        "mlp_hidden_size": 24,
        "vocab_size": 40,
        "embedding_size": 40,
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "mask_token_id": 39,
    },
    "llada_moe": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_intermediate_size": 12,
        "dense_intermediate_size": 24,
        "vocab_size": 40,
        "mask_token_id": 39,
    },
    "llada2_moe": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 12,
        "intermediate_size": 24,
        "vocab_size": 40,
        "mask_token_id": 39,
    },
    "fast_dllm_v2": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
        "vocab_size": 40,
        "mask_token_id": 39,
        "tie_word_embeddings": False,
    },
    "rotary_encoder": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
        "vocab_size": 40,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "initializer_range": 0.02,
        "mask_token_id": 39,
    },
}


@pytest.fixture
def make_model():
    """A function (family, **config) -> a tiny random model in eval mode, the same at every call."""
    from dllm.models.spec import get_spec

    def make(family: str = "llada_moe", **overrides):
        spec = get_spec(family)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = spec.model_class(spec.config_class(**{**TINY[family], **overrides}))
            # Random weights of the usual size give almost uniform predictions: larger ones make every path count.
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.data.mul_(8)
        return model.eval()

    return make
