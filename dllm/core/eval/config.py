"""Model arguments of an evaluation (`--model_args key=value,...`), typed and checked."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dllm.core.reveal import Remasking
from dllm.core.samplers import mdlm
from dllm.utils.args import DTYPES
from dllm.utils.parsing import InputError

Truncation = Literal["error", "left"]
# Flags of lm-eval's own command line, which it hands to the constructor.
_FLAGS = ("batch_size", "max_batch_size", "device")


def _argument(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class BaseEvalConfig:
    """What every evaluation can set.

    Raises:
        InputError: a value out of its range.
    """

    pretrained: str = field(metadata={"help": "Checkpoint folder or Hub name; or that of a PEFT adapter."})
    adapter_model_name_or_path: str | None = _argument(None, "PEFT adapter on `pretrained`. None: no adapter.")
    base_model_name_or_path: str | None = _argument(
        None, "Base of the adapter that `pretrained` is. None: the one its adapter_config.json names."
    )
    dtype: str = _argument("auto", "Weights' type: auto (as stored), float32, bfloat16 or float16.")
    attn_implementation: str = _argument("sdpa", "Attention kernel, a name that transformers knows.")
    load_in_4bit: bool = _argument(False, "Quantise the base weights to NF4 on loading (needs bitsandbytes).")
    trust_remote_code: bool = _argument(False, "Run code that comes with the tokenizer; code of models never runs.")
    max_length: int | None = _argument(
        None, "Most tokens of prompt and answer together, at least 2. None: as many as the model's config.json says."
    )
    max_new_tokens: int | None = _argument(
        None, "Length of every answer in tokens, at least 1. None: the task's max_gen_toks."
    )
    truncation: Truncation = _argument(
        "error", "What becomes of a prompt that is too long: error, or left (its beginning is dropped, and counted)."
    )
    seed: int = _argument(0, "Of every draw, together with the request: decoding and likelihood.")
    mc_num: int = _argument(
        128,
        "Masked states per likelihood, at least 1. A continuation of L tokens with 2^L - 1 <= mc_num states is summed "
        "over all of them instead, which is exact.",
    )
    mc_batch_size: int | None = _argument(
        None, "Masked states per forward of a likelihood, at least 1. None: --batch_size."
    )
    check_greedy: bool = _argument(
        True, "Find out whether greedy decoding gives the continuation (acc of perplexity tasks); False reports False."
    )
    answers_dir: str | None = _argument(
        None, "Folder where answers are kept as they come, for a run that is continued. None: nothing is kept."
    )

    def __post_init__(self) -> None:
        for name, least in (("max_length", 2), ("max_new_tokens", 1), ("mc_num", 1), ("mc_batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        check_choices(self)
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}: choose one of {', '.join(DTYPES)}")


@dataclass
class MDLMEvalConfig(BaseEvalConfig):
    """Model arguments of `MDLMEvalHarness`. Where one is None, the task's generation settings, the preset or the
    sampler decide, in this order; the same setting given here and by the task with another value is an error."""

    steps: int | None = _argument(None, "Most denoising steps per answer, at least 1. None: one per token.")
    block_size: int | None = _argument(
        None, "Positions decoded before the next ones are begun, at least 1. None: the whole answer at once."
    )
    temperature: float | None = _argument(None, "Of the Gumbel noise, at least 0. None: the task's.")
    remasking: Remasking | None = _argument(None, "Which proposals are committed first.")
    threshold: float | None = _argument(None, "Commit every token surer than this as well, in (0, 1].")
    cfg: float | None = _argument(None, "Scale of classifier-free guidance, at least 0; acts on likelihoods too.")
    cache: Literal["none", "prefix", "dual"] | None = _argument(None, "Approximate reuse of keys and values.")
    early_stop: bool = _argument(
        True, "Stop a row at its first end-of-text or end-of-turn token; its text is the same, with fewer forwards."
    )
    preset: str | None = _argument(None, "Published settings by name.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("steps", 1), ("block_size", 1), ("temperature", 0), ("cfg", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise InputError(f"{name} must be at least {least} and finite, got {value}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise InputError(f"threshold must be in (0, 1], got {self.threshold}")
        if self.preset is not None and self.preset not in mdlm.MDLM_PRESETS:
            raise InputError(f"preset {self.preset!r} is unknown: choose one of {', '.join(mdlm.MDLM_PRESETS)}")


Config = TypeVar("Config", bound=BaseEvalConfig)


def parse_model_args(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The configuration with `values`, each brought to the type of its field.

    lm-eval types what stands on the command line by its looks: a whole number may arrive as a float, a folder whose
    name is a number as an int, a list as a list.

    Raises:
        InputError: an unknown key (the known ones are listed), a value of another type or out of range, no model.
    """
    known = [f.name for f in dataclasses.fields(config_class)]
    for name in values:
        if name in _FLAGS:
            raise InputError(f"{name} is no model argument but a flag: --{name} {values[name]}")
        if name not in known:
            closest = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {closest[0]}?)" if closest else ""
            raise InputError(f"unknown model argument {name}{hint}; known: {', '.join(known)}")
    if "pretrained" not in values:
        raise InputError("name a model: --model_args pretrained=FOLDER_OR_HUB_NAME")
    hints = get_type_hints(config_class)
    return config_class(**{name: coerce(name, value, hints[name]) for name, value in values.items()})


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` says: bool, int, float, str, a Literal, or one of them or None.

    Raises:
        InputError: it cannot be read as that.
    """
    optional = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
    if optional:
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        (hint,) = [kind for kind in get_args(hint) if kind is not type(None)]
    if get_origin(hint) is Literal:
        return str(value)  # checked with the names of the allowed ones in __post_init__
    if hint is bool:
        spelled = {"true": True, "false": False}.get(str(value).lower())
        if spelled is None:
            raise InputError(f"{name} must be true or false, got {value!r}")
        return spelled
    if hint in (int, float):
        return _number(name, value, hint)
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if value is None:
        raise InputError(f"{name} has no value: give one or drop it")
    return str(value)


def _number(name: str, value: Any, kind: type[int] | type[float]) -> int | float:
    wanted = "a whole number" if kind is int else "a number"
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if number != number or (kind is int and not number.is_integer()):
        raise InputError(f"{name} must be {wanted}, got {value!r}")
    return int(number) if kind is int else number


def check_choices(config: Any) -> None:
    """Nothing, if every field with a Literal type holds one of its values.

    Raises:
        InputError: another value; the allowed ones are listed.
    """
    for name, hint in get_type_hints(type(config)).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        allowed = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        value = getattr(config, name)
        if allowed and value not in allowed and not (value is None and type(None) in kinds):
            raise InputError(f"{name} is {value!r}: choose one of {', '.join(map(str, allowed))}")
