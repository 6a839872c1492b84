"""Fine-tune LLaDA2.1 (or LLaDA2.0) on instructions, with token editing, with or without Parametric Memory.

    accelerate launch --config_file scripts/accelerate_configs/cpu.yaml examples/llada21/sft.py \
        --training_objective bd3lm --model_name_or_path runs/tiny2 --dataset_args "builtin:docstrings[train,test:50]" \
        --max_length 512 --output_dir runs/first --use_cpu True

`--training_objective mdlm` (the default, as published for MemDLM) denoises the whole sequence under full attention,
`bd3lm` each block given the clean blocks before it, as the model decodes. `--help` lists the flags of the objective
that is named beside it; the memory's have the prefix `mem_`. `--edit_ratio 0` leaves editing out. The run ends with the
model in OUTPUT_DIR/checkpoint-final and, if the data has a test split, with OUTPUT_DIR/eval_results.json.
"""

import argparse
import os
import sys
from dataclasses import dataclass, field
from typing import Any

from dllm import data, utils
from dllm.core.editing import EditSettings
from dllm.utils.distributed import main_process_first
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


def find_objective(arguments: list[str]) -> tuple[type[MemDLMTrainer], type]:
    """The trainer that `--training_objective` names, and what the other flags are read into."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--training_objective", nargs="?", default=ObjectiveArguments.training_objective)
    name = parser.parse_known_args(arguments)[0].training_objective
    if name not in OBJECTIVES:
        raise utils.InputError(f"--training_objective {name} is unknown; allowed: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def load_rows(model_args, data_args, tokenizer):
    """The token rows that the data arguments name, cut to max_length, by split."""
    rows = data.load_sft_dataset(
        data_args.dataset_args,
        data_args.load_preprocessed_data,
        model_name_or_path=model_args.model_name_or_path,
        tokenizer=tokenizer,
        mask_prompt_loss=data_args.mask_prompt_loss,
        num_proc=data_args.num_proc,
    )
    if not data_args.load_preprocessed_data:
        rows = data.tokenize_sft_dataset(rows, tokenizer, data_args.mask_prompt_loss, data_args.num_proc)
    return data.post_process_dataset(rows, data_args)


def main() -> None:
    trainer_class, config = find_objective(sys.argv[1:])
    model_args, data_args, training_args, _ = utils.parse_args(
        ModelArguments, DataArguments, config, ObjectiveArguments
    )
    utils.initial_training_setup(model_args, data_args, training_args)
    tokenizer = utils.get_tokenizer(model_args)
    with main_process_first(per_node=True):
        rows = load_rows(model_args, data_args, tokenizer)
    trainer = trainer_class(
        model=utils.get_model(model_args, seed=training_args.seed, device=training_args.device),
        args=training_args,
        processing_class=tokenizer,
        train_dataset=rows["train"],
        eval_dataset=rows.get("test"),
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.save_model(os.path.join(training_args.output_dir, "checkpoint-final"))
    if "test" in rows:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
