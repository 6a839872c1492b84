"""The one parameter group that Relay adds to a model: a LayerNorm under the backbone, and its keys in config.json.

A checkpoint that was trained with it has `relay_layer_norm.{weight,bias}` under the backbone and `use_relay: true` in
its configuration, so that it is built, loaded and saved like every other part. What is done with it is in
memdlm.relay; without that nothing is carried and the parameters stand idle. A PEFT adapter has the norm among its
`modules_to_save`, and the keys in a file beside it.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dllm.utils.distributed import is_main_process
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError

logger = get_default_logger(__name__)

RELAY_NORM = "relay_layer_norm"  # name of the module under the backbone
RELAY_FILE = "relay_config.json"  # beside an adapter: the keys that a full checkpoint has in config.json
PREFIX = "relay_"  # of the keys in config.json
# Names that earlier checkpoints of the published code used.
FORMER_KEYS = {"use_loopholing": "use_relay", "loophole_layer": "relay_layer"}

# What was said of models whose relay is off.
_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()

Gate = Literal["zero", "default"]
Positions = Literal["mask", "all"]
FirstState = Literal["zeros", "none"]
ShiftWithin = Literal["block", "row"]


@dataclass(frozen=True)
class RelayKeys:
    """What config.json says of a relay: each field with the prefix `relay_`. Defaults hold where a file has no such
    key: the released checkpoints have `use_relay` and `relay_layer` alone.

    Raises:
        ValueError: another value than those below.
    """

    layer: int = -1  # where the state is read: -1 after the final norm, i the output of layer i
    positions: Positions = "mask"  # where it is added: at mask tokens, or everywhere
    first_state: FirstState = "zeros"  # what the first forward gets: R(0), or nothing
    shift_within: ShiftWithin = "block"  # with a logit shift: the first position of each block, or of the row, keeps
    # its own state
    gate: Gate = "default"  # how a new norm begins: weight 0 (nothing is added), or weight 1

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < -1:
            raise ValueError(f"{PREFIX}layer is {self.layer!r}: give -1 or the number of a layer")
        for name, allowed in (
            ("positions", get_args(Positions)),
            ("first_state", get_args(FirstState)),
            ("shift_within", get_args(ShiftWithin)),
            ("gate", get_args(Gate)),
        ):
            if self.__dict__[name] not in allowed:
                raise ValueError(f"{PREFIX}{name} is {self.__dict__[name]!r}: choose one of {', '.join(allowed)}")

    def as_config(self) -> dict[str, Any]:
        """The keys of config.json."""
        return {"use_relay": True, **{PREFIX + name: value for name, value in asdict(self).items()}}


def relay_keys(config: PreTrainedConfig | Mapping[str, Any]) -> RelayKeys | None:
    """What a configuration says of a relay; None: there is none.

    Raises:
        ValueError: see `RelayKeys`.
    """
    raw = config.to_dict() if isinstance(config, PreTrainedConfig) else config
    uses = raw.get("use_relay", False)
    if not isinstance(uses, bool):
        raise ValueError(f"use_relay is {uses!r}: give true or false")
    if not uses:
        return None
    return RelayKeys(**{name: raw[PREFIX + name] for name in asdict(RelayKeys()) if PREFIX + name in raw})


def save_relay_keys(folder: str | os.PathLike[str], keys: RelayKeys) -> None:
    """Writes the keys beside an adapter."""
    with open(os.path.join(folder, RELAY_FILE), "w", encoding="utf-8") as file:
        json.dump(keys.as_config(), file, indent=2)


def load_relay_keys(path: str | os.PathLike[str]) -> RelayKeys:
    """The keys in the file of `save_relay_keys`.

    Raises:
        InputError: it cannot be read, or is no such file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            keys = relay_keys(json.load(file))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): fetch or copy it again") from error
    if keys is None:
        raise InputError(f"{path} does not say use_relay: true: fetch or copy it again")
    return keys


def with_present_names(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a config.json with former keys under their present names, which win where a file has both."""
    former = {FORMER_KEYS[key]: value for key, value in raw.items() if key in FORMER_KEYS}
    return {**former, **{key: value for key, value in raw.items() if key not in FORMER_KEYS}}


def warn_idle_relay(model: PreTrainedModel, what_follows: str) -> None:
    """Says that the relay of `model` is off, once per process, model and `what_follows`."""
    told = _told.setdefault(model, set())
    if what_follows in told:
        return
    told.add(what_follows)
    if is_main_process():
        name = model.config.name_or_path or type(model).__name__
        logger.warning(f"the checkpoint {name} was trained with a relay, which is off: {what_follows}")


class RelayNorm(nn.LayerNorm):
    """R: LayerNorm over D with weight and bias; [..., D] -> [..., D].

    Args:
        size: D.
        eps: as the model's own norms have it.
        gate: "zero" begins with weight 0, where R(h) = 0 for every h; "default" with weight 1. The bias begins at 0.
    """

    def __init__(self, size: int, eps: float, gate: Gate) -> None:
        self.gate: Gate = gate
        super().__init__(size, eps=eps)

    def reset_parameters(self) -> None:
        """Weight and bias of a new norm."""
        nn.init.constant_(self.weight, 0.0 if self.gate == "zero" else 1.0)
        nn.init.zeros_(self.bias)
