"""Models with a relay, and the seed of a new one."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from dllm.models.auto import get_model
from dllm.utils.args import ModelArguments
from memdlm.relay.channel import RelayChannel
from memdlm.relay.config import RelayConfig


def load_model(
    model_args: ModelArguments | None = None, relay: RelayConfig | None = None, **options: Any
) -> PreTrainedModel | PeftModel:
    """`dllm.models.auto.get_model` for training with a relay: a model that has none gets a new one before LoRA is put
    on it, so that adapters save it too.

    Args:
        model_args, options: as in `get_model`.
        relay: settings of a new relay; one that carries nothing adds none. None: the defaults.

    Raises:
        InputError: those of `get_model` and `RelayChannel.attach`.
    """
    config = RelayConfig() if relay is None else relay

    def prepare(model: PreTrainedModel) -> None:
        if config.carry:
            RelayChannel.attach(model, config)

    return get_model(model_args, prepare=prepare, **options)
