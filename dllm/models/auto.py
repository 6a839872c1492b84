"""Load a model and its tokenizer: precision, attention kernel, 4-bit, LoRA, adapters. Nothing is replaced in silence.

Whatever cannot be done as asked (weights that are missing, 4-bit without bitsandbytes, an adapter of another base, no
mask token) is an InputError of one line.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dllm.models.backbone import unwrap
from dllm.models.checkpoint import check_weights, find_file, one_line, read_shapes, stored_dtype, weight_files
from dllm.models.layers import set_dropout
from dllm.models.lora import LoraSettings, add_lora, is_adapter, load_adapter, read_adapter_config
from dllm.models.quant import finish_4bit, nf4_config
from dllm.models.spec import ModelSpec, load_config
from dllm.utils.args import ModelArguments, resolve_with_base_env
from dllm.utils.distributed import local_rank
from dllm.utils.parsing import InputError

Prepare = Callable[[PreTrainedModel], object]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LORA_FIELDS = {
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_modules",
    "bias": "bias",
}


def load_model(
    model_name_or_path: str,
    *,
    dtype: str = "auto",
    attn_implementation: str = "sdpa",
    load_in_4bit: bool = False,
    dropout: float | None = None,
    lora: LoraSettings | None = None,
    adapter_model_name_or_path: str | None = None,
    base_model_name_or_path: str | None = None,
    is_trainable: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    prepare: Prepare | None = None,
) -> PreTrainedModel | PeftModel:
    """The model, in eval mode; with LoRA or an adapter, a PeftModel around it. (Trainer sets it to train mode itself.)

    Args:
        model_name_or_path: checkpoint folder or Hub name; or that of a PEFT adapter, loaded together with its base.
        dtype: of the weights: auto (as stored), float32, bfloat16 or float16.
        attn_implementation: attention kernel, a name that transformers knows.
        load_in_4bit: quantise the linears of the layers to NF4 with double quantisation; embeddings, norms, routers and
            head stay as they are (in float32 where LoRA is trained on top, as PEFT does it). Computes in `dtype`.
        dropout: probability of every dropout of the base model, in [0, 1); None: as config.json says.
        lora: add new LoRA matrices; everything else is frozen.
        adapter_model_name_or_path: PEFT adapter to put on the model.
        base_model_name_or_path: base of the adapter that `model_name_or_path` is; None: the one it names.
        is_trainable: go on training the adapter; False freezes it.
        seed: of new LoRA matrices; the global random state is left alone.
        device: where the weights go. None: 4-bit weights on this process's GPU, or the CPU if there is none or
            `accelerate launch` was told to use the CPU; others on the CPU.
        trust_remote_code: run the tokenizer's own code, where the mask token is looked up in it. Code of models
            never runs.
        prepare: called with the model before LoRA is put on it, and not where an adapter is loaded, which brings what
            it was made with; None: nothing is done.

    Raises:
        InputError: see the top of this file.
    """
    base, adapter = _base_and_adapter(model_name_or_path, adapter_model_name_or_path, base_model_name_or_path)
    if adapter is not None and lora is not None:
        raise InputError(
            "LoRA settings and an adapter exclude each other: to go on training the adapter use is_trainable=True"
        )
    if adapter is None and is_trainable:
        raise InputError("is_trainable has no effect without an adapter: drop it")
    config, spec = _read_config(base)
    shapes = read_shapes(weight_files(base))
    check_weights(base, shapes, spec.model_class, config)
    _check_mask_token(base, config, trust_remote_code)
    options: dict[str, Any] = {"dtype": _resolve_dtype(dtype, config, stored_dtype(shapes))}
    if load_in_4bit:
        options["quantization_config"] = nf4_config(options["dtype"], spec)
        device = _own_device() if device is None else device
    if device is not None:
        options["device_map"] = {"": device}
    model = _from_pretrained(base, spec, config, attn_implementation=attn_implementation, **options)
    if load_in_4bit:
        finish_4bit(model)
    if dropout is not None:
        set_dropout(model, dropout)
    if prepare is not None and adapter is None:
        prepare(model)
    if lora is not None:
        return add_lora(model, lora, seed).eval()
    return model if adapter is None else load_adapter(model, adapter, is_trainable)


def find_family(model_name_or_path: str, base_model_name_or_path: str | None = None) -> ModelSpec:
    """The family of a checkpoint, or of the base of an adapter; no weights are read. Arguments as in load_model.

    Raises:
        InputError: no checkpoint, or one of no known family.
    """
    base, _ = _base_and_adapter(model_name_or_path, None, base_model_name_or_path)
    return _read_config(base)[1]


def load_tokenizer(
    model_name_or_path: str,
    *,
    base_model_name_or_path: str | None = None,
    model: PreTrainedModel | PeftModel | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer, with mask and pad token set, padding on the right, and the family's chat template if it has none.

    An adapter's own tokenizer is taken if it has one, else that of its base.

    Args:
        model_name_or_path: checkpoint folder or Hub name, or that of a PEFT adapter.
        base_model_name_or_path: base of the adapter; None: the one in its adapter_config.json.
        model: the loaded model, for a check that it has an embedding for every token; None checks against config.json.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        InputError: no tokenizer files; no mask or pad token; the mask token of tokenizer and config.json differ;
            tokens that the model has no embedding for.
    """
    base, adapter = _base_and_adapter(model_name_or_path, None, base_model_name_or_path)
    config, spec = _read_config(base)
    source = base
    if adapter is not None and find_file(adapter, "tokenizer_config.json") is not None:
        source = adapter
    tokenizer = _read_tokenizer(source, config, trust_remote_code)
    tokenizer.padding_side = "right"
    if tokenizer.chat_template is None:
        tokenizer.chat_template = spec.chat_template
    vocabulary = tokenizer.get_vocab()
    for name in ("bos_token", "eos_token"):
        if tokenizer.special_tokens_map.get(name) is None and spec.__dict__[name] in vocabulary:
            setattr(tokenizer, name, spec.__dict__[name])
    _set_token(tokenizer, "mask", config.mask_token_id, spec.mask_token, source)
    _set_token(tokenizer, "pad", config.pad_token_id, spec.pad_token, source)
    if config.mask_token_id not in (None, tokenizer.mask_token_id):
        raise InputError(
            f"mask token: config.json of {base} says {config.mask_token_id}, the tokenizer of {source} says "
            f"{tokenizer.mask_token_id} ({tokenizer.mask_token}): use the tokenizer that belongs to the model"
        )
    if tokenizer.pad_token_id == tokenizer.mask_token_id:
        raise InputError(f"{source}: {tokenizer.mask_token} is mask and pad token at once: give pad a token of its own")
    # From the weight, which an adapter's wrapper around the embedding has too.
    rows = _embedding_rows(config) if model is None else unwrap(model).backbone.embedding.weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise InputError(
            f"the tokenizer of {source} has token {highest} but the model has {rows} embeddings: use the tokenizer "
            "that belongs to the model, or enlarge the model with resize_token_embeddings"
        )
    return tokenizer


