"""What the fine-tuning scripts of examples/ share: flags, an objective by name, the run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import field, make_dataclass
from typing import Any

from dllm.core.trainers.fine_tune import find_choice, fine_tune
from dllm.core.trainers.mdlm import MDLMConfig, MDLMTrainer
from dllm.models.auto import get_model
from dllm.utils.args import DataArguments, ModelArguments, with_defaults
from dllm.utils.parsing import parse_args
from memdlm.relay import RelayTrainer
from memdlm.relay import load_model as load_relay_model

Objectives = Mapping[str, tuple[type[MDLMTrainer], type[MDLMConfig]]]


def run_script(objectives: Objectives, default: str, *, model: str, data: str) -> None:
    """Trains as the command line says; the flags are those of the objective that `--training_objective` names.

    Args:
        objectives: name -> (trainer, its settings).
        default: the objective where none is named.
        model, data: `--model_name_or_path` and `--dataset_args` where they are not given.

    Raises:
        InputError: an unknown objective, or those of `fine_tune`.
    """
    trainer_class, config = find_choice(sys.argv[1:], "training_objective", objectives, default)
    shown = field(default=default, metadata={"help": f"Objective, one of {', '.join(objectives)}."})
    model_args, data_args, training_args, _ = parse_args(
        with_defaults(ModelArguments, model_name_or_path=model),
        with_defaults(DataArguments, dataset_args=data),
        config,
        make_dataclass("ObjectiveArguments", [("training_objective", str, shown)]),
    )
    load_model: Any = get_model
    if issubclass(trainer_class, RelayTrainer):
        load_model = functools.partial(load_relay_model, relay=training_args.relay())
    fine_tune(trainer_class, model_args, data_args, training_args, load_model)
