"""MDLMSampler: commit the surest tokens of all masked positions, step by step (arXiv 2502.09992, algorithm 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from dllm.core.noising import flat_positions, make_generator
from dllm.core.reveal import Remasking, add_gumbel_noise, choose_positions, confidence, get_num_transfer_tokens
from dllm.core.samplers.base import BaseSampler, BaseSamplerConfig, BaseSamplerOutput
from dllm.utils.parsing import InputError


@dataclass
class MDLMSamplerConfig(BaseSamplerConfig):
    """Settings of `MDLMSampler`."""

    remasking: Remasking = "low_confidence"  # which proposals are committed first (see dllm.core.reveal.confidence)
    suppress_tokens: tuple[int, ...] = ()  # ids that are never proposed; the mask token never is

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remasking not in get_args(Remasking):
            raise InputError(f"remasking is {self.remasking!r}: choose one of {', '.join(get_args(Remasking))}")


class MDLMSampler(BaseSampler):
    """Fills in all masks of a sequence at once, over `steps` forwards; the head runs on the masked positions only."""

    @torch.no_grad()
    def infill(
        self,
        noised_ids: torch.Tensor,
        config: BaseSamplerConfig | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> BaseSamplerOutput:
        """`noised_ids` with a token in the place of every mask; other positions keep theirs.

        Each of the S steps proposes a token for every masked position and commits the ceil or floor of (masks / S)
        surest of each row (`get_num_transfer_tokens`).

        Args:
            noised_ids: int64 [B, L].
            config: an `MDLMSamplerConfig`; None takes the defaults.
            attention_mask: [B, L], 1 at real tokens; None attends to all.
        """
        settings = MDLMSamplerConfig() if config is None else config
        assert isinstance(settings, MDLMSamplerConfig)
        banned = torch.tensor([self.mask_token_id, *settings.suppress_tokens], device=noised_ids.device)
        generator = make_generator(settings.seed, device=noised_ids.device)
        ids = noised_ids.clone()  # [B, L]
        is_masked = ids == self.mask_token_id
        positions = flat_positions(is_masked)  # [N], counted once: later steps need no answer from the device
        schedule = get_num_transfer_tokens(is_masked.sum(dim=1), settings.steps)  # [B, S]
        for step in range(settings.steps):
            output = self.model(
                input_ids=ids, attention_mask=attention_mask, logit_positions=positions - self.spec.logit_shift
            )
            logits = output.logits.float()  # [N, V]
            logits[:, banned] = -torch.inf
            tokens = add_gumbel_noise(logits, settings.temperature, generator).argmax(dim=-1)  # [N]
            scores = torch.zeros(ids.numel(), device=ids.device)
            scores[positions] = confidence(logits, tokens, settings.remasking, generator).float()
            proposal = ids.reshape(-1).clone()
            proposal[positions] = tokens
            chosen = choose_positions(scores.view_as(ids), is_masked, schedule[:, step])  # [B, L]
            ids = torch.where(chosen, proposal.view_as(ids), ids)
            is_masked = is_masked & ~chosen
        return BaseSamplerOutput(ids)
