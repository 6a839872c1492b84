"""The rows that BlockSampler decodes: where each of them is, and how it goes from block to block.

Shapes: B rows, L columns (a row's tokens begin in column 0), s block size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Rows:
    """What is being decoded, on the model's device; [B] unless a line says otherwise.

    A row that is done is moved to block 0, where its forwards disturb nobody.
    """

    ids: torch.Tensor  # [B, L] int64
    is_masked: torch.Tensor  # [B, L] bool, positions still to be filled in
    given: torch.Tensor  # [B, L] bool, tokens that no edit may touch: all but the masks
    length: torch.Tensor  # int64, columns that exist in a row: those behind are in nobody's sight
    prompt_length: torch.Tensor  # int64
    start: torch.Tensor  # int64, first column of the block that the row is in
    num_masked: torch.Tensor  # int64, masks that the steps of that block fill in
    step: torch.Tensor  # int64, steps taken in that block
    post_steps: torch.Tensor  # int64, those of them that found no mask
    is_stale: torch.Tensor  # bool, whether the cached keys of the block before are not those of its final tokens
    active: torch.Tensor  # bool, False once a row is done
    nfe: torch.Tensor  # int64, see BaseSamplerOutput
    cache_forwards: torch.Tensor  # int64, likewise
    batch_forwards: torch.Tensor  # int64 without dimensions, likewise
    size: int  # s
    hides: bool  # whether columns are hidden inside a block: the last block of a row is cut short
    is_cached: bool  # whether keys and values of finished blocks are kept
    keys: torch.Tensor | None = None  # int64, seeds of the rows' draws; None: nothing is drawn

    @classmethod
    def at_first_blocks(
        cls,
        ids: torch.Tensor,
        is_masked: torch.Tensor,
        length: torch.Tensor,
        first: torch.Tensor,
        size: int,
        is_cached: bool,
        device: torch.device,
    ) -> Rows:
        """The rows in the blocks of their columns `first` [B]; tensors on the CPU."""
        active = is_masked.any(dim=1)
        start = torch.where(active, first // size * size, 0)
        nothing = torch.zeros_like(length)
        return cls(
            ids=ids.to(device, copy=True),
            is_masked=is_masked.to(device, copy=True),
            given=(~is_masked).to(device),
            length=length.to(device),
            prompt_length=first.to(device),
            start=start.to(device),
            num_masked=in_block(is_masked, start, size).sum(dim=1).to(device),
            step=nothing.to(device, copy=True),
            post_steps=nothing.to(device, copy=True),
            is_stale=torch.zeros_like(active).to(device),
            active=active.to(device),
            nfe=nothing.to(device, copy=True),
            cache_forwards=nothing.to(device, copy=True),
            batch_forwards=torch.zeros_like(nothing[0]).to(device),
            size=size,
            hides=bool((length % size).any()),
            is_cached=is_cached,
        )

    @property
    def masked(self) -> torch.Tensor:
        """Which places of each row's block are still to be filled in, bool [B, s]."""
        return in_block(self.is_masked, self.start, self.size)

    @property
    def filled_in(self) -> torch.Tensor:
        """Which places of each row's block an earlier step filled in, bool [B, s]."""
        return ~self.masked & ~in_block(self.given, self.start, self.size)

    def leave(self, goes_on: torch.Tensor) -> None:
        """Rows `goes_on` [B] enter their next block; without a cache, the next one that has masks."""
        behind = self.start + self.size
        if not self.is_cached:
            behind = self.is_masked.int().argmax(dim=1) // self.size * self.size
        self.start = torch.where(goes_on, behind, self.start)
        self.step = torch.where(goes_on, 0, self.step)
        self.post_steps = torch.where(goes_on, 0, self.post_steps)

    def retire(self, goes_on: torch.Tensor) -> None:
        """Rows of `goes_on` [B] without any mask are done; the others count the masks of their new block."""
        self.active = self.active & (~goes_on | self.is_masked.any(dim=1))
        self.start = torch.where(self.active, self.start, 0)
        self.num_masked = torch.where(goes_on, self.masked.sum(dim=1), self.num_masked)


def columns_from(start: torch.Tensor, width: int) -> torch.Tensor:
    """start[b], start[b] + 1, ...: int64 [B, width]."""
    return start[:, None] + torch.arange(width, device=start.device)


def in_block(values: torch.Tensor, start: torch.Tensor, size: int) -> torch.Tensor:
    """values [B, L] in each row's block, [B, s]."""
    return values.gather(1, columns_from(start, size))
