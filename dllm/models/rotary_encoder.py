"""Rotary encoder: a small pre-norm transformer with bidirectional attention, for puzzles and other short token grids
(the network of the Sudoku experiments of arXiv 2605.22967).

Shapes: B rows, L positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from dllm.models.backbone import FamilyModel, Mask
from dllm.models.layers import AttentionMixin, RotaryEmbedding, pick, plain_rope_theta
from dllm.models.moe import RouterRecorder
from dllm.models.standard import StandardBackbone, StandardLM


class RotaryEncoderConfig(PreTrainedConfig):
    """Configuration of a rotary encoder; the defaults are the published Sudoku network (7,105,536 parameters; with
    the embedding as head 7,099,008).

    Raises:
        ValueError: a setting that this implementation does not have.
    """

    model_type = "rotary_encoder"
    keys_to_ignore_at_inference = ["past_key_values"]

    hidden_size: int = 384
    num_attention_heads: int = 6
    num_hidden_layers: int = 4
    intermediate_size: int = 1536
    vocab_size: int = 17
    max_position_embeddings: int = 85  # tokens; for information, positions are not limited
    rope_theta: float = 1e4
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.1  # in [0, 1), as is the next
    residual_dropout: float = 0.1
    # Deviation of new weights. None: linears as torch.nn.Linear draws them, U(-1/sqrt(n), 1/sqrt(n)) for n inputs; the
    # embedding N(0, 1/sqrt(D)) where it is also the head, else N(0, 1).
    initializer_range: float | None = None
    output_router_logits: bool = False  # there is no router; True is an error
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None
    tie_word_embeddings: bool = False  # the embedding is the head

    def __post_init__(self, **kwargs) -> None:
        base = plain_rope_theta(kwargs)
        self.rope_theta = self.rope_theta if base is None else base
        super().__post_init__(**kwargs)
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 2 * num_attention_heads="
                f"{2 * self.num_attention_heads}"
            )
        for name in ("attention_dropout", "residual_dropout"):
            if not 0 <= self.__dict__[name] < 1:
                raise ValueError(f"{name}={self.__dict__[name]} must lie in [0, 1)")
        if self.output_router_logits:
            raise ValueError("output_router_logits=True: a rotary encoder has no router; drop it")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads


class RotaryEncoderLayer(GradientCheckpointingLayer, AttentionMixin):
    """x += o_proj(Attn(norm x)); x += down_proj(relu(up_proj(norm x))); dropout on what is added."""

    def __init__(self, config: RotaryEncoderConfig, layer_idx: int) -> None:
        super().__init__()
        size, width = config.hidden_size, config.intermediate_size
        self.set_attention(config, layer_idx, config.head_dim, 1, config.attention_dropout)
        self.attention_norm = nn.LayerNorm(size, config.layer_norm_eps)
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.mlp_norm = nn.LayerNorm(size, config.layer_norm_eps)
        self.up_proj = nn.Linear(size, width)
        self.down_proj = nn.Linear(width, size)
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
        normed = self.attention_norm(hidden)
        query, key, value = (self.split_heads(proj(normed)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attended = self.attend(query, key, value, attention_mask, position_embeddings, past_key_values)
        hidden = pick(hidden, wanted) + self.dropout(self.o_proj(pick(attended, wanted)))
        return hidden + self.dropout(self.down_proj(F.relu(self.up_proj(self.mlp_norm(hidden)))))


class _Drawn(FamilyModel):
    """How the weights of this family are drawn; see `RotaryEncoderConfig.initializer_range`."""

    config: RotaryEncoderConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The functions of `init` skip parameters that a checkpoint has already filled.
        if type(module) is nn.LayerNorm:
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif self.config.initializer_range is None and isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif self.config.initializer_range is None and isinstance(module, nn.Embedding):
            deviation = self.config.hidden_size**-0.5 if self.config.tie_word_embeddings else 1.0
            init.normal_(module.weight, mean=0.0, std=deviation)
            if module.padding_idx is not None:
                self._zero_padding_row(module)
        else:
            super()._init_weights(module)


class RotaryEncoderModel(_Drawn, StandardBackbone):
    """Backbone of a rotary encoder."""

    config_class = RotaryEncoderConfig
    _no_split_modules = ["RotaryEncoderLayer"]

    def __init__(self, config: RotaryEncoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(RotaryEncoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope_theta)
        self.post_init()


class RotaryEncoderLM(_Drawn, StandardLM):
    """A rotary encoder with its head."""

    model: RotaryEncoderModel
    config_class = RotaryEncoderConfig
    _no_split_modules = ["RotaryEncoderLayer"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RotaryEncoderConfig) -> None:
        super().__init__(config)
        self.model = RotaryEncoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
