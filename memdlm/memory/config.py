"""Every setting of Parametric Memory, declared once. Flags (`--mem_*`) and model arguments are made from this class."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from dllm.core.losses import NormType, WeightType
from dllm.utils.parsing import InputError

FLAG_PREFIX = "mem_"
# What differs from the defaults for training where a memory is written from prompts.
DECODING_DEFAULTS: dict[str, Any] = {"enabled": True, "scope": "row", "sync_inner": False}
# Settings that matter for labels alone, and the values that they may have without any.
IDLE_WITHOUT_LABELS = {"inner_target": ("response", "prompt"), "pad_unmask_mode": ("none",)}
PROGRESSIVE_START_RATIO = 0.8  # share of masked positions in the first state of progressive_memory

MaskingStrategy = Literal["pmc", "progressive_memory_consistent", "progressive_memory", "pre_only", "no_progressive"]
InnerLossType = Literal["ce", "distill", "distill_reverse", "distill_hidden"]


def _setting(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class MemoryConfig:
    """Settings of the inner loop (MemDLM, arXiv 2603.22241). Defaults are the published ones for training.

    Raises:
        InputError: a value out of its range, or a pair that cannot take effect together.
    """

    enabled: bool = _setting(False, "Write fast weights from each batch and train the base model with them in place.")
    num_inner_steps: int = _setting(2, "K, states of the inner trajectory, at least 1.")
    num_inner_epochs: int = _setting(1, "How often the trajectory is gone through, at least 1.")
    masking_strategy: MaskingStrategy = _setting(
        "pmc",
        "Inner trajectory. pmc (= progressive_memory_consistent): K states that end at the outer anchor state; "
        "pre_only: the first of them alone; no_progressive: the anchor alone; progressive_memory: K states of falling "
        "mask ratio, not tied to the anchor.",
    )
    mask_ratio_epsilon: float = _setting(1e-3, "Accepted because published scripts pass it; it has no effect.")
    prompt_mask_ratio: float = _setting(
        0.2,
        "Share of masked positions in the last state where there is no outer anchor (inner_target prompt, decoding) or "
        "the trajectory is not tied to it (progressive_memory), in (0, 1).",
    )
    progressive_consistent_start_scale: float = _setting(
        1.5,
        "s: the first state masks s times the anchor's share (at most all), at least 1; with inner_target disjoint "
        "each state masks 1 - 1/s of the visible positions.",
    )
    inner_loss_type: InnerLossType = _setting(
        "ce",
        "Inner objective: cross-entropy to the true tokens, KL(teacher || student), KL(student || teacher), or the "
        "distance of the last hidden states; the teacher is the same model on the next state.",
    )
    distill_temperature: float = _setting(1.0, "Temperature of distill and distill_reverse, above 0.")
    distill_hidden_type: Literal["mse", "cosine"] = _setting("mse", "Distance of distill_hidden.")
    inner_loss_mask_mode: Literal["student_masked", "newly_revealed"] = _setting(
        "student_masked",
        "Positions of the inner loss: all masked ones, or those that the next state reveals "
        "(at the last state, which has no next, all masked ones).",
    )
    inner_lr: float = _setting(0.1, "Learning rate of the inner SGD, at least 0.")
    inner_grad_clip: float = _setting(1.0, "Largest gradient norm in the inner loop; 0 turns the clip off.")
    inner_rank: int = _setting(32, "Rank r of the LoRA fast weights, at least 1.")
    inner_alpha: float = _setting(64.0, "LoRA alpha: the product is scaled by alpha / r.")
    inner_dropout: float = _setting(0.0, "Must be 0: the inner loop runs without dropout.")
    inner_layer_fraction: float = _setting(
        0.1, "Share of the layers, counted from the last, that get fast weights, in (0, 1]."
    )
    inner_target_modules: str = _setting(
        "gate_proj,up_proj,down_proj", "Roles of the adapted linears, separated by commas."
    )
    inner_adapter_type: Literal["lora", "full"] = _setting(
        "lora", "Low-rank fast weights, or a dense one for every linear."
    )
    pad_unmask_mode: Literal["none", "inner", "both"] = _setting(
        "none", "Where padding is never masked: nowhere, in the inner loop, or in both loops."
    )
    sync_inner: bool = _setting(
        True, "Average the inner gradients over data-parallel ranks; rows of scope row have nothing to average."
    )
    inner_gradient_checkpointing: bool = _setting(
        True,
        "Where the model itself recomputes activations, do so in the inner loop too; false keeps them there.",
    )
    scope: Literal["batch", "row"] = _setting(
        "batch", "One set of fast weights for the micro-batch, or one per sequence."
    )
    inner_target: Literal["response", "prompt", "disjoint"] = _setting(
        "response",
        "What the fast weights are fitted to: response = the labels that the outer loss asks for; prompt = the prompt "
        "alone, as at inference; disjoint = labels that the outer loss does not ask for.",
    )
    clip_kind: Literal["tensor", "global"] = _setting("tensor", "Clip each A and each B on its own, or all together.")
    seed: int = _setting(42, "Seed of the initial fast weights.")
    loss_weight_type: WeightType = _setting(
        "uniform", "Weight of the inner loss; in training that of the outer loss.", evaluation_only=True
    )
    loss_norm_type: NormType = _setting(
        "token", "Normaliser of the inner loss; in training that of the outer loss.", evaluation_only=True
    )

    def __post_init__(self) -> None:
        if self.masking_strategy == "progressive_memory_consistent":
            self.masking_strategy = "pmc"
        self._check_choices()
        self._check_ranges()
        self._check_pairs()
        if self.mask_ratio_epsilon != MemoryConfig.mask_ratio_epsilon:
            warnings.warn("mem_mask_ratio_epsilon has no effect; drop it", stacklevel=3)

    def _check_choices(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            allowed = get_args(hint)  # empty for a type that is not a Literal
            if allowed and getattr(self, name) not in allowed:
                raise InputError(
                    f"{FLAG_PREFIX}{name} is {getattr(self, name)!r}: choose one of {', '.join(map(str, allowed))}"
                )

    def _check_ranges(self) -> None:
        rules = (
            ("num_inner_steps", _counts(self.num_inner_steps), "an integer of at least 1"),
            ("num_inner_epochs", _counts(self.num_inner_epochs), "an integer of at least 1"),
            ("prompt_mask_ratio", 0 < self.prompt_mask_ratio < 1, "in (0, 1)"),
            (
                "progressive_consistent_start_scale",
                1 <= self.progressive_consistent_start_scale < math.inf,
                "at least 1 and finite",
            ),
            ("distill_temperature", 0 < self.distill_temperature < math.inf, "above 0 and finite"),
            ("inner_lr", 0 <= self.inner_lr < math.inf, "at least 0 and finite"),
            ("inner_grad_clip", 0 <= self.inner_grad_clip < math.inf, "at least 0 and finite (0 turns the clip off)"),
            ("inner_rank", _counts(self.inner_rank), "an integer of at least 1"),
            ("inner_alpha", 0 < self.inner_alpha < math.inf, "above 0 and finite"),
            ("inner_dropout", self.inner_dropout == 0, "0: the inner loop runs without dropout"),
            ("inner_layer_fraction", 0 < self.inner_layer_fraction <= 1, "in (0, 1]"),
            (
                "inner_target_modules",
                bool(self.target_roles),
                "at least one role, such as gate_proj,up_proj,down_proj",
            ),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise InputError(f"{FLAG_PREFIX}{name} must be {wanted}, got {getattr(self, name)!r}")

    def _check_pairs(self) -> None:
        """Settings that cannot take effect beside the others."""
        ends_without_next = self.masking_strategy == "no_progressive" or (
            self.masking_strategy != "pre_only" and self.num_inner_steps == 1
        )
        one_state = self.masking_strategy in ("pre_only", "no_progressive")
        from_anchor = self.masking_strategy in ("pmc", "pre_only")
        reveals_nothing = from_anchor and self.progressive_consistent_start_scale == 1
        stands_still = (
            self.masking_strategy == "progressive_memory"
            and self.num_inner_steps > 1
            and self.prompt_mask_ratio == PROGRESSIVE_START_RATIO
        )
        # (setting, whether another value than the default could have no effect, the setting that is in its way)
        rules = (
            ("distill_temperature", self.inner_loss_type not in ("distill", "distill_reverse"), "inner_loss_type"),
            ("distill_hidden_type", self.inner_loss_type != "distill_hidden", "inner_loss_type"),
            ("inner_loss_mask_mode", self.inner_target == "disjoint", "inner_target"),
            ("inner_loss_mask_mode", ends_without_next and one_state, "masking_strategy"),
            ("inner_loss_mask_mode", ends_without_next, "num_inner_steps"),
            # The first state masks nothing beside the anchor, so no state reveals anything.
            ("inner_loss_mask_mode", reveals_nothing, "progressive_consistent_start_scale"),
            # A teacher that sees what the student sees.
            ("inner_loss_type", reveals_nothing, "progressive_consistent_start_scale"),
            ("inner_loss_type", stands_still, "prompt_mask_ratio"),
            ("clip_kind", self.inner_grad_clip == 0, "inner_grad_clip"),
            ("num_inner_steps", one_state and self.num_inner_steps != 1, "masking_strategy"),
            (
                "progressive_consistent_start_scale",
                self.masking_strategy in ("progressive_memory", "no_progressive"),
                "masking_strategy",
            ),
            ("masking_strategy", self.inner_target == "disjoint", "inner_target"),
            ("pad_unmask_mode", self.inner_target == "prompt" and self.pad_unmask_mode == "inner", "inner_target"),
            ("inner_rank", self.inner_adapter_type == "full", "inner_adapter_type"),
            ("inner_alpha", self.inner_adapter_type == "full", "inner_adapter_type"),
        )
        for name, idle, other in rules:
            if idle and getattr(self, name) != getattr(MemoryConfig, name):
                raise InputError(
                    f"{FLAG_PREFIX}{name}={getattr(self, name)} has no effect with "
                    f"{FLAG_PREFIX}{other}={getattr(self, other)}: drop one of them"
                )
        if self.masking_strategy == "progressive_memory" and self.prompt_mask_ratio > PROGRESSIVE_START_RATIO:
            raise InputError(
                f"mem_prompt_mask_ratio={self.prompt_mask_ratio} lies above {PROGRESSIVE_START_RATIO}, where "
                "mem_masking_strategy=progressive_memory starts: lower it"
            )
        if self.inner_target == "disjoint" and self.progressive_consistent_start_scale == 1:
            raise InputError(
                "mem_inner_target=disjoint masks a share of 1 - 1/s: raise mem_progressive_consistent_start_scale "
                "above 1"
            )

    @property
    def target_roles(self) -> tuple[str, ...]:
        """`inner_target_modules` as a tuple of roles."""
        return tuple(role.strip() for role in self.inner_target_modules.split(",") if role.strip())

    @classmethod
    def for_decoding(cls, **settings: Any) -> MemoryConfig:
        """The settings for a memory written from prompts: on, scope row, nothing averaged over ranks; `settings` (names
        without `mem_`) set the others.

        Raises:
            InputError: an unknown setting; one that can have no effect without labels; those of `MemoryConfig`.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise InputError(f"unknown memory setting {', '.join(unknown)}; allowed: {', '.join(known)}")
        config = cls(**{**DECODING_DEFAULTS, **settings})
        for name, allowed in IDLE_WITHOUT_LABELS.items():
            if getattr(config, name) not in allowed:
                raise InputError(
                    f"{FLAG_PREFIX}{name}={getattr(config, name)} has no effect on a memory written from a prompt "
                    "(there are no labels): drop it"
                )
        return config

    @classmethod
    def from_flags(cls, flags: Any, **overrides: Any) -> MemoryConfig:
        """The settings held by the `mem_*` attributes of `flags` (see `flag_fields`); `overrides` set the others by
        name."""
        values = {name.removeprefix(FLAG_PREFIX): getattr(flags, name) for name, _, _ in flag_fields()}
        return cls(**{**values, **overrides})


def _counts(value: int) -> bool:
    return isinstance(value, int) and value >= 1


def flag_fields() -> list[tuple[str, Any, Any]]:
    """(name, type, field) of every training flag: each field of MemoryConfig with the prefix `mem_`, less those for
    evaluation only."""
    hints = get_type_hints(MemoryConfig)
    return [
        (FLAG_PREFIX + f.name, hints[f.name], field(default=f.default, metadata=dict(f.metadata)))
        for f in dataclasses.fields(MemoryConfig)
        if "evaluation_only" not in f.metadata
    ]


def decoding_fields() -> list[tuple[str, Any, Any]]:
    """(name, type, field) of every setting with the prefix `mem_` and its default of `MemoryConfig.for_decoding`."""
    hints = get_type_hints(MemoryConfig)
    return [
        (
            FLAG_PREFIX + f.name,
            hints[f.name],
            field(default=DECODING_DEFAULTS.get(f.name, f.default), metadata={"help": f.metadata["help"]}),
        )
        for f in dataclasses.fields(MemoryConfig)
    ]
