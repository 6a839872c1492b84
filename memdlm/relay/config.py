"""Every setting of Relay, declared once. Flags (`--relay_*`) are made from this class."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from dllm.models.relay_norm import FirstState, Gate, Positions, RelayKeys, ShiftWithin
from dllm.utils.parsing import InputError

FLAG_PREFIX = "relay_"

Arm = Literal["mask_uniform", "rollout", "relay_sg", "relay"]
States = Literal["rollout", "uniform"]
Reveal = Literal["threshold", "aligned", "uncertainty"]

# The four arms that the paper compares, as settings.
ARMS: dict[str, dict[str, Any]] = {
    "mask_uniform": {"carry": False, "states": "uniform", "num_steps": 1},
    "rollout": {"carry": False},
    "relay_sg": {"bptt_window": 1},
    "relay": {},
}
# The two published settings of the mechanism and of the reveal rule.
PRESETS: dict[str, dict[str, Any]] = {
    "llm": {"gate": "zero", "positions": "mask", "read": "after", "reveal": "threshold"},
    "sudoku": {"gate": "default", "positions": "all", "read": "before", "reveal": "uncertainty", "tau_jitter": 0.1},
}


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class RelayConfig:
    """Settings of Relay (arXiv 2605.22967). Defaults are the published ones for language models.

    Raises:
        InputError: a value out of its range, or a pair that cannot take effect together.
    """

    carry: bool = _setting(True, "Feed the hidden state of one denoising forward into the next.")
    num_steps: int = _setting(2, "K, denoising forwards of a training step, at least 1.")
    bptt_window: int | None = _setting(
        None,
        "Gradients flow through at most this many consecutive forwards, 1 to K: the K forwards are cut into windows of "
        "so many, and the state enters each window without gradient. 1: stop-gradient. None: K.",
    )
    states: States = _setting(
        "rollout",
        "Which states are trained on: rollout = those that decoding goes through, each row from all masks on; uniform "
        "= masks drawn as in plain masked diffusion (one forward, nothing is carried).",
    )
    gate: Gate = _setting("zero", "A new LayerNorm begins with weight 0 (nothing is added at first) or 1 (default).")
    positions: Positions = _setting("mask", "Add the state at mask tokens, or at all positions that are denoised.")
    read: Literal["after", "before"] = _setting("after", "Read the state after the final norm or before it.")
    layer: int = _setting(-1, "Read the output of this layer instead; -1: the last, as `read` says.")
    first_state: FirstState = _setting(
        "zeros",
        "What the first forward gets, in training and in decoding: zeros = the norm of zeros, that is its bias; none = "
        "nothing.",
    )
    shift_within: ShiftWithin = _setting(
        "block",
        "Families whose logits are shifted by one get the state shifted likewise; what keeps its own state is the "
        "first position of each block, or of the row.",
    )
    reveal: Reveal = _setting(
        "threshold",
        "What a training forward reveals (with true tokens), by the rule of the decoder: threshold = in every block "
        "what is surer than `threshold` and the surest; aligned = the same in the earliest inner block with masks; "
        "uncertainty = the surest tokens of the row while the sum of 1 - confidence stays below `tau`.",
    )
    threshold: float = _setting(0.85, "Confidence above which a token is revealed, in (0, 1].")
    block_size: int | None = _setting(
        None, "Positions of the blocks in which a training forward reveals. None: the model's own, else 32."
    )
    inner_block_size: int = _setting(8, "Positions of an inner block (aligned), a divisor of the block size.")
    tau: float = _setting(0.15, "Largest summed uncertainty of what a forward reveals, above 0.")
    tau_jitter: float = _setting(0.0, "Standard deviation of a normal draw that is added to `tau` in each forward.")
    drop_rows: bool = _setting(
        False, "Drop the rows of a batch that find no free place, as published; False keeps them for the next call."
    )
    # Names that `for_arm` was given; a checkpoint that says otherwise must not overrule them in silence.
    asked: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            allowed = get_args(hint) if "Literal" in str(hint) else ()
            if allowed and getattr(self, name) not in allowed:
                raise InputError(f"{FLAG_PREFIX}{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        self._check_types()
        self._check_ranges()
        self._check_pairs()

    def _check_types(self) -> None:
        for name in ("carry", "drop_rows"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{FLAG_PREFIX}{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("threshold", "tau", "tau_jitter"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), (int, float)):
                raise InputError(f"{FLAG_PREFIX}{name} must be a number, got {getattr(self, name)!r}")

    def _check_ranges(self) -> None:
        window = self.num_steps if self.bptt_window is None else self.bptt_window
        inner = self.inner_block_size
        rules = (
            ("num_steps", _is_count(self.num_steps), "an integer of at least 1"),
            ("bptt_window", _is_count(window), "an integer of at least 1"),
            ("bptt_window", window <= self.num_steps, f"at most {FLAG_PREFIX}num_steps={self.num_steps}"),
            ("layer", self.layer == -1 or _is_count(self.layer + 1), "-1 or the number of a layer"),
            ("threshold", 0 < self.threshold <= 1, "in (0, 1]"),
            ("block_size", self.block_size is None or _is_count(self.block_size), "an integer of at least 1"),
            ("inner_block_size", _is_count(inner), "an integer of at least 1"),
            ("tau", 0 < self.tau < math.inf, "above 0 and finite"),
            ("tau_jitter", 0 <= self.tau_jitter < math.inf, "at least 0 and finite"),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise InputError(f"{FLAG_PREFIX}{name} must be {wanted}, got {getattr(self, name)!r}")

    def _check_pairs(self) -> None:
        """Settings that cannot take effect beside the others."""
        uniform = self.states == "uniform"
        if uniform and self.carry:
            raise InputError("relay_states=uniform has no earlier forward to carry from: set relay_carry False")
        if uniform and self.num_steps != 1:
            raise InputError("relay_states=uniform takes one forward per step: set relay_num_steps 1")
        # (setting, whether another value than the default could have no effect, what is in its way)
        rules = (
            *((name, not self.carry, "carry") for name in ("bptt_window", *_CHANNEL)),
            ("read", self.layer != -1, "layer"),
            *((name, uniform, "states") for name in ("reveal", "drop_rows")),
            ("threshold", self.reveal == "uncertainty", "reveal"),
            ("block_size", self.reveal == "uncertainty", "reveal"),
            ("inner_block_size", self.reveal != "aligned", "reveal"),
            ("tau", self.reveal != "uncertainty", "reveal"),
            ("tau_jitter", self.reveal != "uncertainty", "reveal"),
        )
        for name, idle, other in rules:
            if idle and getattr(self, name) != getattr(RelayConfig, name):
                raise InputError(
                    f"{FLAG_PREFIX}{name}={getattr(self, name)} has no effect with "
                    f"{FLAG_PREFIX}{other}={getattr(self, other)}: drop one of them"
                )

    @property
    def window(self) -> int:
        """W, the bptt window, 1 to K."""
        return self.num_steps if self.bptt_window is None else self.bptt_window

    def keys(self, num_layers: int) -> RelayKeys:
        """What a checkpoint's config.json is to say of the mechanism.

        Args:
            num_layers: of the model.

        Raises:
            InputError: no such layer.
        """
        if self.layer >= num_layers:
            raise InputError(f"{FLAG_PREFIX}layer={self.layer}: the model has layers 0 to {num_layers - 1}")
        # The state before the final norm is the output of the last layer.
        layer = num_layers - 1 if self.read == "before" else self.layer
        return RelayKeys(layer, self.positions, self.first_state, self.shift_within, self.gate)

    @classmethod
    def for_arm(cls, arm: str, preset: str = "llm", **settings: Any) -> RelayConfig:
        """The settings of an arm with a preset; `settings` set others by name.

        Settings of the preset that an arm has no use for (it carries nothing, or follows no rollout) are left out.

        Raises:
            InputError: an unknown arm, preset or setting; those of the class.
        """
        values = {**_useful(preset_of(preset), {**arm_of(arm), **settings}), **arm_of(arm), **settings}
        unknown = [name for name in values if name not in {f.name for f in dataclasses.fields(cls)}]
        if unknown:
            allowed = ", ".join(f.name for f in dataclasses.fields(cls))
            raise InputError(f"unknown relay setting {', '.join(unknown)}; allowed: {allowed}")
        made = cls(**values)
        made.__dict__["asked"] = frozenset(settings)
        return made

    @classmethod
    def from_flags(cls, flags: Any) -> RelayConfig:
        """The settings held by the `relay_*` attributes of `flags` (see `flag_fields`); None is what `relay_arm` and
        `relay_preset` say.

        Raises:
            InputError: as in `for_arm`; a flag that contradicts the arm.
        """
        given = {f.name: getattr(flags, FLAG_PREFIX + f.name) for f in dataclasses.fields(cls)}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in arm_of(flags.relay_arm).items():
            if given.get(name, value) != value:
                raise InputError(
                    f"{FLAG_PREFIX}{name}={given[name]} contradicts relay_arm={flags.relay_arm}, which means "
                    f"{value}: drop one of them"
                )
        return cls.for_arm(flags.relay_arm, flags.relay_preset, **given)


_CHANNEL = ("gate", "positions", "read", "layer", "first_state", "shift_within")


def arm_of(name: str) -> dict[str, Any]:
    """The settings of an arm.

    Raises:
        InputError: there is no such arm.
    """
    return _entry(ARMS, "arm", name)


def preset_of(name: str) -> dict[str, Any]:
    """The settings of a preset.

    Raises:
        InputError: there is no such preset.
    """
    return _entry(PRESETS, "preset", name)


def _entry(table: dict[str, dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    if name not in table:
        raise InputError(f"{FLAG_PREFIX}{kind} is {name!r}: choose one of {', '.join(table)}")
    return table[name]


def _useful(preset: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """`preset` without what could have no effect beside the settings of the arm and the user's own."""
    idle = set(_CHANNEL) if others.get("carry") is False else set()
    if others.get("states") == "uniform":
        idle |= {"reveal", "tau", "tau_jitter", "threshold"}
    if others.get("reveal", "uncertainty") != "uncertainty":
        idle |= {"tau", "tau_jitter"}
    if others.get("layer", -1) != -1:
        idle.add("read")
    return {name: value for name, value in preset.items() if name not in idle}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def flag_fields() -> list[tuple[str, Any, Any]]:
    """(name, type, field) of every training flag: the arm, the preset, and each field of RelayConfig with the prefix
    `relay_`."""
    hints = get_type_hints(RelayConfig)
    chosen = [
        (FLAG_PREFIX + "arm", Arm, _setting("relay", f"Training arm: {', '.join(ARMS)}; the other flags refine it.")),
        (FLAG_PREFIX + "preset", str, _setting("llm", f"Published settings: {' or '.join(PRESETS)}.")),
    ]
    return chosen + [
        (
            FLAG_PREFIX + f.name,
            hints[f.name] | None,
            field(default=None, metadata={"help": f.metadata["help"] + " None: as arm and preset say."}),
        )
        for f in dataclasses.fields(RelayConfig)
    ]
