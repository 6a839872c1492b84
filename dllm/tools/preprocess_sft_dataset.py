"""Tokenise fine-tuning rows once and save them, for `--load_preprocessed_data True`.

    python -m dllm.tools.preprocess_sft_dataset --model_name_or_path runs/tiny --dataset_args "builtin:docstrings"

The folder gets what datasets' save_to_disk writes (input_ids, labels, prompt_len; nothing is cut, max_length applies
when the rows are loaded) and preprocess.json with the tokenizer's hash. It appears under its name only when complete.
"""

import pathlib
from dataclasses import dataclass, field

from dllm.data.datasets import load_sft_dataset, parse_dataset_args, spec_of
from dllm.data.preprocessed import default_folder, read_record, write_record
from dllm.data.sft import tokenize_sft_dataset
from dllm.models.auto import load_tokenizer
from dllm.utils.args import DataArguments, ModelArguments
from dllm.utils.folders import new_folder
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError, one_line_errors, parse_args

logger = get_default_logger("dllm.tools.preprocess_sft_dataset")


def _help_of(arguments: type, name: str) -> dict[str, str]:
    return dict(arguments.__dataclass_fields__[name].metadata)


@dataclass
class PreprocessArguments:
    """What to tokenise, with which tokenizer, to where."""

    model_name_or_path: str = field(metadata=_help_of(ModelArguments, "model_name_or_path"))
    dataset_args: str = field(metadata=_help_of(DataArguments, "dataset_args"))
    output_dir: str | None = field(
        default=None,
        metadata={"help": "New folder for the rows. None: data/sft/MODEL/NAME, where training looks for them."},
    )
    num_proc: int | None = field(default=None, metadata=_help_of(DataArguments, "num_proc"))
    mask_prompt_loss: bool = field(default=True, metadata=_help_of(DataArguments, "mask_prompt_loss"))
    trust_remote_code: bool = field(default=False, metadata=_help_of(ModelArguments, "trust_remote_code"))

    def __post_init__(self):
        # The ranges are those of the training script's fields of the same names.
        DataArguments(self.dataset_args, num_proc=self.num_proc)
        self.model_name_or_path = ModelArguments(self.model_name_or_path).model_name_or_path


def _output_folder(args: PreprocessArguments) -> pathlib.Path:
    """The folder to write, which must not exist yet (or be empty)."""
    parts = parse_dataset_args(args.dataset_args)
    if args.output_dir is None and len(parts) > 1:
        raise InputError(f"{args.dataset_args!r} joins {len(parts)} data sets: give their folder with --output_dir")
    folder = (
        default_folder(spec_of(parts[0]), args.model_name_or_path)
        if args.output_dir is None
        else pathlib.Path(args.output_dir)
    )
    if folder.is_file():
        raise InputError(f"--output_dir {folder} is a file: give a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        record = read_record(folder)
        held = "other files" if record is None else f"a data set made from {record['dataset_args']!r}"
        raise InputError(f"{folder} holds {held}: delete it, or give another --output_dir")
    return folder


def preprocess(args: PreprocessArguments) -> pathlib.Path:
    """Tokenise, save, and return the folder.

    Raises:
        InputError: the folder is taken; a data set cannot be read; a row cannot be tokenised (split and row named).
    """
    folder = _output_folder(args)
    tokenizer = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    rows = load_sft_dataset(args.dataset_args, num_proc=args.num_proc)
    tokens = tokenize_sft_dataset(rows, tokenizer, args.mask_prompt_loss, args.num_proc)
    # An interrupted run must leave no half data set that training would take.
    with new_folder(folder, "--output_dir") as partial:
        tokens.save_to_disk(str(partial))
        write_record(partial, tokens, tokenizer, args.dataset_args, args.mask_prompt_loss)
    counts = ", ".join(f"{len(split_rows):,} {split} rows" for split, split_rows in tokens.items())
    logger.info(f"{folder}: {counts}")
    return folder


def main() -> None:
    """The command line."""
    (args,) = parse_args(PreprocessArguments)
    with one_line_errors():
        preprocess(args)


if __name__ == "__main__":
    main()
