"""From grids to tokens and back, and what an answer is worth.

Shapes: N boards, L cells, U units (rows, columns and boxes), S side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dllm.data.collators import IGNORE_INDEX
from dllm.models import ROTARY_ENCODER
from dllm.utils.tokens import token_id
from memdlm.studies.sudoku.grid import BLANK, geometry
from memdlm.studies.sudoku.puzzles import Puzzle

DIGITS = "0123456789"


def digit_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of 17 tokens: the special ones of the rotary encoder (ids 0 to 6), then the digits (7 to 16).

    Args:
        max_length: most tokens of a row that the model takes.
    """
    spec = ROTARY_ENCODER
    vocabulary = {token: index for index, token in enumerate((*spec.special_tokens, *DIGITS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in spec.special_tokens])
    named = {"bos_token": spec.bos_token, "eos_token": spec.eos_token, "pad_token": spec.pad_token}
    named |= {"mask_token": spec.mask_token, "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=max_length,
        chat_template=spec.chat_template,
        clean_up_tokenization_spaces=False,
        **named,
    )


def characters(grids: Sequence[str]) -> torch.Tensor:
    """The characters of grids of one size, uint8 [N, L]; without a loop in Python, since files hold millions."""
    return torch.frombuffer(bytearray("".join(grids).encode("ascii")), dtype=torch.uint8).view(len(grids), -1)


def to_ids(tokenizer: PreTrainedTokenizerBase, grids: Sequence[str]) -> torch.Tensor:
    """Token ids of grids of one size, int64 [N, L]; blanks become masks."""
    vocabulary = tokenizer.get_vocab()
    table = torch.zeros(128, dtype=torch.int64)  # by character
    for char in DIGITS:
        table[ord(char)] = vocabulary[char]
    table[ord(BLANK)] = token_id(tokenizer, "mask_token")
    return table[characters(grids).long()]


def find_blanks(puzzles: Sequence[Puzzle]) -> torch.Tensor:
    """Which cells are to be filled in, bool [N, L]; puzzles of one size."""
    return characters([puzzle.clues for puzzle in puzzles]) == ord(BLANK)


class BoardRows(Dataset):
    """Training rows: the solution is the text, its blanks are what may be masked and is trained on.

    Args:
        puzzles: of one size.
        tokenizer: see `digit_tokenizer`.
    """

    def __init__(self, puzzles: Sequence[Puzzle], tokenizer: PreTrainedTokenizerBase) -> None:
        # 17 tokens fit into a byte, and millions of rows into memory.
        self.ids = to_ids(tokenizer, [puzzle.solution for puzzle in puzzles]).to(torch.uint8)  # [N, L]
        self.is_blank = find_blanks(puzzles)  # [N, L]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        ids = self.ids[index].long()
        labels = torch.where(self.is_blank[index], ids, IGNORE_INDEX)
        return {"input_ids": ids, "labels": labels, "example_id": index}


@dataclass(frozen=True)
class BoardScores:
    """What each answer is worth.

    exact: bool [N], every cell is that of the solution.
    token_accuracy: float64 [N], right share of the cells that were blank.
    legal: bool [N], every cell holds a digit and no unit holds one twice.
    """

    exact: torch.Tensor
    token_accuracy: torch.Tensor
    legal: torch.Tensor


def score_boards(ids: torch.Tensor, puzzles: Sequence[Puzzle], tokenizer: PreTrainedTokenizerBase) -> BoardScores:
    """The worth of answers `ids`, int64 [N, L], to `puzzles` of one size."""
    side = puzzles[0].side
    solutions = to_ids(tokenizer, [puzzle.solution for puzzle in puzzles])
    is_blank = find_blanks(puzzles)  # [N, L]
    right = ids.cpu().eq(solutions)  # [N, L]
    digits = to_ids(tokenizer, [geometry(side).digits])[0]  # [S], ascending
    units = ids.cpu()[:, torch.tensor(geometry(side).units)]  # [N, U, S]
    return BoardScores(
        exact=right.all(dim=1),
        token_accuracy=(right & is_blank).sum(dim=1) / is_blank.sum(dim=1).double(),
        legal=(units.sort(dim=-1).values == digits).all(dim=-1).all(dim=-1),
    )
