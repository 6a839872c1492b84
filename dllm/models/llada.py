"""LLaDA: dense pre-norm decoder with bidirectional attention and OLMo-style names (arXiv 2502.09992).

Shapes: B rows, L positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from dllm.models.backbone import Backbone, DiffusionLM, Mask
from dllm.models.layers import AttentionMixin, RMSNorm, RotaryEmbedding, pick
from dllm.models.moe import RouterRecorder


class LLaDAConfig(PreTrainedConfig):
    """Configuration of dense LLaDA; field names are those of the published config.json.

    Fields that say how the weights were first drawn (init_fn, init_device, ...), flash_attention, precision and
    use_cache are stored and not used: new weights are normal with `init_std`, `attn_implementation` chooses the kernel,
    the argument of forward the cache. `tie_word_embeddings` follows `weight_tying`, whatever the file says: old files
    carry transformers' default there.

    Raises:
        ValueError: a setting that this implementation does not have.
    """

    model_type = "llada"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "initializer_range": "init_std",
    }

    d_model: int = 4096
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    n_layers: int = 32
    mlp_ratio: int = 4  # feed-forward width over d_model, where mlp_hidden_size is None
    mlp_hidden_size: int | None = None
    vocab_size: int = 126464
    embedding_size: int | None = None  # rows of the embedding and the head; None: vocab_size
    max_sequence_length: int = 4096  # tokens; for information, positions are not limited
    activation_type: str = "silu"
    block_type: str = "llama"
    block_group_size: int = 1
    layer_norm_type: str = "rms"
    layer_norm_with_affine: bool = True
    bias_for_layer_norm: bool | None = False
    rms_norm_eps: float = 1e-5
    attention_layer_norm: bool = False  # RMS norm over the full width of q and of k, before the heads are split
    attention_layer_norm_with_affine: bool = True
    alibi: bool = False
    rope: bool = True
    rope_theta: float = 500000.0
    rope_full_precision: bool = True  # rotate in float32
    multi_query_attention: bool | None = None
    include_bias: bool = False  # bias of every linear
    include_qkv_bias: bool = False  # bias of q, k and v
    input_emb_norm: bool = False  # multiply the embeddings by sqrt(d_model)
    scale_logits: bool = False  # divide the logits by sqrt(d_model)
    weight_tying: bool = False  # the embedding is the head
    attention_dropout: float = 0.1  # in [0, 1), as are the next two
    residual_dropout: float = 0.1
    embedding_dropout: float = 0.1
    init_std: float = 0.02
    use_cache: bool = False
    output_router_logits: bool = False  # there is no router; True is an error
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs) -> None:
        # Before anything is derived from them: transformers' names for the same fields arrive among the rest.
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        self.tie_word_embeddings = self.weight_tying
        if kwargs.pop("rope_scaling", None):
            raise ValueError("rope_scaling is not supported for LLaDA: remove it from the configuration")
        given = kwargs.pop("head_dim", None)  # a property here, derived from the other sizes
        if given not in (None, self.head_dim):
            raise ValueError(f"head_dim={given} is not supported for LLaDA: heads are {self.head_dim} wide here")
        super().__post_init__(**kwargs)
        self._check()

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def key_heads(self) -> int:
        """Number of key heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def feed_forward_width(self) -> int:
        """Width inside the feed-forward part."""
        return self.mlp_hidden_size or self.mlp_ratio * self.d_model

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding and of the head."""
        return self.embedding_size or self.vocab_size

    def _check(self) -> None:
        for name in self.architectures or []:
            if "moe" in name.lower():
                raise ValueError(
                    f"{name} is not dense LLaDA though it shares its model_type: load it with dllm.models.load_model"
                )
        fixed = {
            "block_type": "llama",
            "block_group_size": 1,
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "attention_layer_norm_with_affine": True,
            "activation_type": "silu",
            "rope": True,
            "alibi": False,
            "output_router_logits": False,
        }
        found = [
            f"{name}={self.__dict__[name]!r} (only {only!r})"
            for name, only in fixed.items()
            if self.__dict__[name] != only
        ]
        if self.multi_query_attention:
            found.append("multi_query_attention=True (set n_kv_heads=1 instead)")
        if self.bias_for_layer_norm or (self.bias_for_layer_norm is None and self.include_bias):
            found.append("biases in norms (only bias_for_layer_norm=False)")
        if self.d_model % (2 * self.n_heads):
            found.append(f"d_model={self.d_model} must be a multiple of 2 * n_heads={2 * self.n_heads}")
        if self.n_heads % self.key_heads:
            found.append(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")
        if self.num_embeddings < self.vocab_size:
            found.append(f"embedding_size={self.embedding_size} must be at least vocab_size={self.vocab_size}")
        if found:
            raise ValueError(f"unsupported LLaDA configuration: {'; '.join(found)}")


class LLaDABlock(GradientCheckpointingLayer, AttentionMixin):
    """x += attn_out(Attn(norm x)); x += ff_out(silu(ff_proj y) * up_proj y), y = norm x."""

    def __init__(self, config: LLaDAConfig, layer_idx: int) -> None:
        super().__init__()
        size, width, key_width = config.d_model, config.feed_forward_width, config.key_heads * config.head_dim
        groups = config.n_heads // config.key_heads
        self.set_attention(config, layer_idx, config.head_dim, groups, config.attention_dropout)
        bias, qkv_bias = config.include_bias, config.include_bias or config.include_qkv_bias
        self.q_proj = nn.Linear(size, size, bias=qkv_bias)
        self.k_proj = nn.Linear(size, key_width, bias=qkv_bias)
        self.v_proj = nn.Linear(size, key_width, bias=qkv_bias)
        self.attn_out = nn.Linear(size, size, bias=bias)
        self.ff_proj = nn.Linear(size, width, bias=bias)
        self.up_proj = nn.Linear(size, width, bias=bias)
        self.ff_out = nn.Linear(width, size, bias=bias)
        self.attn_norm = RMSNorm(size, config.rms_norm_eps)
        self.ff_norm = RMSNorm(size, config.rms_norm_eps)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.attention_layer_norm else None
        self.k_norm = RMSNorm(key_width, config.rms_norm_eps) if config.attention_layer_norm else None
        self.dropout = nn.Dropout(config.residual_dropout)

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
        normed = self.attn_norm(hidden)
        query, key, value = self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (self.split_heads(x) for x in (query, key, value))
        attended = self.attend(query, key, value, attention_mask, position_embeddings, past_key_values)
        hidden = pick(hidden, wanted) + self.dropout(self.attn_out(pick(attended, wanted)))
        normed = self.ff_norm(hidden)
        return hidden + self.dropout(self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed)))


class LLaDATransformer(nn.Module):
    """Holds the parameters under their published names. The head is among them, unless it is tied to the embedding."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.num_embeddings, config.d_model)
        self.blocks = nn.ModuleList(LLaDABlock(config, i) for i in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_out: nn.Linear | None = None
        if not config.weight_tying:
            self.ff_out = nn.Linear(config.d_model, config.num_embeddings, bias=config.include_bias)


class LLaDAModel(Backbone):
    """Backbone of dense LLaDA."""

    config_class = LLaDAConfig
    _no_split_modules = ["LLaDABlock"]

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.transformer = LLaDATransformer(config)
        self.rotary_emb = RotaryEmbedding(
            config.d_model // config.n_heads, config.rope_theta, config.rope_full_precision
        )
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.embedding_scale = math.sqrt(config.d_model) if config.input_emb_norm else None
        self.post_init()

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.transformer.blocks

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        return self.transformer.wte

    @property
    def final_norm(self) -> RMSNorm:
        """The norm before the head."""
        return self.transformer.ln_f

    def scale_embeddings(self, hidden: torch.Tensor) -> torch.Tensor:
        """Times sqrt(D) if the configuration says so, then dropout."""
        if self.embedding_scale is not None:
            hidden = hidden * self.embedding_scale
        return self.embedding_dropout(hidden)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the token embedding."""
        self.transformer.wte = value


class LLaDAModelLM(DiffusionLM):
    """Dense LLaDA with its head; parameter names and shapes are those of the published checkpoints."""

    model: LLaDAModel
    config_class = LLaDAConfig
    _no_split_modules = ["LLaDABlock"]

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.logit_scale = 1 / math.sqrt(config.d_model) if config.scale_logits else None
        self.post_init()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., D] taken after the final norm."""
        transformer = self.model.transformer
        if transformer.ff_out is None:
            logits = F.linear(hidden, transformer.wte.weight)
        else:
            logits = transformer.ff_out(hidden)
        return logits if self.logit_scale is None else logits * self.logit_scale

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the token embedding (and with it the head, where they are tied)."""
        self.model.transformer.wte = value

    def get_output_embeddings(self) -> nn.Linear | None:
        """The head; None where the embedding serves as head."""
        return self.model.transformer.ff_out

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the head.

        Raises:
            ValueError: the embedding serves as head.
        """
        if self.model.transformer.ff_out is None:
            raise ValueError("the head is tied to the embedding (weight_tying): use set_input_embeddings")
        self.model.transformer.ff_out = new_embeddings

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in transformers; also keeps `config.embedding_size` in step."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        if self.config.embedding_size is not None:
            self.config.embedding_size = embedding.num_embeddings
        return embedding
