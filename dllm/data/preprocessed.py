"""Token rows on disk: where they lie, what they were made with, and whether they fit the tokenizer in use."""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from dllm.utils.parsing import InputError

RECORD_NAME = "preprocess.json"
TOKEN_COLUMNS = ("input_ids", "labels", "prompt_len")


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tokenizer_record(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Name of the tokenizer and SHA-256 of its vocabulary (token -> id) and of its chat template."""
    return {
        "name_or_path": str(tokenizer.name_or_path),
        "vocabulary": _sha256(tokenizer.get_vocab()),
        "chat_template": _sha256(tokenizer.chat_template),
    }


def write_record(
    folder: pathlib.Path,
    dataset: datasets.DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    dataset_args: str,
    mask_prompt_loss: bool,
) -> None:
    """Write preprocess.json beside the rows: tokenizer, dataset_args, mask_prompt_loss, rows and tokens per split."""
    record = {
        "dataset_args": dataset_args,
        "mask_prompt_loss": mask_prompt_loss,
        "tokenizer": tokenizer_record(tokenizer),
        "rows": {split: len(rows) for split, rows in dataset.items()},
    }
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")


def read_record(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The folder's preprocess.json, or None where there is none (rows made by another program).

    Raises:
        InputError: the file is there but broken.
    """
    path = pathlib.Path(folder) / RECORD_NAME
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is broken ({error}): delete {folder} and preprocess again") from None


def check_preprocessed(
    folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase, mask_prompt_loss: bool | None = None
) -> None:
    """Return if the folder's rows were made with this tokenizer and loss mask; otherwise raise.

    Args:
        folder: made by dllm.tools.preprocess_sft_dataset.
        tokenizer: the one that training uses; vocabulary and chat template are compared by hash.
        mask_prompt_loss: what training asks for; None: not compared.

    Raises:
        InputError: names what differs, or that the folder has no record to compare with.
    """
    record = read_record(folder)
    if record is None:
        raise InputError(f"{folder} has no {RECORD_NAME}, so its tokenizer is unknown: preprocess it again")
    used = tokenizer_record(tokenizer)
    for part in ("vocabulary", "chat_template"):
        if record["tokenizer"][part] != used[part]:
            raise InputError(
                f"{folder} was tokenised with {record['tokenizer']['name_or_path']!r}, whose {part.replace('_', ' ')} "
                f"differs from that of {used['name_or_path']!r}: preprocess again into another --output_dir"
            )
    if mask_prompt_loss is not None and record["mask_prompt_loss"] != mask_prompt_loss:
        raise InputError(
            f"{folder} was made with --mask_prompt_loss {record['mask_prompt_loss']}, not {mask_prompt_loss}: "
            "preprocess again into another --output_dir, or change the flag"
        )


def folder_name(name: str) -> str:
    """Relative folder of a data set's token rows: a Hub name stays (org/name), a file gives its name, no suffix."""
    if os.path.exists(name):
        path = pathlib.Path(name).resolve()
        return path.name.split(".")[0] if path.is_file() else path.name
    return re.sub(r"[^\w./-]+", "_", name).lstrip("/.")


def default_folder(name: str, model_name_or_path: str) -> pathlib.Path:
    """data/sft/MODEL/NAME, MODEL being the last part of the model's name or path."""
    return pathlib.Path("data/sft", pathlib.Path(model_name_or_path).name, folder_name(name))


def is_saved_dataset(folder: pathlib.Path) -> bool:
    """True for a folder that datasets' save_to_disk has written."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def find_preprocessed(name: str, model_name_or_path: str | None) -> pathlib.Path:
    """The folder that holds the token rows of a data set.

    Tried in this order: the name as a path; the name under the environment variable BASE_DATASETS_DIR;
    data/sft/MODEL/NAME.

    Raises:
        InputError: nothing there; the message is the command that makes it.
    """
    base = os.environ.get("BASE_DATASETS_DIR", "")
    candidates = [pathlib.Path(name)]
    candidates += [pathlib.Path(base, part) for part in dict.fromkeys((name, folder_name(name))) if base]
    candidates += [default_folder(name, model_name_or_path)] if model_name_or_path else []
    for candidate in candidates:
        if is_saved_dataset(candidate):
            return candidate
    model = model_name_or_path or "MODEL"
    tried = ", ".join(str(candidate) for candidate in candidates)
    raise InputError(
        f"no preprocessed data for {name!r} (looked in {tried}); make it with: python -m "
        f'dllm.tools.preprocess_sft_dataset --model_name_or_path {model} --dataset_args "{name}" '
        f"--output_dir {default_folder(name, model)}"
    )


def by_name(splits: Mapping[Any, Any]) -> dict[str, Any]:
    """The splits under plain text names (datasets types them as str or NamedSplit)."""
    return {str(split): rows for split, rows in splits.items()}


def load_saved(folder: pathlib.Path) -> datasets.DatasetDict:
    """What save_to_disk wrote there; a single split becomes `train`.

    Raises:
        InputError: files are missing or broken.
    """
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder} cannot be read ({reason}): delete it and make it again") from None
    return loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict({"train": loaded})
