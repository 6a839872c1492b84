"""Likelihoods under a model with a relay: each masked state is looked at twice.

Shapes: R rows, L positions, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dllm.core.eval.likelihood import Scorer
from memdlm.relay.channel import RelayChannel


@dataclass(frozen=True, kw_only=True)
class RelayScorer(Scorer):
    """`Scorer` with a relay: the second forward over a state gets what the first one left, and answers.

        hidden, h = network(x, R(h_0))      # as in a first denoising forward
        hidden, h = network(x, R(h))

    So the published evaluation does it. In a block-causal model nothing is added to the blocks before, as in decoding.
    Greedy decoding of a target takes two forwards per state as well; it carries nothing from state to state.

    channel: of the model.
    zeroed: see `memdlm.relay.RelaySampler`; the second forward would equal the first and is left out.
    """

    channel: RelayChannel
    zeroed: bool = False

    @property
    def forwards_per_row(self) -> int:
        """Twice that of `Scorer`, unless zeroed."""
        return super().forwards_per_row * (1 if self.zeroed else 2)

    def run(self, ids: torch.Tensor, attention_mask: torch.Tensor | None, start: torch.Tensor) -> torch.Tensor:
        """As in `Scorer`, of the last forward."""
        columns = torch.arange(ids.shape[1], device=ids.device)[None]  # [1, L]
        begins = None if self.block_size is None else columns == start[:, None]
        state = replace(self.channel.first(*ids.shape), begins=begins, allowed=columns >= start[:, None])
        if not self.zeroed:
            with self.channel.passing(state):
                super().run(ids, attention_mask, start)
            assert self.channel.taken is not None
            state = replace(state, hidden=self.channel.taken, is_set=torch.ones_like(state.is_set))
        with self.channel.passing(state):
            hidden = super().run(ids, attention_mask, start)
        self.channel.taken = None
        return hidden
