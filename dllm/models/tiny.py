"""Make a tiny checkpoint of a family: random weights, a byte-level BPE tokenizer, special tokens, chat template.

Run as `python -m dllm.models.tiny --family llada_moe --output DIR [--hidden_size 64 ...]`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from dllm.models import ModelSpec, get_spec, registered_specs

DEFAULT_VOCAB_SIZE = 1024
# Modules of the standard library that the default tokenizer is trained on: code with much prose in it.
DEFAULT_MODULES = (
    "argparse",
    "collections",
    "functools",
    "json.decoder",
    "pathlib",
    "random",
    "statistics",
    "textwrap",
)
# Runs of line breaks, words and signs with the space before them, other runs of spaces. What follows a line break never
# changes where the piece ends, so that the tokens of a chat header do not depend on the text behind it.
PIECES = r"\n+| ?\w+| ?[^\s\w]+|[^\S\n]+"

# Sizes of the tiny model, by family; every other field has its default.
TINY_SIZES: dict[str, dict[str, Any]] = {
    "llada": {
        "d_model": 64,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 4,
        "mlp_hidden_size": 128,
        "max_sequence_length": 4096,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
    },
    "llada_moe": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "expert_intermediate_size": 32,
        "dense_intermediate_size": 128,
        "max_position_embeddings": 4096,
    },
    "llada2_moe": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
    },
    "fast_dllm_v2": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
    },
    "rotary_encoder": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "max_position_embeddings": 4096,
    },
}


def default_text() -> str:
    """Source code of a few modules of the installed Python's standard library."""
    return "\n".join(inspect.getsource(importlib.import_module(name)) for name in DEFAULT_MODULES)


def train_tokenizer(spec: ModelSpec, text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `text`, with the special tokens and the chat template of `spec`.

    Decoding what it encoded gives back any text. It has at most `vocab_size` tokens, fewer where the text is short.

    Raises:
        ValueError: the vocabulary is too small for the 256 bytes and the special tokens.
    """
    smallest = 256 + len(spec.special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: all bytes and the special tokens of {spec.name} need {smallest}"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in spec.special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([text], trainer)
    named = {spec.bos_token, spec.eos_token, spec.pad_token, spec.mask_token}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=spec.bos_token,
        eos_token=spec.eos_token,
        pad_token=spec.pad_token,
        mask_token=spec.mask_token,
        extra_special_tokens=[token for token in spec.special_tokens if token not in named],
        chat_template=spec.chat_template,
        clean_up_tokenization_spaces=False,
    )


def make_tiny_checkpoint(
    path: str | Path,
    family: str = "llada_moe",
    text: str | None = None,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Writes a checkpoint (configuration, safetensors, tokenizer files) with random weights, and returns its folder.

    The same arguments give the same files. The global random state is left alone.

    Args:
        path: folder to write to; it must not hold anything yet.
        family: name of a registered family.
        text: text to train the tokenizer on; None: `default_text()`.
        vocab_size: upper limit of the vocabulary, special tokens included.
        seed: of the weights.
        config_overrides: fields of the family's configuration class.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: unknown family or configuration field; vocabulary too small; a configuration that is not supported.
    """
    folder = Path(path)
    spec = get_spec(family)
    _check_overrides(spec, config_overrides)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something already: choose another output folder or delete it")
    tokenizer = train_tokenizer(spec, default_text() if text is None else text, vocab_size)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "mask_token_id": tokenizer.mask_token_id,
    }
    settings.update(TINY_SIZES.get(family, {}))
    settings.update(config_overrides)
    config = spec.config_class(**settings)
    tokenizer.model_max_length = config.max_position_embeddings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = spec.model_class(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _check_overrides(spec: ModelSpec, overrides: dict[str, Any]) -> None:
    if "vocab_size" in overrides:
        raise ValueError("vocab_size is an argument of its own")
    inherited = {field.name for field in fields(PreTrainedConfig)}
    own = {field.name for field in fields(spec.config_class)} - inherited
    known = own | set(spec.config_class.attribute_map)
    unknown = [name for name in overrides if name not in known]
    if unknown:
        raise ValueError(
            f"{spec.name} has no setting {', '.join(unknown)}: choose from {', '.join(sorted(own - {'vocab_size'}))}"
        )


def _parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """["--hidden_size", "64"] -> {"hidden_size": 64}; values are JSON, or else plain strings."""
    overrides: dict[str, Any] = {}
    names, values = arguments[::2], arguments[1::2]
    if len(names) != len(values) or any(not name.startswith("--") for name in names):
        raise ValueError(f"settings are pairs like `--hidden_size 64`, got: {' '.join(arguments)}")
    for name, value in zip(names, values, strict=True):
        try:
            overrides[name[2:]] = json.loads(value)
        except json.JSONDecodeError:
            overrides[name[2:]] = {"True": True, "False": False, "None": None}.get(value, value)
    return overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dllm.models.tiny",
        description="Make a tiny checkpoint with random weights. Any field of the family's configuration can be given.",
    )
    parser.add_argument("--family", default="llada_moe", help=f"one of {', '.join(s.name for s in registered_specs())}")
    parser.add_argument("--output", required=True, help="folder to write to; must be empty or absent")
    parser.add_argument("--text", help="UTF-8 file to train the tokenizer on (default: some of Python's own source)")
    parser.add_argument("--vocab_size", type=int, default=DEFAULT_VOCAB_SIZE, help="upper limit of the vocabulary")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    options, rest = parser.parse_known_args(arguments)
    try:
        text = None if options.text is None else Path(options.text).read_text(encoding="utf-8")
        overrides = _parse_overrides(rest)
        folder = make_tiny_checkpoint(
            options.output, options.family, text, options.vocab_size, options.seed, **overrides
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote a tiny {options.family} checkpoint to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
