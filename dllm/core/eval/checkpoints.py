"""The model of an evaluation: loading it, and knowing it again."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllm.core.eval.config import BaseEvalConfig
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.stamp import checkpoint_stamp
from dllm.utils.args import resolve_with_base_env
from dllm.utils.parsing import InputError

# Model arguments that concern loading.
_LOADING = (
    "adapter_model_name_or_path",
    "base_model_name_or_path",
    "dtype",
    "attn_implementation",
    "load_in_4bit",
    "trust_remote_code",
)


def load(config: BaseEvalConfig, device: torch.device) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Model (in eval mode, on `device`) and tokenizer.

    Raises:
        InputError: see `dllm.models.auto`.
    """
    options = {name: getattr(config, name) for name in _LOADING}
    model = load_model(config.pretrained, device=device, **options)
    tokenizer = load_tokenizer(
        config.pretrained,
        base_model_name_or_path=config.base_model_name_or_path,
        model=model,
        trust_remote_code=config.trust_remote_code,
    )
    return model, tokenizer


def refuse_loading_arguments(config: BaseEvalConfig) -> None:
    """Nothing, if the arguments say nothing about loading: for a model that is there already.

    Raises:
        InputError: one of them does, or `answers_dir` is given, which knows answers by the checkpoint.
    """
    given = [name for name in (*_LOADING, "answers_dir") if getattr(config, name) != getattr(BaseEvalConfig, name)]
    if given:
        raise InputError(f"{', '.join(given)} has no effect on a model that is loaded already: drop it")


def stamps(config: BaseEvalConfig, base: str | None) -> list[Any]:
    """JSON that changes when checkpoint, adapter or base do (see `checkpoint_stamp`).

    Args:
        config: names checkpoint and adapter.
        base: where the weights below an adapter came from.
    """
    names = [config.pretrained, config.adapter_model_name_or_path, base]
    found = dict.fromkeys(resolve_with_base_env(name, "BASE_MODELS_DIR") for name in names if name)
    return [checkpoint_stamp(name) for name in found]
