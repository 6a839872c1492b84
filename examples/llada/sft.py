"""Fine-tune LLaDA or LLaDA-MoE on instructions, with or without Parametric Memory.

    accelerate launch --config_file scripts/accelerate_configs/cpu.yaml examples/llada/sft.py \
        --model_name_or_path runs/tiny --dataset_args "builtin:docstrings?context=300[train:500,test:50]" \
        --max_length 512 --output_dir runs/first --use_cpu True --mem_enabled True

`--help` lists every flag; the memory's are the fields of memdlm.MemoryConfig with the prefix `mem_`. The run ends with
the model in OUTPUT_DIR/checkpoint-final and, if the data has a test split, with OUTPUT_DIR/eval_results.json.
"""

import os
from dataclasses import dataclass, field

from dllm import data, utils
from dllm.utils.distributed import main_process_first
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
    model_args, data_args, training_args = utils.parse_args(ModelArguments, DataArguments, MemDLMTrainer.MemDLMConfig)
    utils.initial_training_setup(model_args, data_args, training_args)
    tokenizer = utils.get_tokenizer(model_args)
    with main_process_first(per_node=True):
        rows = load_rows(model_args, data_args, tokenizer)
    trainer = MemDLMTrainer(
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
