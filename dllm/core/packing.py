"""Several documents side by side in one row of the network, with no attention across documents.

Only the network sees packed rows. Everywhere else - masks, times, losses, counts - each document is a row of its own,
so that packing changes none of them.
Shapes: B packed rows, L positions of them, D documents of the batch, M positions of the longest document, N chosen
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dllm.core.attention import check_document_masks, document_inputs
from dllm.utils.parsing import InputError

Layout = dict[str, torch.Tensor]


def check_packing(implementation: str | None, device: torch.device) -> None:
    """Nothing, if a model can be trained on packed rows; a script asks before it loads anything.

    Args:
        implementation: attention implementation of the model.
        device: where it is trained.

    Raises:
        InputError: flash attention, which takes no mask between documents; flex attention on a CPU.
    """
    check_document_masks(implementation)
    if implementation == "flex_attention" and device.type == "cpu":
        raise InputError("flex_attention trains on a GPU only: pack with --attn_implementation sdpa on a CPU")


def lay_out(lengths: Sequence[Sequence[int]]) -> Layout:
    """Where the documents of a batch stand in the network's rows, on the CPU.

    places        int64 [D, M]  flat index into [B * L] of every position of a document; 0 behind its end
    source        int64 [B, L]  flat index into [D * M] of what stands there; 0 in the fill
    segment_ids   int64 [B, L]  number of the document in its row: 0, 1, ...; the fill behind them has the next one
    position_ids  int64 [B, L]  position in the document; 0 in the fill

    Args:
        lengths: of the documents of each packed row, in order; all of them at least 1.
    """
    flat = [length for row in lengths for length in row]
    longest, width = max(flat), max(sum(row) for row in lengths)
    places = torch.zeros(len(flat), longest, dtype=torch.int64)
    source, segment_ids, position_ids = torch.zeros(3, len(lengths), width, dtype=torch.int64)
    document = 0
    for index, row in enumerate(lengths):
        start = 0
        for number, length in enumerate(row):
            inside, span = torch.arange(length), slice(start, start + length)
            places[document, :length] = index * width + start + inside
            source[index, span] = document * longest + inside
            segment_ids[index, span], position_ids[index, span] = number, inside
            start, document = start + length, document + 1
        segment_ids[index, start:] = len(row)
    return {"places": places, "source": source, "segment_ids": segment_ids, "position_ids": position_ids}


def packed_inputs(implementation: str | None, layout: Layout, states: Sequence[torch.Tensor]) -> dict[str, Any]:
    """What a model is called with to look at `states`, one below the other: ids, mask and position ids.

    What fills up a row is seen by no document.

    Args:
        implementation: attention implementation of the model.
        layout: what `lay_out` made, on the device of the states.
        states: token ids of the documents, int64 [D, M] each.

    Raises:
        InputError: the implementation has no such mask.
    """
    ids = torch.cat([state.reshape(-1)[layout["source"]] for state in states])  # [B * states, L]
    segments, positions = (torch.cat([layout[name]] * len(states)) for name in ("segment_ids", "position_ids"))
    return {"input_ids": ids, **document_inputs(implementation, segments, positions)}


def packed_positions(layout: Layout, positions: torch.Tensor) -> torch.Tensor:
    """Flat indices [N] into [D * M] as those of the same tokens in [B * L]."""
    return layout["places"].reshape(-1)[positions]
