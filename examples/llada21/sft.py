"""Fine-tune LLaDA2.1 (or LLaDA2.0) on instructions, with token editing, with or without Parametric Memory.

    accelerate launch --config_file scripts/accelerate_configs/cpu.yaml examples/llada21/sft.py \
        --training_objective bd3lm --model_name_or_path runs/tiny2 --dataset_args "builtin:docstrings[train,test:50]" \
        --max_length 512 --output_dir runs/first --use_cpu True

`--training_objective mdlm` (the default, as published for MemDLM) denoises the whole sequence under full attention,
`bd3lm` each block given the clean blocks before it, as the model decodes. `--help` lists the flags of the objective
that is named beside it; the memory's have the prefix `mem_`. `--edit_ratio 0` leaves editing out. The run ends with the
model in OUTPUT_DIR/checkpoint-final and, if the data has a test split, with OUTPUT_DIR/eval_results.json.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from dllm import utils
from dllm.core.editing import EditSettings
from dllm.core.trainers.fine_tune import find_choice, fine_tune
from memdlm import MemBD3LMTrainer, MemDLMTrainer


@dataclass
class ModelArguments(utils.ModelArguments):
    model_name_or_path: str = field(
        default="inclusionAI/LLaDA2.1-mini",
        metadata=utils.ModelArguments.__dataclass_fields__["model_name_or_path"].metadata,
    )


@dataclass
class DataArguments(utils.DataArguments):
    dataset_args: str = field(
        default="Yukang/LongAlpaca-12k",
        metadata=utils.DataArguments.__dataclass_fields__["dataset_args"].metadata,
    )


def _edit_ratio() -> Any:
    return field(default=0.1, metadata=EditSettings.__dataclass_fields__["edit_ratio"].metadata)


@dataclass
class MDLMArguments(MemDLMTrainer.MemDLMConfig):
    edit_ratio: float = _edit_ratio()  # LLaDA2.1 edits, and should go on doing so


@dataclass
class BD3LMArguments(MemBD3LMTrainer.MemDLMConfig):
    edit_ratio: float = _edit_ratio()


OBJECTIVES = {"mdlm": (MemDLMTrainer, MDLMArguments), "bd3lm": (MemBD3LMTrainer, BD3LMArguments)}


@dataclass
class ObjectiveArguments:
    training_objective: str = field(default="mdlm", metadata={"help": f"Objective, one of {', '.join(OBJECTIVES)}."})


def main() -> None:
    trainer_class, config = find_choice(
        sys.argv[1:], "training_objective", OBJECTIVES, ObjectiveArguments.training_objective
    )
    model_args, data_args, training_args, _ = utils.parse_args(
        ModelArguments, DataArguments, config, ObjectiveArguments
    )
    fine_tune(trainer_class, model_args, data_args, training_args)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
