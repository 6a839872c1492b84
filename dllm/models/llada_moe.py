"""LLaDA-MoE: pre-norm decoder with bidirectional attention and routed experts (arXiv 2509.24389).

Shapes: B rows, L positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from dllm.models.backbone import Mask
from dllm.models.layers import AttentionMixin, RMSNorm, RotaryEmbedding, SwiGLU, pick, plain_rope_theta
from dllm.models.moe import RouterRecorder, SparseMoE
from dllm.models.standard import StandardBackbone, StandardLM

logger = logging.get_logger(__name__)

# Fields that the published model stores and does not use, with the values at which that makes no difference.
IGNORED_FIELDS = {
    "norm_topk_prob": (None, False),
    "moe_router_score_function": (None, "softmax"),
    "routed_scaling_factor": (None, 1, 1.0),
    "router_num_group": (None, -2, -1, 0, 1),
    "router_topk_group": (None, -2, -1, 0, 1),
}


class LLaDAMoEConfig(PreTrainedConfig):
    """Configuration of LLaDA-MoE; field names are those of the published config.json.

    norm_topk_prob, moe_router_score_function, routed_scaling_factor and the router groups are stored and not used, as
    in the published model; a value that would matter if they were is loaded with a warning. `use_cache` is stored and
    not used: the argument of forward decides.

    Raises:
        ValueError: a setting that this implementation does not have.
    """

    model_type = "lladamoe"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 157184
    hidden_size: int = 2048
    dense_intermediate_size: int = 8192
    expert_intermediate_size: int = 1024
    shared_expert_intermediate_size: int | None = (
        None  # width of the shared expert of MoE layers; None: no shared expert
    )
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None  # None: as many as attention heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096  # tokens; for information, positions are not limited
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    partial_rotary_factor: float = 1.0  # share of a head's dimensions that are rotated, in (0, 1]
    qk_layernorm: bool = True  # RMS norm over each head of q and k, before the rotation
    attention_bias: bool = False
    attention_dropout: float = 0.0  # in [0, 1)
    clip_qkv: float | None = None  # clamp q and k to +- this; None: no clamp
    num_experts: int = 64
    num_experts_per_tok: int = 8
    moe_layer_freq: list[int] | None = None  # per layer 1 = experts, 0 = dense; None or []: all experts
    moe_router_enable_expert_bias: bool = False
    output_router_logits: bool = False  # return the load-balancing loss by default
    router_aux_loss_coef: float = 0.01  # its weight in the training loss
    use_cache: bool = False
    pad_token_id: int | None = None  # this row of the embedding starts at zero and is not trained
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if not self.moe_layer_freq:
            self.moe_layer_freq = [1] * self.num_hidden_layers
        theta = plain_rope_theta(kwargs)
        self.rope_theta = self.rope_theta if theta is None else theta
        rotated = kwargs.pop("rotary_dim", None)
        if rotated not in (None, self.rotary_dim):
            raise ValueError(f"rotary_dim={rotated} is not supported for LLaDA-MoE: {self.rotary_dim} are rotated here")
        given = kwargs.pop("head_dim", None)  # a property here, derived from the other sizes
        if given not in (None, self.head_dim):
            raise ValueError(f"head_dim={given} is not supported for LLaDA-MoE: heads are {self.head_dim} wide here")
        super().__post_init__(**kwargs)
        self._check()
        stored = self.__dict__
        for name, harmless in IGNORED_FIELDS.items():
            if stored.get(name) not in harmless:
                logger.warning(
                    f"LLaDA-MoE does not use {name}={stored[name]!r}, as in the published model: it has no effect"
                )

    def _check(self) -> None:
        heads, top_k, pad = self.num_attention_heads, self.num_experts_per_tok, self.pad_token_id
        found = []
        if self.hidden_act != "silu":
            found.append(f"hidden_act={self.hidden_act!r} (only 'silu')")
        if self.tie_word_embeddings:
            found.append("tie_word_embeddings=True (the head has weights of its own)")
        if self.hidden_size % heads:
            found.append(f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={heads}")
        if heads % self.key_heads:
            found.append(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={self.key_heads}")
        if self.rope_theta <= 0:
            found.append(f"rope_theta={self.rope_theta} must be positive")
        if not 0 < self.partial_rotary_factor <= 1 or self.rotary_dim % 2:
            found.append(
                f"partial_rotary_factor={self.partial_rotary_factor} must rotate an even share in (0, 1] of a head"
            )
        if len(self.moe_layer_freq or []) != self.num_hidden_layers:
            found.append(f"moe_layer_freq must have one entry per layer ({self.num_hidden_layers})")
        if not 1 <= top_k <= self.num_experts:
            found.append(f"num_experts_per_tok={top_k} must lie in 1 to num_experts={self.num_experts}")
        if self.shared_expert_intermediate_size is not None and self.shared_expert_intermediate_size < 1:
            found.append("shared_expert_intermediate_size must be positive, or null for no shared expert")
        if pad is not None and not 0 <= pad < self.vocab_size:
            found.append(f"pad_token_id={pad} lies outside the vocabulary of {self.vocab_size}")
        if found:
            raise ValueError(f"unsupported LLaDA-MoE configuration: {'; '.join(found)}")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def key_heads(self) -> int:
        """Number of key heads."""
        return self.num_key_value_heads or self.num_attention_heads

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether a layer has routed experts."""
        return bool((self.moe_layer_freq or [])[layer_idx])

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)


