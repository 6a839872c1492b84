"""Solve puzzles with a trained model, and sum up how well and with how many forwards.

Shapes: N puzzles, L cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dllm.core.samplers import MDLMSampler, MDLMSamplerConfig
from memdlm.studies.sudoku.board import BoardScores, score_boards, to_ids
from memdlm.studies.sudoku.puzzles import TIERS, Puzzle


@dataclass(frozen=True)
class Solutions:
    """What decoding made of puzzles.

    ids: int64 [N, L].
    nfe: int64 [N], forwards in which the puzzle still had a blank.
    batch_nfe: int64 [N], the count published for Sudoku: all forwards of the batch that the puzzle was in, and one
        more.
    """

    ids: torch.Tensor
    nfe: torch.Tensor
    batch_nfe: torch.Tensor


def solve_with(sampler: MDLMSampler, clue_ids: torch.Tensor, tau: float, batch_size: int) -> Solutions:
    """Fills in the masks of `clue_ids` [N, L]: each step commits the surest cells of a puzzle while their summed
    uncertainty stays below `tau`, at least one (arXiv 2605.22967)."""
    config = MDLMSamplerConfig(max_uncertainty=tau)
    ids, nfe, shared = [], [], []
    for batch in clue_ids.split(batch_size):
        output = sampler.infill(batch, config)
        assert output.nfe is not None
        ids.append(output.sequences.cpu())
        nfe.append(output.nfe.cpu())
        shared.append(output.batch_nfe.cpu().expand(len(batch)))
    return Solutions(torch.cat(ids), torch.cat(nfe), torch.cat(shared))


def summarise(found: Solutions, scores: BoardScores, which: torch.Tensor | None = None) -> dict[str, Any]:
    """Means over the puzzles `which`, bool [N] (None: all): number, exact match, token accuracy, legality, NFE per
    puzzle and batch-wide NFE."""
    chosen = torch.ones(len(found.ids), dtype=torch.bool) if which is None else which
    columns = {
        "exact": scores.exact,
        "token_accuracy": scores.token_accuracy,
        "legal": scores.legal,
        "nfe": found.nfe,
        "batch_nfe": found.batch_nfe,
    }
    means = {name: float(column[chosen].double().mean()) for name, column in columns.items()}
    return {"num_puzzles": int(chosen.sum()), **means}


def evaluate(
    sampler: MDLMSampler,
    puzzles: Sequence[Puzzle],
    tokenizer: PreTrainedTokenizerBase,
    taus: Sequence[float],
    batch_size: int,
) -> list[dict[str, Any]]:
    """One entry per tau: `summarise` over all puzzles, and `by_tier` over those of each tier of difficulty."""
    clue_ids = to_ids(tokenizer, [puzzle.clues for puzzle in puzzles])
    entries = []
    for tau in taus:
        found = solve_with(sampler, clue_ids, tau, batch_size)
        scores = score_boards(found.ids, puzzles, tokenizer)
        by_tier = {}
        for tier in TIERS:
            which = torch.tensor([puzzle.tier == tier for puzzle in puzzles])
            if bool(which.any()):
                by_tier[tier] = summarise(found, scores, which)
        entries.append({"tau": tau, **summarise(found, scores), "by_tier": by_tier})
    return entries
