"""A model with new random weights, for pretraining: architecture from a config.json, nothing else."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from dllm.models.auto import DTYPES, find_family
from dllm.models.layers import set_dropout
from dllm.models.spec import load_config
from dllm.utils.args import ModelArguments
from dllm.utils.parsing import InputError


def refuse_trained_weights(model_args: ModelArguments) -> None:
    """Nothing, if the settings suit new weights.

    Raises:
        InputError: settings for weights that are there already (4-bit, LoRA, adapters).
    """
    for name in ("load_in_4bit", "lora", "adapter_model_name_or_path", "base_model_name_or_path"):
        if getattr(model_args, name):
            raise InputError(f"--{name} needs weights that were trained before: drop it, or --from_scratch")


def new_model(
    model_args: ModelArguments, *, seed: int = 0, device: str | torch.device | None = None
) -> PreTrainedModel:
    """A model of the family and size that `config.json` names, with weights drawn from `seed`, in eval mode.

    The global random state is left alone. The weights are float32 unless `dtype` says otherwise: what config.json says
    of it is about a trained checkpoint. Under ZeRO-3 every weight is split as soon as it is made (`zero.Init`), which
    changes the draws: the same seed gives other weights there than in one process.

    Args:
        model_args: model_name_or_path (a folder or Hub name with a config.json; weights are not read), dtype,
            attn_implementation and dropout.
        seed: of the weights: the same on every process.
        device: where they go; None: the CPU.

    Raises:
        InputError: no such config.json; see `refuse_trained_weights`.
    """
    refuse_trained_weights(model_args)
    spec = find_family(model_args.model_name_or_path)
    config, _ = load_config(model_args.model_name_or_path)
    dtype = torch.float32 if model_args.dtype == "auto" else DTYPES[model_args.dtype]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = spec.model_class._from_config(config, attn_implementation=model_args.attn_implementation, dtype=dtype)
    if model_args.dropout is not None:
        set_dropout(model, model_args.dropout)
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]
