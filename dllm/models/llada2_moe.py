"""LLaDA2.0 and LLaDA2.1 (mini, flash): routed experts chosen within groups, fused attention projections.

Decoding is block-causal (positions see their own block and those before it); the mask says so, the network is the same
for any mask. Shapes: B rows, L positions, D hidden, n_h heads, n_kv key heads, d head width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from dllm.models.backbone import Mask
from dllm.models.layers import AttentionMixin, RMSNorm, RotaryEmbedding, SwiGLU, pick, plain_rope_theta
from dllm.models.moe import GroupedMoE, RouterRecorder
from dllm.models.standard import StandardBackbone, StandardLM

# Fields of related models with the only values that this one knows.
FIXED_FIELDS = {"norm_topk_prob": True, "score_function": "sigmoid", "moe_router_enable_expert_bias": True}


class LLaDA2MoeConfig(PreTrainedConfig):
    """Configuration of LLaDA2.0 and 2.1; field names are those of the published config.json.

    norm_head, embedding_dropout, output_dropout, sliding_window and max_window_layers are stored and not used, as in
    the published model. `use_cache` is stored and not used: the argument of forward decides.

    Raises:
        ValueError: a setting that this implementation does not have.
    """

    model_type = "llada2_moe"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120  # width of the dense layers
    moe_intermediate_size: int = 512  # width of an expert
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4  # None or 0: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    use_qkv_bias: bool = False
    use_bias: bool = False  # of the output projection of attention
    use_qk_norm: bool = True  # RMS norm over each head of q and k, before the rotation
    max_position_embeddings: int = 32768  # tokens; for information, positions are not limited
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 600000.0
    partial_rotary_factor: float = 0.5  # share of a head's dimensions that are rotated, in (0, 1]
    attention_dropout: float = 0.0  # in [0, 1)
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int | None = 1  # the shared expert is this many experts wide; None: no shared expert
    n_group: int = 8  # groups of experts
    topk_group: int = 4  # groups that a token may choose from
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 1  # layers below this one are dense
    use_sliding_window: bool = False
    output_router_logits: bool = False  # return the load-balancing loss by default
    router_aux_loss_coef: float = 0.001  # its weight in the training loss
    use_cache: bool = False
    pad_token_id: int | None = None  # this row of the embedding starts at zero and is not trained
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        theta = plain_rope_theta(kwargs)
        self.rope_theta = self.rope_theta if theta is None else theta
        given = kwargs.pop("rotary_dim", None)  # a property here, derived from the other sizes
        super().__post_init__(**kwargs)
        self._check()
        if given not in (None, self.rotary_dim):
            raise ValueError(f"rotary_dim={given} is not supported for LLaDA2: {self.rotary_dim} are rotated here")

    def _check(self) -> None:
        # Divided by below.
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_experts"):
            if self.__dict__[name] < 1:
                raise ValueError(f"unsupported LLaDA2 configuration: {name}={self.__dict__[name]} must be positive")
        heads, top_k, pad = self.num_attention_heads, self.num_experts_per_tok, self.pad_token_id
        group_size = self.num_experts // max(1, self.n_group)
        found = []
        if self.hidden_act != "silu":
            found.append(f"hidden_act={self.hidden_act!r} (only 'silu')")
        if self.tie_word_embeddings:
            found.append("tie_word_embeddings=True (the head has weights of its own)")
        if self.use_sliding_window:
            found.append("use_sliding_window=True (attention sees all that its mask lets it see)")
        if heads % self.key_heads:
            found.append(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={self.key_heads}")
        for name, ours in FIXED_FIELDS.items():
            if self.__dict__.get(name) not in (None, ours):
                found.append(f"{name}={self.__dict__[name]!r} (only {ours!r})")
        shared_width = self.__dict__.get("moe_shared_expert_intermediate_size")
        if shared_width not in (None, self.moe_intermediate_size * (self.num_shared_experts or 0)):
            found.append(f"moe_shared_expert_intermediate_size={shared_width} (only num_shared_experts experts wide)")
        if not 0 <= self.attention_dropout < 1:
            found.append(f"attention_dropout={self.attention_dropout} must lie in [0, 1)")
        if self.rope_theta <= 0:
            found.append(f"rope_theta={self.rope_theta} must be positive")
        if not 0 < self.partial_rotary_factor <= 1 or self.rotary_dim % 2:
            found.append(
                f"partial_rotary_factor={self.partial_rotary_factor} must rotate an even share in (0, 1] of a head"
            )
        if self.n_group < 1 or self.num_experts % self.n_group or group_size < 2:
            found.append(f"num_experts={self.num_experts} must be n_group={self.n_group} groups of two or more")
        elif not 1 <= self.topk_group <= self.n_group:
            found.append(f"topk_group={self.topk_group} must lie in 1 to n_group={self.n_group}")
        elif not 1 <= top_k <= self.topk_group * group_size:
            found.append(f"num_experts_per_tok={top_k} must lie in 1 to {self.topk_group * group_size}")
        if self.num_shared_experts is not None and self.num_shared_experts < 1:
            found.append("num_shared_experts must be positive, or null for no shared expert")
        if pad is not None and not 0 <= pad < self.vocab_size:
            found.append(f"pad_token_id={pad} lies outside the vocabulary of {self.vocab_size}")
        if found:
            raise ValueError(f"unsupported LLaDA2 configuration: {'; '.join(found)}")

    @property
    def key_heads(self) -> int:
        """Number of key heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self.head_width * self.partial_rotary_factor)

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether a layer has routed experts."""
        return layer_idx >= self.first_k_dense_replace


class LLaDA2MoeAttention(nn.Module, AttentionMixin):
    """Attention with one projection for queries, keys and values, in this order along its heads."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int) -> None:
        super().__init__()
        width, heads, key_heads = config.head_width, config.num_attention_heads, config.key_heads
        self.set_attention(config, layer_idx, width, heads // key_heads, config.attention_dropout)
        self.num_heads, self.num_key_heads = heads, key_heads
        self.query_key_value = nn.Linear(config.hidden_size, (heads + 2 * key_heads) * width, bias=config.use_qkv_bias)
        self.dense = nn.Linear(heads * width, config.hidden_size, bias=config.use_bias)
        self.query_layernorm = RMSNorm(width, config.rms_norm_eps) if config.use_qk_norm else None
        self.key_layernorm = RMSNorm(width, config.rms_norm_eps) if config.use_qk_norm else None

    def forward(
        self,
        hidden: torch.Tensor,
        attention_mask: Mask | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        heads = self.split_heads(self.query_key_value(hidden))  # [B, n_h + 2 n_kv, L, d]
        query, key, value = heads.split([self.num_heads, self.num_key_heads, self.num_key_heads], dim=1)
        if self.query_layernorm is not None and self.key_layernorm is not None:
            query, key = self.query_layernorm(query), self.key_layernorm(key)
        attended = self.attend(query, key, value, attention_mask, position_embeddings, past_key_values)
        return self.dense(pick(attended, wanted))


class LLaDA2MoeLayer(GradientCheckpointingLayer):
    """h += Attn(norm h); h += MLP(norm h), where the MLP is dense, or routed experts plus a shared one."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = LLaDA2MoeAttention(config, layer_idx)
        if config.is_sparse(layer_idx):
            shared = config.num_shared_experts
            self.mlp = GroupedMoE(
                config.hidden_size,
                config.moe_intermediate_size,
                config.num_experts,
                config.num_experts_per_tok,
                layer_idx,
                num_groups=config.n_group,
                top_groups=config.topk_group,
                scale=config.routed_scaling_factor,
                shared_width=None if shared is None else shared * config.moe_intermediate_size,
            )
        else:
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
        """[B, L, D] -> [B, L, D], or [R, n, D] at the flat positions `wanted` [R, n]."""
        normed = self.input_layernorm(hidden)
        attended = self.attention(normed, attention_mask, position_embeddings, past_key_values, wanted)
        hidden = pick(hidden, wanted) + attended
        normed = self.post_attention_layernorm(hidden)
        if isinstance(self.mlp, GroupedMoE):
            return hidden + self.mlp(normed, recorder)
        return hidden + self.mlp(normed)


class LLaDA2MoeModel(StandardBackbone):
    """Backbone of LLaDA2."""

    config_class = LLaDA2MoeConfig
    _no_split_modules = ["LLaDA2MoeLayer"]

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(LLaDA2MoeLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rotary_dim, config.rope_theta)
        self.post_init()

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the token embedding."""
        self.word_embeddings = value


class LLaDA2MoeModelLM(StandardLM):
    """LLaDA2 with its head; parameter names and shapes are those of the published checkpoints."""

    config_class = LLaDA2MoeConfig
    router_scores = "sigmoid"
    _no_split_modules = ["LLaDA2MoeLayer"]

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
