"""Look at a checkpoint's weight files before memory is spent: are they all there, whole, and those of this model?"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from dllm.utils.parsing import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MOST_NAMES = 3  # names in one message


def find_file(model_name_or_path: str, filename: str) -> pathlib.Path | None:
    """Path of a file in a folder or (fetched, or from the cache) in a Hub repository; None if it is not to be had.

    Raises:
        InputError: there is no such folder, and it can be no Hub name or the Hub refuses it.
    """
    folder = pathlib.Path(model_name_or_path)
    if folder.is_dir():
        return folder / filename if (folder / filename).is_file() else None
    return _find_on_hub(model_name_or_path, filename)


@functools.lru_cache(maxsize=256)  # without network every question takes the Hub client half a minute of retries
def _find_on_hub(name: str, filename: str) -> pathlib.Path | None:
    try:
        found = cached_file(name, filename, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{name} is no folder here and could not be fetched from the Hub: give a checkpoint folder, or a Hub "
            f"name that can be reached from here ({reason})"
        ) from error
    return None if found is None else pathlib.Path(found)


def weight_files(model_name_or_path: str) -> list[pathlib.Path]:
    """The safetensors files of a checkpoint, in order of name.

    Raises:
        InputError: there are none, the index cannot be read, or a file that it lists is missing.
    """
    single = find_file(model_name_or_path, SINGLE_FILE)
    if single is not None:
        return [single]
    index = find_file(model_name_or_path, INDEX_FILE)
    if index is None:
        raise InputError(
            f"{model_name_or_path} holds neither {SINGLE_FILE} nor {INDEX_FILE}: give a checkpoint with safetensors "
            "weights (others must be converted first)"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError) as error:
        raise InputError(f"{index} is damaged ({error}): fetch or copy it again") from error
    files = [(name, find_file(model_name_or_path, name)) for name in names]
    missing = [name for name, path in files if path is None]
    if missing:
        raise InputError(
            f"{model_name_or_path} lacks {some_of(missing)}, named in {INDEX_FILE}: fetch or copy the missing files"
        )
    return [path for _, path in files if path is not None]


def read_shapes(files: Sequence[pathlib.Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, type as safetensors spells it) of every tensor; only the headers are read.

    Raises:
        InputError: a file is cut short, empty or no safetensors file.
    """
    found = {}
    for file in files:
        try:
            found.update(_read_header(file))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is cut short or damaged ({error}): fetch or copy it again") from error
    return found


def _read_header(file: pathlib.Path) -> dict[str, tuple[tuple[int, ...], str]]:
    with safe_open(file, framework="pt") as tensors:
        views = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (a handle, not a mapping)
        return {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}


def stored_dtype(shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> torch.dtype:
    """Floating type of the largest tensor, float32 if none has one that a model can run in."""
    floating = [(torch.Size(shape).numel(), kind) for shape, kind in shapes.values() if kind in _DTYPES]
    return _DTYPES[max(floating)[1]] if floating else torch.float32


def check_weights(
    model_name_or_path: str,
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
) -> None:
    """Nothing, if the checkpoint holds exactly the tensors of the model: random weights would go unnoticed.

    Raises:
        InputError: tensors are missing, superfluous or of another shape; the first few are named.
    """
    with torch.device("meta"):
        model = model_class(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Fields of a tied weight share one tensor; files hold it once.
    tied = set(model.all_tied_weights_keys)
    missing = sorted(set(wanted) - set(shapes) - tied)
    # Tables of rotary frequencies, which some checkpoints carry, follow from the configuration.
    unexpected = sorted(name for name in set(shapes) - set(wanted) if not name.endswith(".inv_freq"))
    different = [
        f"{name} {list(shapes[name][0])} (the configuration asks for {list(shape)})"
        for name, shape in sorted(wanted.items())
        if name in shapes and shapes[name][0] != shape
    ]
    problems = [f"lacks {some_of(missing)}"] if missing else []
    problems += [f"has {some_of(unexpected)} too much"] if unexpected else []
    problems += [f"has another shape for {some_of(different)}"] if different else []
    if problems:
        raise InputError(
            f"the weights of {model_name_or_path} are not those of a {model_class.__name__} with its config.json: it "
            f"{'; it '.join(problems)}; give the checkpoint and the config.json that belong together"
        )


def some_of(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def one_line(error: Exception) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split())
