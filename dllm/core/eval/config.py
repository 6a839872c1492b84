"""Model arguments of an evaluation (`--model_args key=value,...`), typed and checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dllm.core.reveal import Remasking
from dllm.core.samplers import BaseSampler, BaseSamplerConfig, MDLMSampler
from dllm.utils.args import DTYPES
from dllm.utils.parsing import InputError

Truncation = Literal["error", "left"]
DEFAULT_MAX_GEN_TOKS = 256  # as in lm-eval's own models
# Flags of lm-eval's own command line, which it hands to the constructor.
_FLAGS = ("batch_size", "max_batch_size", "device")
# Settings that come from tasks as a matter of course: a model argument replaces them without a word.
_FROM_TASKS = ("max_new_tokens", "temperature")


def argument(default: Any, help: str) -> Any:
    """A field of a class of model arguments."""
    return field(default=default, metadata={"help": help})


@dataclass
class BaseEvalConfig:
    """What every evaluation can set; a family of samplers adds its own.

    Raises:
        InputError: a value out of its range.
    """

    sampler_class: ClassVar[type[BaseSampler]]
    # Arguments that a task or --gen_kwargs may give too -> fields of the sampler's configuration.
    sampler_fields: ClassVar[Mapping[str, str]] = {}

    pretrained: str = field(metadata={"help": "Checkpoint folder or Hub name; or that of a PEFT adapter."})
    adapter_model_name_or_path: str | None = argument(None, "PEFT adapter on `pretrained`. None: no adapter.")
    base_model_name_or_path: str | None = argument(
        None, "Base of the adapter that `pretrained` is. None: the one its adapter_config.json names."
    )
    dtype: str = argument("auto", "Weights' type: auto (as stored), float32, bfloat16 or float16.")
    attn_implementation: str = argument("sdpa", "Attention kernel, a name that transformers knows.")
    load_in_4bit: bool = argument(False, "Quantise the base weights to NF4 on loading (needs bitsandbytes).")
    trust_remote_code: bool = argument(False, "Run code that comes with the tokenizer; code of models never runs.")
    max_length: int | None = argument(
        None, "Most tokens of prompt and answer together, at least 2. None: as many as the model's config.json says."
    )
    max_new_tokens: int | None = argument(
        None, "Length of every answer in tokens, at least 1. None: the task's max_gen_toks."
    )
    truncation: Truncation = argument(
        "error", "What becomes of a prompt that is too long: error, or left (its beginning is dropped, and counted)."
    )
    temperature: float | None = argument(None, "Of the Gumbel noise, at least 0. None: the task's.")
    early_stop: bool = argument(
        True, "Stop a row at its first end-of-text or end-of-turn token; its text is the same, with fewer forwards."
    )
    preset: str | None = argument(None, "Published settings by name.")
    seed: int = argument(0, "Of every draw, together with the request: decoding and likelihood.")
    mc_num: int = argument(
        128,
        "Masked states per likelihood, at least 1. A continuation of L tokens with 2^L - 1 <= mc_num states is summed "
        "over all of them instead, which is exact.",
    )
    mc_batch_size: int | None = argument(
        None, "Masked states per forward of a likelihood, at least 1. None: --batch_size."
    )
    check_greedy: bool = argument(
        True, "Find out whether greedy decoding gives the continuation (acc of perplexity tasks); False reports False."
    )
    answers_dir: str | None = argument(
        None, "Folder where answers are kept as they come, for a run that is continued. None: nothing is kept."
    )

    def __post_init__(self) -> None:
        check_least(self, max_length=2, max_new_tokens=1, mc_num=1, mc_batch_size=1, temperature=0)
        check_choices(self)
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}: choose one of {', '.join(DTYPES)}")

    def sampler_config(self, given: Mapping[str, Any]) -> BaseSamplerConfig:
        """The sampler's settings for a request: these arguments before the request before the preset before defaults.

        Args:
            given: what the task and --gen_kwargs say (see `dllm.core.eval.generation.read_gen_kwargs`).

        Raises:
            InputError: an unknown preset; a setting that arguments and request give different values; those of the
                sampler's configuration.
        """
        presets = self.sampler_class.presets
        if self.preset is not None and self.preset not in presets:
            raise InputError(f"preset {self.preset!r} is unknown: choose one of {', '.join(presets)}")
        settings: dict[str, Any] = {"max_new_tokens": DEFAULT_MAX_GEN_TOKS, "seed": self.seed}
        settings.update(presets[self.preset] if self.preset else {})
        settings.update({self.sampler_fields.get(name, name): value for name, value in given.items()})
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("max_new_tokens", *self.sampler_fields):
            value = getattr(self, name)
            if value == defaults[name]:
                continue
            if name in given and name not in _FROM_TASKS and given[name] != value:
                raise InputError(
                    f"{name} is {value} among the model arguments and {given[name]} among the generation settings: "
                    "give it once"
                )
            settings[self.sampler_fields.get(name, name)] = value
        return self.sampler_class.config_class(**{**settings, "early_stop": self.early_stop})

    def check_sampling(self) -> None:
        """Nothing, if the sampler takes these arguments together, at whatever temperature where none is given.

        Raises:
            InputError: see `sampler_config`.
        """
        self.sampler_config({} if self.temperature is not None else {"temperature": 1.0})


@dataclass
class MDLMEvalConfig(BaseEvalConfig):
    """Model arguments of `MDLMEvalHarness`. Where one is None, the task's generation settings, the preset or the
    sampler decide, in this order; the same setting given here and by the task with another value is an error."""

    sampler_class = MDLMSampler
    sampler_fields = {
        "steps": "steps",
        "block_size": "block_size",
        "temperature": "temperature",
        "remasking": "remasking",
        "threshold": "threshold",
        "max_uncertainty": "max_uncertainty",
        "cfg": "cfg_scale",
        "cache": "cache",
        "seed": "seed",
    }

    steps: int | None = argument(None, "Most denoising steps per answer, at least 1. None: one per token.")
    block_size: int | None = argument(
        None, "Positions decoded before the next ones are begun, at least 1. None: the whole answer at once."
    )
    remasking: Remasking | None = argument(None, "Which proposals are committed first.")
    threshold: float | None = argument(None, "Commit every token surer than this as well, in (0, 1].")
    max_uncertainty: float | None = argument(
        None, "Commit also the surest tokens while their 1 - p add up to less than this, above 0; not with threshold."
    )
    cfg: float | None = argument(None, "Scale of classifier-free guidance, at least 0; acts on likelihoods too.")
    cache: Literal["none", "prefix", "dual"] | None = argument(None, "Approximate reuse of keys and values.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, cfg=0)  # the sampler has another name for it
        self.check_sampling()


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
    wanted = "a whole number" if kind is int else "a finite number"
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise InputError(f"{name} must be {wanted}, got {value!r}")
    return int(number) if kind is int else number


def check_least(config: Any, **least: float) -> None:
    """Nothing, if every field named is None or at least what is given for it.

    Raises:
        InputError: a field that is less.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise InputError(f"{name} must be at least {bound}, got {value}")


def check_choices(config: Any) -> None:
    """Nothing, if every field with a Literal type holds one of its values.

    Raises:
        InputError: another value; the allowed ones are listed.
    """
    hints = get_type_hints(type(config))
    for name in (f.name for f in dataclasses.fields(config)):
        kinds = get_args(hints[name]) if get_origin(hints[name]) in (Union, types.UnionType) else (hints[name],)
        allowed = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        value = getattr(config, name)
        if allowed and value not in allowed and not (value is None and type(None) in kinds):
            raise InputError(f"{name} is {value!r}: choose one of {', '.join(map(str, allowed))}")


def read_batch_size(batch_size: int | str, max_batch_size: int | None) -> int:
    """Rows per forward, from the flags of lm-eval.

    Raises:
        InputError: no whole number of at least 1, or a search for one.
    """
    if max_batch_size is not None:
        raise InputError("--max_batch_size belongs to a search that is not made: drop it and give --batch_size")
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise InputError(f"--batch_size {batch_size}: give a whole number of at least 1 (there is no automatic search)")
    return int(batch_size)
