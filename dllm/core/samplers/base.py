"""What every sampler has: a configuration, an output, a model to ask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from dllm.models.backbone import unwrap
from dllm.models.spec import spec_of
from dllm.utils.parsing import InputError
from dllm.utils.tokens import token_id


@dataclass
class BaseSamplerConfig:
    """Settings that all samplers share."""

    steps: int = 64  # denoising forwards, at least 1
    temperature: float = 0.0  # 0 takes the likeliest token and draws nothing
    seed: int = 0  # of every draw

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        if self.temperature < 0:
            raise InputError(f"temperature must be at least 0, got {self.temperature}")


@dataclass(frozen=True)
class BaseSamplerOutput:
    """Filled-in token ids."""

    sequences: torch.Tensor  # [B, L] int64


class BaseSampler(ABC):
    """Fills in mask tokens with a masked-diffusion LM.

    Args:
        model: a model of `dllm.models`, plain or wrapped. It is called in the mode it is in: put it in eval mode.
        tokenizer: gives the mask token.
    """

    def __init__(self, model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self.model = model
        self.mask_token_id = token_id(tokenizer, "mask_token")
        self.spec = spec_of(unwrap(model))

    @abstractmethod
    def infill(
        self,
        noised_ids: torch.Tensor,
        config: BaseSamplerConfig | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> BaseSamplerOutput:
        """`noised_ids` [B, L] with a token in the place of every mask."""