def get_model(
    model_args: ModelArguments | None = None,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    prepare: Prepare | None = None,
    **overrides: Any,
) -> PreTrainedModel | PeftModel:
    """`load_model` with the settings of a ModelArguments, or with `model_name_or_path=...` and others of its fields.

    With an adapter, `lora` True means to go on training it (its adapter_config.json then decides rank and targets).

    Args:
        model_args: the settings; None: all from `overrides`.
        seed, device, prepare: as in load_model.
        overrides: fields of ModelArguments that take other values.

    Raises:
        InputError: as in load_model; a LoRA setting that an adapter overrules.
    """
    args = _arguments(model_args, overrides)
    has_adapter = args.adapter_model_name_or_path is not None or is_adapter(args.model_name_or_path)
    lora = None
    if args.lora and not has_adapter:
        lora = LoraSettings(**{name: args.__dict__[flag] for flag, name in _LORA_FIELDS.items()})
    if args.lora and has_adapter:
        for field in dataclasses.fields(ModelArguments):
            if field.name in _LORA_FIELDS and args.__dict__[field.name] != field.default:
                raise InputError(
                    f"--{field.name} has no effect on an adapter (its adapter_config.json decides): drop it"
                )
    return load_model(
        args.model_name_or_path,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        load_in_4bit=args.load_in_4bit,
        dropout=args.dropout,
        lora=lora,
        adapter_model_name_or_path=args.adapter_model_name_or_path,
        base_model_name_or_path=args.base_model_name_or_path,
        is_trainable=args.lora and has_adapter,
        seed=seed,
        device=device,
        trust_remote_code=args.trust_remote_code,
        prepare=prepare,
    )


def get_tokenizer(
    model_args: ModelArguments | None = None,
    *,
    model: PreTrainedModel | PeftModel | None = None,
    **overrides: Any,
) -> PreTrainedTokenizerBase:
    """`load_tokenizer` with the settings of a ModelArguments: `get_tokenizer(model_args)`.

    Args:
        model_args: the settings; None: all from `overrides`.
        model: the loaded model, to check that it has an embedding for every token.
        overrides: fields of ModelArguments that take other values.

    Raises:
        InputError: as in load_tokenizer.
    """
    args = _arguments(model_args, overrides)
    return load_tokenizer(
        args.model_name_or_path,
        base_model_name_or_path=args.base_model_name_or_path,
        model=model,
        trust_remote_code=args.trust_remote_code,
    )


def _arguments(model_args: ModelArguments | None, overrides: dict[str, Any]) -> ModelArguments:
    known = [field.name for field in dataclasses.fields(ModelArguments)]
    unknown = [name for name in overrides if name not in known]
    if unknown:
        raise InputError(f"unknown setting {', '.join(unknown)}; allowed: {', '.join(known)}")
    if model_args is not None:
        return dataclasses.replace(model_args, **overrides)
    if "model_name_or_path" not in overrides:
        raise InputError("name a model: pass model_args, or model_name_or_path=...")
    return ModelArguments(**overrides)


