"""RelayChannel: carries the hidden state of one denoising forward into the next (Relay, arXiv 2605.22967).

Input of forward s + 1 = token embedding + R(h_s), R one LayerNorm. Shapes: B rows, L positions, W columns of one input,
D hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from dllm.core.carry import carrying
from dllm.models.backbone import Backbone, unwrap
from dllm.models.relay_norm import RELAY_NORM, RelayKeys, relay_keys
from dllm.models.spec import spec_of
from dllm.utils.parsing import InputError
from memdlm.relay.config import RelayConfig


@dataclass(frozen=True)
class RelayState:
    """What one forward leaves to the next.

    hidden: [B, W, D], of the first W columns of the next input; zeros where there was no forward yet.
    is_set: bool [B], whether there was one; or [B, W], where there was.
    begins: bool [B or 1, W], first positions of blocks (used with a logit shift); None: every block_size-th.
    allowed: bool [B, W], where the state may be added at all; None: everywhere.
    """

    hidden: torch.Tensor
    is_set: torch.Tensor
    begins: torch.Tensor | None = None
    allowed: torch.Tensor | None = None


class RelayChannel:
    """The relay of one model: what is added to its embeddings, and where its state is read.

        with channel.passing(state):            # of the forward before; None of its memory is kept
            outputs = model(noised_ids)
        state = RelayState(channel.taken, ...)

    With the norm's weight and bias at zero the model is the base model, bit for bit. How the state is used is in the
    model's configuration (`dllm.models.relay_norm.RelayKeys`); `attach` gives a model without a relay a new one.

    Args:
        model: a model of `dllm.models`, plain or wrapped, with a relay norm.
        block_size: positions of a block, for families with a logit shift: the state is shifted inside each block. None:
            the row is one block.
        mask_token_id: None: that of the model's configuration.

    Raises:
        InputError: the model has no relay norm (the missing tensor is named), or one of another width; no mask token.
    """

    def __init__(self, model: nn.Module, block_size: int | None = None, mask_token_id: int | None = None) -> None:
        lm = unwrap(model)
        self.backbone: Backbone = lm.backbone
        keys = relay_keys(lm.config)
        if keys is None or self.backbone.relay_layer_norm is None:
            raise InputError(
                f"{lm.config.name_or_path or type(lm).__name__} has no relay (model.{RELAY_NORM}.weight is not among "
                "its parameters): train one with RelayTrainer, or turn the relay off"
            )
        self.keys: RelayKeys = keys
        num_layers, size = len(self.backbone.layers), lm.config.hidden_size
        if not -1 <= keys.layer < num_layers:
            raise InputError(f"relay_layer={keys.layer} in config.json: the model has layers 0 to {num_layers - 1}")
        self.read_at = num_layers if keys.layer == -1 else keys.layer
        width = self.norm.normalized_shape[0]
        if width != size:
            raise InputError(f"{RELAY_NORM} is {width} wide and the model {size}: give the relay of this model")
        self.size = size
        self.shift = spec_of(lm).logit_shift
        self.block_size = block_size if keys.shift_within == "block" else None
        mask = lm.config.mask_token_id if mask_token_id is None else mask_token_id
        if keys.positions == "mask" and mask is None:
            raise InputError(
                "the model's configuration has no mask_token_id: pass mask_token_id=tokenizer.mask_token_id"
            )
        self.mask_token_id = mask
        self.taken: torch.Tensor | None = None  # [B, W, D] of the last forward, with its graph
        self._state: RelayState | None = None

    @classmethod
    def attach(cls, model: nn.Module, config: RelayConfig, **options) -> RelayChannel:
        """The channel of `model`; one without a relay gets a new norm, as `config` says.

        Args:
            model: as in the class.
            config: settings of a new norm; of a model that has one they must be those of its checkpoint, or defaults.
            options: block_size, mask_token_id.

        Raises:
            InputError: settings that contradict the checkpoint's; those of the class.
        """
        backbone = unwrap(model).backbone
        wanted = config.keys(len(backbone.layers))
        own = relay_keys(backbone.config)
        if own is None:
            backbone.add_relay_norm(wanted)
            return cls(model, **options)
        default = RelayConfig().keys(len(backbone.layers))
        named = config.asked | ({"layer"} if "read" in config.asked else set())
        for name in ("layer", "positions", "first_state", "shift_within", "gate"):
            value, known = getattr(wanted, name), getattr(own, name)
            # The gate is how a new norm begins, so that of a preset does not matter here.
            meant = name in named or (name != "gate" and value != getattr(default, name))
            if value != known and meant:
                raise InputError(
                    f"relay_{name}={value} contradicts the checkpoint, which was trained with {known}: drop it"
                )
        return cls(model, **options)

    @property
    def norm(self) -> nn.LayerNorm:
        """R; asked for anew at every use, because PEFT puts a wrapper in its place that passes its attributes on."""
        return cast(nn.LayerNorm, self.backbone.relay_layer_norm)

    def first(self, num_rows: int, length: int) -> RelayState:
        """The state that a first forward gets: zeros [B, L, D], float32, not set."""
        device = self.backbone.device
        return RelayState(
            torch.zeros(num_rows, length, self.size, device=device),
            torch.zeros(num_rows, dtype=torch.bool, device=device),
        )

    @contextlib.contextmanager
    def passing(self, state: RelayState) -> Iterator[None]:
        """Within the block a forward of the model gets `state`, and leaves its own in `taken`.

        The input may be longer than the state (block diffusion puts the clean tokens behind the noised ones): nothing
        is added behind it. It may have several times as many rows, one group below the other: each group gets it.

        Raises:
            InputError: a state of another width than the model; a forward on fewer rows or columns than the state has.
        """
        if state.hidden.shape[-1] != self.size:
            raise InputError(
                f"the relay's state is {state.hidden.shape[-1]} wide and the model {self.size}: carry states of one "
                "model only"
            )
        self._state, self.taken = state, None
        try:
            with carrying(self.backbone, self):
                yield
        finally:
            self._state = None

    @contextlib.contextmanager
    def first_forwards(self) -> Iterator[None]:
        """Within the block forwards of the model, of whatever shape, are first ones; also inside `passing`, whose state
        they then neither get nor change."""
        outer, self._state = self._state, None
        taken = self.taken
        try:
            with contextlib.nullcontext() if self.backbone.carry is self else carrying(self.backbone, self):
                yield
        finally:
            self._state, self.taken = outer, taken

    def add(self, input_ids: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """embedded + R(h), h shifted where logits are, at the positions that get it (see `dllm.core.carry.Carry`)."""
        state = self.first(*input_ids.shape) if self._state is None else self._state
        self._check_shape(input_ids, state)
        hidden = self._shifted(state).to(embedded.dtype)
        added = self._added_at(input_ids[:, : hidden.shape[1]], state)
        contribution = self.norm(hidden).to(embedded.dtype)
        groups = embedded.shape[0] // hidden.shape[0]
        if groups > 1:
            contribution = contribution.repeat(groups, 1, 1)
        contribution = torch.where(added[..., None], contribution, 0)
        behind = embedded.shape[1] - hidden.shape[1]
        return embedded + nn.functional.pad(contribution, (0, 0, 0, behind)) if behind else embedded + contribution

    def take(self, index: int, hidden: torch.Tensor) -> None:
        """Keeps the state, if this is where it is read."""
        if index == self.read_at:
            self.taken = hidden

    def _shifted(self, state: RelayState) -> torch.Tensor:
        """The state of each position: with a logit shift that of the position before it, whose logit predicts it; the
        first one of a block keeps its own."""
        hidden = state.hidden
        if not self.shift:
            return hidden
        before = torch.cat([hidden[:, :1], hidden[:, :-1]], dim=1)
        begins = state.begins
        if begins is None and self.block_size is not None:
            begins = torch.arange(hidden.shape[1], device=hidden.device)[None] % self.block_size == 0
        return before if begins is None else torch.where(begins[..., None], hidden, before)

    def _added_at(self, input_ids: torch.Tensor, state: RelayState) -> torch.Tensor:
        """Where something is added, bool [groups * B, W]."""
        groups = input_ids.shape[0] // len(state.is_set)
        added = torch.ones_like(input_ids, dtype=torch.bool)
        if self.keys.positions == "mask":
            added = input_ids == self.mask_token_id
        if state.allowed is not None:
            added = added & state.allowed.repeat(groups, 1)
        if self.keys.first_state == "none":
            is_set = state.is_set if state.is_set.dim() == 2 else state.is_set[:, None]
            added = added & is_set.repeat(groups, 1)
        return added

    def _check_shape(self, input_ids: torch.Tensor, state: RelayState) -> None:
        rows, width = state.hidden.shape[:2]
        if input_ids.shape[0] % rows or input_ids.shape[1] < width:
            raise InputError(
                f"the relay's state is of {rows} rows with {width} columns, the input has {list(input_ids.shape)}: "
                "carry states between forwards on the same rows"
            )
