"""Fast-dLLM v2: Qwen2.5 turned into a block-diffusion model (arXiv 2509.26328).

The network is that of Qwen2 and the logit at position p - 1 predicts token p; the mask alone says that positions see
their own block and those before it. At block size 1 it is Qwen2 with a causal mask. Shapes: B rows, L positions, D
hidden, n_h heads, n_kv key heads, d head width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from dllm.models.backbone import Mask
from dllm.models.layers import AttentionMixin, RMSNorm, RotaryEmbedding, SwiGLU, pick, plain_rope_theta
from dllm.models.moe import RouterRecorder
from dllm.models.standard import StandardBackbone, StandardLM

_UNSUPPORTED = "unsupported Fast-dLLM v2 configuration"
# Fields of the configuration that are whole numbers of at least 1.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "bd_size",
)


class Fast_dLLM_QwenConfig(PreTrainedConfig):
    """Configuration of Fast-dLLM v2; field names, the misspelt one too, are those of the published config.json.

    sliding_window and max_window_layers are stored and not used, as in Qwen2 without use_sliding_window. `use_cache` is
    stored and not used: the argument of forward decides.

    Raises:
        ValueError: a setting that this implementation does not have.
    """

    model_type = "Fast_dLLM_Qwen"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 151936
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int | None = 2  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768  # tokens; for information, positions are not limited
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    attention_dropout: float = 0.0  # in [0, 1)
    bd_size: int = 32  # positions of a block, at least 1
    conplemenrary_mask: bool = True  # trained on each row twice, with a mask and with its complement
    use_sliding_window: bool = False
    layer_types: list[str] | None = None  # per layer "full_attention"; None: all of them
    output_router_logits: bool = False  # there is no router; True is an error
    use_cache: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_numbers(*_SIZES)  # divided by below
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check_numbers("head_dim")
        theta = plain_rope_theta(kwargs)
        self.rope_theta = self.rope_theta if theta is None else theta
        super().__post_init__(**kwargs)
        self._check()

    def _check_numbers(self, *names: str) -> None:
        for name in names:
            value = self.__dict__[name]
            if type(value) is not int or value < 1:
                raise ValueError(f"{_UNSUPPORTED}: {name}={value!r} must be a whole number of at least 1")

    def _check(self) -> None:
        heads, theta = self.num_attention_heads, self.rope_theta
        found = []
        if self.hidden_act != "silu":
            found.append(f"hidden_act={self.hidden_act!r} (only 'silu')")
        if self.use_sliding_window:
            found.append("use_sliding_window=True (attention sees all that its mask lets it see)")
        if set(self.layer_types or []) - {"full_attention"}:
            found.append(f"layer_types={self.layer_types} (only 'full_attention')")
        if self.output_router_logits:
            found.append("output_router_logits=True (there is no router)")
        if heads % self.key_heads:
            found.append(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={self.key_heads}")
        if self.head_width % 2:
            found.append(f"head_dim={self.head_width} must be even")
        if not 0 <= self.attention_dropout < 1:
            found.append(f"attention_dropout={self.attention_dropout} must lie in [0, 1)")
        if type(theta) not in (int, float) or not 0 < theta < math.inf:
            found.append(f"rope_theta={theta!r} must be a positive number")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"):
            given = self.__dict__[name]
            outside = [i for i in (given if isinstance(given, list) else [given]) if not self._knows(i)]
            if outside:
                found.append(f"{name}={outside[0]!r} lies outside the vocabulary of {self.vocab_size}")
        if found:
            raise ValueError(f"{_UNSUPPORTED}: {'; '.join(found)}")

    def _knows(self, token: int | None) -> bool:
        return token is None or (type(token) is int and 0 <= token < self.vocab_size)

    @property
    def key_heads(self) -> int:
        """Number of key heads."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        assert self.head_dim is not None
        return self.head_dim


class Fast_dLLM_QwenAttention(nn.Module, AttentionMixin):
    """Attention with grouped key heads; biases on queries, keys and values."""

    def __init__(self, config: Fast_dLLM_QwenConfig, layer_idx: int) -> None:
        super().__init__()
        width, heads, key_heads = config.head_width, config.num_attention_heads, config.key_heads
        self.set_attention(config, layer_idx, width, heads // key_heads, config.attention_dropout)
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, key_heads * width, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, key_heads * width, bias=True)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden: torch.Tensor,
        attention_mask: Mask | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        query, key, value = (self.split_heads(f(hidden)) for f in (self.q_proj, self.k_proj, self.v_proj))
        attended = self.attend(query, key, value, attention_mask, position_embeddings, past_key_values)
        return self.o_proj(pick(attended, wanted))


class Fast_dLLM_QwenLayer(GradientCheckpointingLayer):
    """h += Attn(norm h); h += MLP(norm h)."""

    def __init__(self, config: Fast_dLLM_QwenConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Fast_dLLM_QwenAttention(config, layer_idx)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        attention_mask: Mask | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None = None,
        recorder: RouterRecorder | None = None,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, L, D] -> [B, L, D], or [R, n, D] at the flat positions `wanted` [R, n]; there is no router to record."""
        normed = self.input_layernorm(hidden)
        attended = self.self_attn(normed, attention_mask, position_embeddings, past_key_values, wanted)
        hidden = pick(hidden, wanted) + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Fast_dLLM_QwenModel(StandardBackbone):
    """Backbone of Fast-dLLM v2."""

    config_class = Fast_dLLM_QwenConfig
    _no_split_modules = ["Fast_dLLM_QwenLayer"]

    def __init__(self, config: Fast_dLLM_QwenConfig) -> None:
        super().__init__(config)
        # No padding row: rows are padded with the end-of-turn token, whose embedding must be trained.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Fast_dLLM_QwenLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.head_width, config.rope_theta)
        self.post_init()


class Fast_dLLM_QwenForCausalLM(StandardLM):
    """Fast-dLLM v2 with its head; parameter names and shapes are those of Qwen2 and of the published checkpoints."""

    config_class = Fast_dLLM_QwenConfig
    _no_split_modules = ["Fast_dLLM_QwenLayer"]
    # Only where the configuration says tie_word_embeddings.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Fast_dLLM_QwenConfig) -> None:
        super().__init__(config)
        self.model = Fast_dLLM_QwenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
