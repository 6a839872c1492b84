"""Turn a plain Qwen2 checkpoint, which predicts from left to right, into a Fast-dLLM v2 one to be trained from there.

    python -m dllm.tools.convert_ar --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct --output runs/qwen-blocks

The weights stay as they are: at block size 1 the result computes what Qwen2 does. The tokenizer gets the mask token and
the family's end-of-turn token as end and padding; the embedding is enlarged only where it has no row for them. The
folder appears under its name only when complete.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from dllm.models import FAST_DLLM_V2, Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM
from dllm.models.auto import DTYPES
from dllm.models.checkpoint import check_weights, find_file, one_line, read_shapes, stored_dtype, weight_files
from dllm.utils.args import ModelArguments, resolve_with_base_env
from dllm.utils.folders import new_folder
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError, one_line_errors, parse_args
from dllm.utils.tokens import token_id

logger = get_default_logger("dllm.tools.convert_ar")


@dataclass
class ConvertArguments:
    """What to convert, to where."""

    model_name_or_path: str = field(metadata={"help": "Qwen2 checkpoint: a folder or a Hub name."})
    output: str = field(metadata={"help": "New folder for the converted checkpoint; must be empty or absent."})
    block_size: int = field(default=32, metadata={"help": "Positions of a block, at least 1."})
    dtype: str = field(default="auto", metadata=dict(ModelArguments.__dataclass_fields__["dtype"].metadata))

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise InputError(f"--block_size must be at least 1, got {self.block_size}")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise InputError(f"--dtype {self.dtype} is unknown; allowed: auto, {', '.join(DTYPES)}")


def convert(args: ConvertArguments) -> pathlib.Path:
    """Converts, saves, and returns the folder.

    Raises:
        InputError: the folder is taken or cannot be made; no Qwen2 checkpoint, one with settings that the family does
            not have, with missing weights, or without a tokenizer.
    """
    source = resolve_with_base_env(args.model_name_or_path, "BASE_MODELS_DIR")
    qwen = _read_qwen_config(source)
    config = _make_config(source, qwen, args.block_size)
    with new_folder(pathlib.Path(args.output), "--output") as folder:
        model, tokenizer = _convert(source, qwen, config, args.dtype)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    size = model.config.vocab_size
    logger.info(
        f"{args.output}: blocks of {args.block_size}, mask token {model.config.mask_token_id}, {size:,} embeddings "
        f"({size - qwen.vocab_size} new)"
    )
    return pathlib.Path(args.output)


def _convert(
    source: str, qwen: Qwen2Config, config: Fast_dLLM_QwenConfig, dtype: str
) -> tuple[Fast_dLLM_QwenForCausalLM, PreTrainedTokenizerBase]:
    shapes = read_shapes(weight_files(source))
    check_weights(source, shapes, Qwen2ForCausalLM, qwen)
    tokenizer = _make_tokenizer(source)
    model: Any = Fast_dLLM_QwenForCausalLM.from_pretrained(
        source,
        config=config,
        use_safetensors=True,
        dtype=stored_dtype(shapes) if dtype == "auto" else DTYPES[dtype],
    )
    _enlarge(model, max(tokenizer.get_vocab().values()) + 1)
    for kind in ("mask", "eos", "pad"):
        setattr(model.config, f"{kind}_token_id", token_id(tokenizer, f"{kind}_token"))
    return model, tokenizer


def _read_qwen_config(source: str) -> Qwen2Config:
    path = find_file(source, "config.json")
    if path is None:
        raise InputError(f"{source} has no config.json: give the folder or Hub name of a Qwen2 checkpoint")
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:  # no JSON, or no UTF-8
        raise InputError(f"config.json of {source} is damaged ({error}): fetch or copy it again") from error
    if not isinstance(raw, dict):
        raise InputError(f"config.json of {source} holds no settings but a {type(raw).__name__}: copy it again")
    model_type, architectures = raw.get("model_type"), raw.get("architectures") or ["Qwen2ForCausalLM"]
    if model_type != "qwen2" or architectures != ["Qwen2ForCausalLM"]:
        raise InputError(
            f"{source} is no plain Qwen2 language model (model_type {model_type!r}, architectures "
            f"{architectures!r}): only those can be converted"
        )
    if raw.get("quantization_config") is not None:
        raise InputError(f"{source} is quantised already: give the original checkpoint")
    try:
        return Qwen2Config.from_dict(raw)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"config.json of {source}: {one_line(error)}") from error


def _make_tokenizer(source: str) -> PreTrainedTokenizerBase:
    if find_file(source, "tokenizer_config.json") is None and find_file(source, "tokenizer.json") is None:
        raise InputError(f"{source} has no tokenizer (tokenizer_config.json, tokenizer.json): copy it beside the model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer of {source} cannot be read: {one_line(error)}") from error
    spec = FAST_DLLM_V2
    # Those that its vocabulary lacks are added behind it.
    tokenizer.add_special_tokens(
        {"mask_token": spec.mask_token, "eos_token": spec.eos_token, "pad_token": spec.pad_token}
    )
    tokenizer.chat_template = spec.chat_template
    return tokenizer


def _make_config(source: str, qwen: Qwen2Config, block_size: int) -> Fast_dLLM_QwenConfig:
    known = {entry.name for entry in fields(Fast_dLLM_QwenConfig)}  # pyright: ignore[reportArgumentType]
    stored = qwen.to_dict()
    kept = {name: value for name, value in stored.items() if name in known and name not in ("architectures", "dtype")}
    kept.update(rope_parameters=stored["rope_parameters"], bd_size=block_size)
    try:
        return Fast_dLLM_QwenConfig(**kept)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"config.json of {source}: {one_line(error)}") from error


@torch.no_grad()
def _enlarge(model: Fast_dLLM_QwenForCausalLM, num_rows: int) -> None:
    """Gives the embedding and the head `num_rows` rows at least; new ones are the mean of the old: no draws."""
    size = model.config.vocab_size
    if num_rows <= size:
        return
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    # Tied, both are one tensor, and the second assignment changes nothing.
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = table.weight
        weight[size:] = weight[:size].double().mean(dim=0).to(weight.dtype)


def main() -> None:
    """The command line."""
    (args,) = parse_args(ConvertArguments)
    with one_line_errors():
        convert(args)


if __name__ == "__main__":
    main()