def _base_and_adapter(model: str, adapter: str | None, base: str | None) -> tuple[str, str | None]:
    """(checkpoint of the base, adapter or None) from the three names that a user can give."""
    model = resolve_with_base_env(str(model), "BASE_MODELS_DIR")
    if is_adapter(model):
        if adapter is not None:
            raise InputError(f"{model} is an adapter already: name one adapter, not also {adapter}")
        named = base if base is not None else read_adapter_config(model).base_model_name_or_path
        if not named:
            raise InputError(f"adapter_config.json of {model} names no base: pass base_model_name_or_path")
        found = resolve_with_base_env(named, "BASE_MODELS_DIR")
        if not _has_config(found):
            raise InputError(
                f"the adapter {model} stands on {found}, which is not to be found: pass base_model_name_or_path"
            )
        return found, model
    if base is not None:
        raise InputError(
            f"base_model_name_or_path has no effect: {model} is a model, not an adapter; give the base as "
            "model_name_or_path and the adapter as adapter_model_name_or_path"
        )
    return model, adapter


def _has_config(name: str) -> bool:
    try:
        return find_file(name, "config.json") is not None
    except InputError:
        return False


def _read_config(name: str) -> tuple[PreTrainedConfig, ModelSpec]:
    if find_file(name, "config.json") is None:
        where = (
            "has no config.json" if os.path.isdir(name) else "is no folder here, and the Hub gave no config.json of it"
        )
        raise InputError(f"{name} {where}: give a checkpoint folder, or a Hub name that can be reached from here")
    try:
        config, spec = load_config(name)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"config.json of {name}: {one_line(error)}") from error
    assert spec is not None  # without trust_remote_code an unknown family is an error
    if config.to_dict().get("quantization_config") is not None:
        raise InputError(f"{name} is quantised already: give the original checkpoint and load_in_4bit")
    return config, spec


def _read_tokenizer(source: str, config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if find_file(source, "tokenizer_config.json") is None and find_file(source, "tokenizer.json") is None:
        raise InputError(f"{source} has no tokenizer (tokenizer_config.json, tokenizer.json): copy it beside the model")
    try:
        # With the configuration at hand, transformers need not guess the family from a model_type that several share.
        return AutoTokenizer.from_pretrained(source, config=config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer of {source} cannot be read: {one_line(error)}") from error


def _set_token(tokenizer: PreTrainedTokenizerBase, kind: str, config_id: int | None, family_token: str, source: str):
    """Names the mask or pad token where the tokenizer does not: by its id in config.json, or as the family does."""
    if tokenizer.special_tokens_map.get(f"{kind}_token") is not None:
        return
    vocabulary = tokenizer.get_vocab()
    by_id = {index: token for token, index in vocabulary.items()}
    token = by_id.get(config_id, "") if config_id is not None else family_token
    if token not in vocabulary:
        wanted = f"{kind}_token_id {config_id} of config.json" if config_id is not None else family_token
        raise InputError(
            f"{source} has no {kind} token: its tokenizer names none and {wanted} is not in its vocabulary; set "
            f"{kind}_token in tokenizer_config.json"
        )
    tokenizer.add_special_tokens({f"{kind}_token": token})


def _check_mask_token(base: str, config: PreTrainedConfig, trust_remote_code: bool) -> None:
    mask: Any = config.mask_token_id
    if mask is None:
        mask = load_tokenizer(base, trust_remote_code=trust_remote_code).mask_token_id
    rows = _embedding_rows(config)
    if not 0 <= mask < rows:
        raise InputError(
            f"mask token {mask} of {base} lies outside its {rows} embeddings: correct mask_token_id in config.json"
        )


def _embedding_rows(config: PreTrainedConfig) -> int:
    return config.to_dict().get("embedding_size") or config.vocab_size


def _resolve_dtype(name: str, config: PreTrainedConfig, stored: torch.dtype) -> torch.dtype:
    if name == "auto":
        chosen = config.dtype if isinstance(config.dtype, torch.dtype) else stored
        return chosen if chosen in DTYPES.values() else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is unknown; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _own_device() -> torch.device:
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def _from_pretrained(base: str, spec: ModelSpec, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    try:
        # Typed Any: with output_loading_info a pair comes back, which the annotation of from_pretrained does not know.
        loaded: Any = spec.model_class.from_pretrained(
            base, config=config, use_safetensors=True, output_loading_info=True, **options
        )
    except (ImportError, ValueError) as error:
        raise InputError(f"{base} cannot be loaded like this: {one_line(error)}") from error
    model, info = loaded
    # The headers were checked before; this catches what went wrong while the tensors were read.
    lost = sorted(info["missing_keys"]) + [str(key[0]) for key in info["mismatched_keys"]] + list(info["error_msgs"])
    if lost:
        raise InputError(f"{base}: transformers did not load {', '.join(lost[:3])}; fetch or copy the checkpoint again")
    return model
