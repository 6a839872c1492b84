"""Fine-tune LLaDA or LLaDA-MoE on instructions, with or without Parametric Memory.

    accelerate launch --config_file scripts/accelerate_configs/cpu.yaml examples/llada/sft.py \
        --model_name_or_path runs/tiny --dataset_args "builtin:docstrings?context=300[train:500,test:50]" \
        --max_length 512 --output_dir runs/first --use_cpu True --mem_enabled True

`--help` lists every flag; the memory's are the fields of memdlm.MemoryConfig with the prefix `mem_`. The run ends with
the model in OUTPUT_DIR/checkpoint-final and, if the data has a test split, with OUTPUT_DIR/eval_results.json.
"""

from dataclasses import dataclass, field

from dllm import utils
from dllm.core.trainers.fine_tune import fine_tune
from memdlm import MemDLMTrainer


@dataclass
class ModelArguments(utils.ModelArguments):
    model_name_or_path: str = field(
        default="inclusionAI/LLaDA-MoE-7B-A1B-Base",
        metadata=utils.ModelArguments.__dataclass_fields__["model_name_or_path"].metadata,
    )


@dataclass
class DataArguments(utils.DataArguments):
    dataset_args: str = field(
        default="Yukang/LongAlpaca-12k",
        metadata=utils.DataArguments.__dataclass_fields__["dataset_args"].metadata,
    )


def main() -> None:
    model_args, data_args, training_args = utils.parse_args(ModelArguments, DataArguments, MemDLMTrainer.MemDLMConfig)
    fine_tune(MemDLMTrainer, model_args, data_args, training_args)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
