"""The harness over `MDLMSampler`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dllm.core.eval.config import MDLMEvalConfig
from dllm.core.eval.generation import DEFAULT_MAX_GEN_TOKS
from dllm.core.eval.harness import BaseEvalHarness
from dllm.core.samplers import BaseSamplerConfig, MDLMSampler, MDLMSamplerConfig
from dllm.core.samplers.mdlm import MDLM_PRESETS
from dllm.utils.parsing import InputError

# Settings that come from tasks as a matter of course: a model argument replaces them without a word.
_FROM_TASKS = ("max_new_tokens", "temperature")


class MDLMEvalHarness(BaseEvalHarness):
    """lm-eval's view of a masked-diffusion LM that `MDLMSampler` decodes (families with bidirectional attention)."""

    config_class = MDLMEvalConfig
    sampler_class = MDLMSampler
    sampler_fields = {
        "steps": "steps",
        "block_size": "block_size",
        "temperature": "temperature",
        "remasking": "remasking",
        "threshold": "threshold",
        "cfg": "cfg_scale",
        "cache": "cache",
        "seed": "seed",
    }
    config: MDLMEvalConfig

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.sampler.spec.attention != "bidirectional":
            raise InputError(
                f"{self.sampler.spec.name} attends {self.sampler.spec.attention}: this harness decodes families with "
                "bidirectional attention"
            )
        self.sampler_config({})  # pairs of settings that exclude each other are told before anything is asked

    def sampler_config(self, given: Mapping[str, Any]) -> MDLMSamplerConfig:
        """Model arguments before the request before the preset before the defaults.

        Raises:
            InputError: a setting that model arguments and request give different values, or out of range.
        """
        settings: dict[str, Any] = {"max_new_tokens": DEFAULT_MAX_GEN_TOKS}
        if self.config.preset is not None:
            settings.update(MDLM_PRESETS[self.config.preset])
        settings.update({self.sampler_fields.get(name, name): value for name, value in given.items()})
        defaults = {field.name: field.default for field in dataclasses.fields(self.config)}
        for name in ("max_new_tokens", *self.sampler_fields):
            value = getattr(self.config, name)
            if value == defaults[name]:
                continue
            if name in given and name not in _FROM_TASKS and given[name] != value:
                raise InputError(
                    f"{name} is {value} among the model arguments and {given[name]} among the generation settings: "
                    "give it once"
                )
            settings[self.sampler_fields.get(name, name)] = value
        settings.setdefault("seed", self.config.seed)
        return MDLMSamplerConfig(early_stop=self.config.early_stop, **settings)

    def most_forwards(self, config: BaseSamplerConfig) -> int:
        """Forwards of a row's decoding, at most; guidance takes two per step."""
        assert isinstance(config, MDLMSamplerConfig)
        return super().most_forwards(config) * (2 if config.cfg_scale > 0 else 1)

    def draws(self, config: BaseSamplerConfig) -> bool:
        """Whether decoding with these settings depends on the seed."""
        assert isinstance(config, MDLMSamplerConfig)
        return super().draws(config) or config.remasking == "random"

    @property
    def guidance(self) -> float:
        """Scale of classifier-free guidance for likelihoods."""
        return self.config.cfg or 0.0
