"""Pretrain LLaDA or LLaDA-MoE on plain text, from random weights or on from a checkpoint; with or without Parametric
Memory.

    accelerate launch --config_file scripts/accelerate_configs/cpu.yaml examples/llada/pt.py \
        --model_name_or_path runs/tiny --from_scratch True --dataset_args "texts.jsonl[train,test:50]" \
        --max_length 512 --output_dir runs/pretrained --use_cpu True

Rows are column `text` of json, jsonl, csv and parquet files, lines of .txt files, or a Hub data set with such a column.
They are joined, an end-of-text token after each, and cut into rows of max_length; with `--packing True` each text stays
whole, several in one row, and none sees another. `--streaming True` reads them while training. docs/pretraining.md has
the rest. The run ends with the model in OUTPUT_DIR/checkpoint-final.
"""

from dataclasses import dataclass, field
from typing import Any

from dllm import utils
from dllm.core.trainers.fine_tune import fine_tune
from dllm.data.prepare import PretrainingArguments, load_pretraining_rows
from dllm.models.scratch import new_model, refuse_trained_weights
from memdlm import MemDLMTrainer


@dataclass
class ModelArguments(utils.ModelArguments):
    from_scratch: bool = field(
        default=False,
        metadata={"help": "Random weights, drawn from --seed; only config.json and tokenizer of the model are read."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.from_scratch:
            refuse_trained_weights(self)


@dataclass
class TrainingArguments(MemDLMTrainer.MemDLMConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mem_enabled and self.mem_inner_target == "prompt":
            raise utils.InputError(
                "--mem_inner_target prompt has nothing to write from: plain text has no prompt; use response (or "
                "disjoint)"
            )


def load_model(model_args: ModelArguments, **options: Any):
    """A new model, or the one to go on from."""
    if model_args.from_scratch:
        return new_model(model_args, **options)
    return utils.get_model(model_args, **options)


def main() -> None:
    arguments = utils.parse_args(ModelArguments, PretrainingArguments, TrainingArguments)
    fine_tune(MemDLMTrainer, *arguments, load_model=load_model, load_rows=load_pretraining_rows)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
