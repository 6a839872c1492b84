"""From a task's generation settings to a sampler's configuration."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from dllm.core.eval.config import coerce
from dllm.utils.parsing import InputError

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings of other decoders at the value that means what is done here anyway.
_NEUTRAL = {"num_beams": 1, "top_p": 1}


def read_gen_kwargs(gen_kwargs: Mapping[str, Any], hints: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """(stop strings, settings that the request gives), from the generation settings of a task and of --gen_kwargs.

    Of several names for the length the first counts, as in lm-eval: max_gen_toks, max_new_tokens, max_tokens,
    max_completion_tokens. do_sample false means temperature 0; where only a temperature is given, it counts.

    Args:
        gen_kwargs: of the request; not changed.
        hints: name -> type of the sampler settings that a request may give.

    Raises:
        InputError: an unknown setting (the known ones are listed), do_sample without a temperature, a wrong type.
    """
    given: dict[str, Any] = {}
    known = ("until", *_LENGTHS, "do_sample", "temperature", *(name for name in hints if name != "temperature"))
    for name, value in gen_kwargs.items():
        if name in _NEUTRAL and value == _NEUTRAL[name]:
            continue
        if name not in known:
            raise InputError(f"unknown generation setting {name}={value!r}; known: {', '.join(known)}")
        if name in hints and name != "temperature" and value is not None:
            given[name] = _typed(name, value, hints[name])
    lengths = [gen_kwargs[name] for name in _LENGTHS if gen_kwargs.get(name) is not None]
    if lengths:
        given["max_new_tokens"] = coerce("max_gen_toks", lengths[0], int)
    temperature = _temperature(gen_kwargs)
    if temperature is not None:
        given["temperature"] = temperature
    return _stop_strings(gen_kwargs.get("until")), given


def _typed(name: str, value: Any, hint: Any) -> Any:
    value = coerce(name, value, hint)
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    allowed = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if allowed and value not in allowed:
        raise InputError(f"{name} is {value!r}: choose one of {', '.join(map(str, allowed))}")
    return value


def _temperature(gen_kwargs: Mapping[str, Any]) -> float | None:
    asked = gen_kwargs.get("temperature")
    temperature = None if asked is None else coerce("temperature", asked, float)
    sampled = gen_kwargs.get("do_sample")
    if sampled is None:
        return temperature
    if not coerce("do_sample", sampled, bool):
        return 0.0
    if not temperature:
        raise InputError("do_sample=True draws at a temperature: give one above 0, or do_sample=False")
    return temperature


def _stop_strings(until: Any) -> list[str]:
    if until is None:
        return []
    if isinstance(until, str):
        return [until]
    if not isinstance(until, (list, tuple)):
        raise InputError(f"until must be a string or a list of strings, got {until!r}")
    return [str(stop) for stop in until]