class LLaDAMoEAttention(nn.Module, AttentionMixin):
    """Bidirectional attention with grouped key heads; optional norm of q and k per head, optional clamp of q and k."""

    def __init__(self, config: LLaDAMoEConfig, layer_idx: int) -> None:
        super().__init__()
        head_dim, key_width = config.head_dim, config.key_heads * config.head_dim
        groups = config.num_attention_heads // config.key_heads
        self.set_attention(config, layer_idx, head_dim, groups, config.attention_dropout)
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_layernorm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_layernorm else None
        self.clip = config.clip_qkv

    def forward(
        self,
        hidden: torch.Tensor,
        attention_mask: Mask | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        query, key, value = (self.split_heads(f(hidden)) for f in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.clip is not None:
            query, key = (x.clamp(-self.clip, self.clip) for x in (query, key))
        attended = self.attend(query, key, value, attention_mask, position_embeddings, past_key_values)
        return self.o_proj(pick(attended, wanted))


class LLaDAMoELayer(GradientCheckpointingLayer):
    """h += Attn(norm h); z = norm h; h += MLP z, where the MLP is dense, or experts plus an optional shared expert."""

    def __init__(self, config: LLaDAMoEConfig, layer_idx: int) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.self_attn = LLaDAMoEAttention(config, layer_idx)
        is_sparse = config.is_sparse(layer_idx)
        if is_sparse:
            self.mlp = SparseMoE(
                hidden_size,
                config.expert_intermediate_size,
                config.num_experts,
                config.num_experts_per_tok,
                layer_idx,
                config.moe_router_enable_expert_bias,
            )
        else:
            self.mlp = SwiGLU(hidden_size, config.dense_intermediate_size)
        shared = config.shared_expert_intermediate_size if is_sparse else None
        self.shared_expert = SwiGLU(hidden_size, shared) if shared is not None else None
        self.input_layernorm = RMSNorm(hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        attention_mask: Mask | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None = None,
        recorder: RouterRecorder | None = None,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, L, D] -> [B, L, D], or [R, n, D] at the flat positions `wanted` [R, n]."""
        normed = self.input_layernorm(hidden)
        attended = self.self_attn(normed, attention_mask, position_embeddings, past_key_values, wanted)
        hidden = pick(hidden, wanted) + attended
        normed = self.post_attention_layernorm(hidden)
        if isinstance(self.mlp, SparseMoE):
            output = self.mlp(normed, recorder)
        else:
            output = self.mlp(normed)
        if self.shared_expert is not None:
            output = output + self.shared_expert(normed)
        return hidden + output


class LLaDAMoEModel(StandardBackbone):
    """Backbone of LLaDA-MoE."""

    config_class = LLaDAMoEConfig
    _no_split_modules = ["LLaDAMoELayer"]

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(LLaDAMoELayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rotary_dim, config.rope_theta)
        self.post_init()


class LLaDAMoEModelLM(StandardLM):
    """LLaDA-MoE with its head; parameter names and shapes are those of the published checkpoints."""

    config_class = LLaDAMoEConfig
    _no_split_modules = ["LLaDAMoELayer"]

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config)
        self.model = LLaDAMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
