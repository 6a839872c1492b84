"""Samplers that carry the hidden state of each denoising step into the next (Relay, arXiv 2605.22967).

Shapes: B rows, L columns, W columns of a forward, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from dllm.core.samplers import BlockSampler, MDLMSampler
from dllm.core.samplers.base import BaseSampler, Visit
from dllm.models.backbone import DiffusionLMOutput, unwrap
from dllm.utils.parsing import InputError
from memdlm.relay.channel import RelayChannel, RelayState


class RelaySampler(BaseSampler):
    """What makes a sampler carry a state; to be put before one: `class Sampler(RelaySampler, MDLMSampler)`.

    Every row has a state of its own, [L, D]: it is replaced by the forwards in which the row has something to fill in,
    and by no others, so a batch of B decodes like B singles. Keys and values that outlive a step hold nothing of it.

    Args:
        model: a model of `dllm.models` with a relay, plain or wrapped.
        tokenizer: as in `BaseSampler`.
        zeroed: give every forward what a first one gets. So decodes a control: the weights of the relay without what it
            carries.

    Raises:
        InputError: those of `RelayChannel`.
    """

    carries_state = True
    begins_anew_in_blocks: bool  # whether a row's state is reset when it enters a block

    def __init__(
        self, model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, *, zeroed: bool = False
    ) -> None:
        super().__init__(model, tokenizer)
        self.channel = RelayChannel(model, mask_token_id=self.mask_token_id)
        self.zeroed = zeroed
        self._states: dict[int, _RowStates] = {}

    def begin(self, num_rows: int, width: int) -> None:
        """Forgets the states of the call before."""
        super().begin(num_rows, width)
        self._states = {}

    def run_model(self, visit: Visit, **inputs: Any) -> DiffusionLMOutput:
        """As in `BaseSampler`, with the rows' states."""
        states = self._states.get(visit.pass_index)
        if states is None:
            states = self._states[visit.pass_index] = self._new_states(visit)
        own = torch.ones_like(visit.columns, dtype=torch.bool) if visit.settled is None else ~visit.settled
        own = own.expand_as(visit.columns) & visit.reveals  # [B, W]
        if self.begins_anew_in_blocks:
            states.enter(visit.start)
        state = RelayState(
            hidden=states.read(visit.columns),
            is_set=states.is_set.gather(1, visit.columns),
            begins=visit.columns == visit.start[:, None] if self.begins_anew_in_blocks else None,
            allowed=own,
        )
        with self.channel.passing(state):
            output = super().run_model(visit, **inputs)
        assert self.channel.taken is not None
        if not self.zeroed:
            states.write(visit.columns, self.channel.taken, own & visit.active[:, None])
        self.channel.taken = None
        return output

    def _new_states(self, visit: Visit) -> _RowStates:
        weight = self.channel.norm.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = (len(visit.columns), visit.width, self.channel.size)
        return _RowStates(torch.zeros(shape, dtype=dtype, device=visit.columns.device), visit.start)


class _RowStates:
    """The state of every row and column, and where there is one."""

    def __init__(self, hidden: torch.Tensor, start: torch.Tensor) -> None:
        self.hidden = hidden  # [B, L, D]
        self.is_set = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)  # [B, L]
        self.start = start  # [B] int64, first column of the block that the state belongs to

    def enter(self, start: torch.Tensor) -> None:
        """Rows in another block than before begin anew."""
        self.is_set = self.is_set & (self.start == start)[:, None]
        self.start = start

    def read(self, columns: torch.Tensor) -> torch.Tensor:
        """The states at `columns` [B, W]; zeros where there is none: [B, W, D]."""
        found = self.hidden.gather(1, columns[..., None].expand(-1, -1, self.hidden.shape[2]))
        return torch.where(self.is_set.gather(1, columns)[..., None], found, 0)

    def write(self, columns: torch.Tensor, hidden: torch.Tensor, where: torch.Tensor) -> None:
        """Replaces the states at `columns` by `hidden` [B, W, D], `where` [B, W]."""
        index = columns[..., None].expand(-1, -1, self.hidden.shape[2])
        old = self.hidden.gather(1, index)
        self.hidden.scatter_(1, index, torch.where(where[..., None], hidden.to(old.dtype), old))
        self.is_set.scatter_(1, columns, self.is_set.gather(1, columns) | where)


class RelayMDLMSampler(RelaySampler, MDLMSampler):
    """`MDLMSampler` with a relay; a row's state goes on from block to block, as in training on whole rows.

    With a cache the first forward of a block, whose keys and values are kept, adds the state inside the window alone;
    later forwards of the block leave the states outside it as they are.
    """

    begins_anew_in_blocks = False


class RelayBlockSampler(RelaySampler, BlockSampler):
    """`BlockSampler` with a relay; a row's state begins anew in every block."""

    begins_anew_in_blocks = True


SAMPLERS: dict[type[BaseSampler], type[RelaySampler]] = {
    MDLMSampler: RelayMDLMSampler,
    BlockSampler: RelayBlockSampler,
}


def make_sampler(
    sampler_class: type[BaseSampler],
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    relay: bool | None = None,
    zeroed: bool = False,
) -> BaseSampler:
    """A sampler of the class, or the one that decodes likewise and carries a state (`SAMPLERS`).

    Args:
        sampler_class: one of `SAMPLERS`.
        model, tokenizer: as in `BaseSampler`.
        relay: decode with the model's relay. None: if it has one. False with a model that has one is told once.
        zeroed: see `RelaySampler`; asks for the relay.

    Raises:
        InputError: zeroed with relay False; a relay asked for that the model does not have (the missing tensor is
            named); a class that has no counterpart with a relay.
    """
    if zeroed and relay is False:
        raise InputError("relay_zeroed has no effect with relay=False: drop one of them")
    has_one = unwrap(model).backbone.relay_layer_norm is not None
    if relay is False or (relay is None and not zeroed and not has_one):
        return sampler_class(model, tokenizer)
    if sampler_class not in SAMPLERS:
        known = ", ".join(known.__name__ for known in SAMPLERS)
        raise InputError(f"{sampler_class.__name__} carries no state: decode with {known}, or turn the relay off")
    return SAMPLERS[sampler_class](model, tokenizer, zeroed=zeroed)
