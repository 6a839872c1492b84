"""A fine-tuning run from settings to checkpoint: what the training scripts of examples/ share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from dllm.core.packing import check_packing
from dllm.core.trainers.engines import will_shard
from dllm.core.trainers.mdlm import MDLMConfig, MDLMTrainer
from dllm.core.trainers.rows import refuse_rows
from dllm.data.collators import PaddingCollator
from dllm.data.prepare import RowSets, load_sft_rows
from dllm.models.auto import get_model, get_tokenizer
from dllm.utils.args import DataArguments, ModelArguments, initial_training_setup
from dllm.utils.distributed import main_process_first
from dllm.utils.parsing import InputError
from dllm.utils.tokens import token_id

Choice = TypeVar("Choice")


def find_choice(arguments: Sequence[str], flag: str, choices: Mapping[str, Choice], default: str) -> Choice:
    """The entry of `choices` that `--flag NAME` names among command-line arguments, `default` where it is not given.

    For a flag that has to be read before the others, since it decides which others there are.

    Raises:
        InputError: no such entry; they are listed.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{flag}", nargs="?", default=default)
    name = vars(parser.parse_known_args(arguments)[0])[flag]
    if name not in choices:
        raise InputError(f"--{flag} {name} is unknown; allowed: {', '.join(choices)}")
    return choices[name]


def fine_tune(
    trainer_class: type[MDLMTrainer],
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: MDLMConfig,
    load_model: Callable[..., Any] = get_model,
    load_rows: Callable[..., RowSets] = load_sft_rows,
) -> MDLMTrainer:
    """Trains and returns the trainer.

    The run ends with the model in OUTPUT_DIR/checkpoint-final, its metrics beside it, and if the data have a test split
    with OUTPUT_DIR/eval_results.json. Last comes the upload, with `push_to_hub`.

    Args:
        trainer_class: what trains.
        model_args, data_args, training_args: all settings.
        load_model: called as load_model(model_args, seed=..., device=...).
        load_rows: called as load_rows(data_args, tokenizer, model_name_or_path, seed).

    Raises:
        InputError: a setting, file or data set that cannot be used; a checkpoint that cannot be written.
        SystemExit: code 75 after SIGTERM or SIGUSR1, with a checkpoint to go on from (`SaveOnSignal`).
    """
    refuse_rows(trainer_class, training_args, streamed=data_args.streaming, packed=data_args.packing)
    initial_training_setup(model_args, data_args, training_args)
    if data_args.packing:
        check_packing(model_args.attn_implementation, training_args.device)
    tokenizer = get_tokenizer(model_args)
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    with main_process_first(per_node=True):
        rows = load_rows(data_args, tokenizer, model_args.model_name_or_path, seed)
    if "train" not in rows:
        raise InputError(f"{data_args.dataset_args!r} names no train rows: name some")
    padding: dict[str, Any] = {}
    if data_args.hides_padding:
        pad = PaddingCollator(token_id(tokenizer, "pad_token"), train_on_padding=False, hide_padding=True)
        padding = {"data_collator": pad}
    trainer = trainer_class(
        model=load_model(
            model_args, seed=training_args.seed, device=None if will_shard(training_args) else training_args.device
        ),
        args=training_args,
        processing_class=tokenizer,
        train_dataset=rows["train"],
        eval_dataset=rows.get("test"),
        **padding,
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    with trainer.writing_whole(os.path.join(str(training_args.output_dir), "checkpoint-final")) as folder:
        trainer.save_model(folder, _internal_call=True)  # without the upload, which is of the whole output folder
    if "test" in rows:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.push_to_hub:
        trainer.push_to_hub()  # last: nothing of the run is lost where the Hub cannot be reached
    return trainer
