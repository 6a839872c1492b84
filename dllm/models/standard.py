"""What families share whose parameters have the usual names: `embed_tokens`, `norm` and, above the backbone, `lm_head`.

Shapes: D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from dllm.models.backbone import Backbone, DiffusionLM
from dllm.models.layers import RMSNorm


class StandardBackbone(Backbone):
    """A backbone with `embed_tokens`, `layers` and `norm`."""

    embed_tokens: nn.Embedding
    norm: RMSNorm | nn.LayerNorm

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        return self.embed_tokens

    @property
    def final_norm(self) -> RMSNorm | nn.LayerNorm:
        """The norm before the head."""
        return self.norm

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the token embedding."""
        self.embed_tokens = value


class StandardLM(DiffusionLM):
    """A language model whose head is the linear `lm_head`; it may share its weight with the embedding."""

    lm_head: nn.Linear

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., D] taken after the final norm."""
        return self.lm_head(hidden)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the head."""
        self.lm_head = new_embeddings
