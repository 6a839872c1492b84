"""The harness over `MDLMSampler`."""

from __future__ import annotations

from typing import Any

from dllm.core.eval.config import MDLMEvalConfig
from dllm.core.eval.harness import BaseEvalHarness
from dllm.core.samplers import BaseSamplerConfig, MDLMSamplerConfig
from dllm.utils.parsing import InputError


class MDLMEvalHarness(BaseEvalHarness):
    """lm-eval's view of a masked-diffusion LM that `MDLMSampler` decodes (families with bidirectional attention)."""

    config_class = MDLMEvalConfig
    config: MDLMEvalConfig

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.sampler.spec.attention != "bidirectional":
            raise InputError(
                f"{self.sampler.spec.name} attends {self.sampler.spec.attention}: this harness decodes families with "
                "bidirectional attention; llada21 (BlockEvalHarness) decodes block by block"
            )

    def decoding_cost(self, config: BaseSamplerConfig, prompt_length: int) -> tuple[int, int]:
        """(forwards, token-forwards) of decoding a row, both at most; guidance takes two forwards per step."""
        assert isinstance(config, MDLMSamplerConfig)
        forwards, work = super().decoding_cost(config, prompt_length)
        times = 2 if config.cfg_scale > 0 else 1
        return forwards * times, work * times

    def draws(self, config: BaseSamplerConfig) -> bool:
        """Whether decoding with these settings depends on the seed."""
        assert isinstance(config, MDLMSamplerConfig)
        return super().draws(config) or config.remasking == "random"

    @property
    def guidance(self) -> float:
        """Scale of classifier-free guidance for likelihoods."""
        return self.config.cfg or 0.0
