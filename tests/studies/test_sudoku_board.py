"""Tokens of a grid, training rows, and the worth of answers."""

import torch
from transformers import AutoTokenizer

from memdlm.studies.sudoku.board import BoardRows, digit_tokenizer, find_blanks, score_boards, to_ids
from memdlm.studies.sudoku.puzzles import Puzzle, make_puzzles

FULL = "1234341221434321"


def test_the_published_ids(tmp_path):
    tokenizer = digit_tokenizer(85)
    names = ["[PAD]", "[CLS]", "[MASK]", "[EOS]", "[BOS]", "[SEP]", "[UNK]", *"0123456789"]
    assert tokenizer.convert_ids_to_tokens(list(range(17))) == names and len(tokenizer) == 17
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    ids = again("530 9[MASK]1", add_special_tokens=False)["input_ids"]
    assert ids == [12, 10, 7, 6, 16, 2, 8]
    assert again.decode([12, 10, 2, 16]) == "53[MASK]9" and again.decode([12, 10], skip_special_tokens=True) == "53"
    assert (again.mask_token_id, again.pad_token_id, again.eos_token_id, again.bos_token_id) == (2, 0, 3, 4)


def test_grids_become_ids():
    ids = to_ids(digit_tokenizer(85), [FULL, "." + FULL[1:]])
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == [int(char) + 7 for char in FULL] and ids[1].tolist() == [2, *ids[0, 1:].tolist()]


def test_training_rows_ask_for_the_blanks_alone():
    tokenizer = digit_tokenizer(85)
    puzzles = make_puzzles(4, 5, (3, 9), seed=0)
    rows = BoardRows(puzzles, tokenizer)
    assert len(rows) == 5
    for index, puzzle in enumerate(puzzles):
        row = rows[index]
        assert row["example_id"] == index
        assert tokenizer.decode(row["input_ids"]) == puzzle.solution
        for cell, label in enumerate(row["labels"].tolist()):
            assert label == (row["input_ids"][cell] if puzzle.clues[cell] == "." else -100)
    assert find_blanks(puzzles).sum(dim=1).tolist() == [puzzle.num_blanks for puzzle in puzzles]


def test_scores_against_a_loop_over_cells():
    """Answers with random mistakes, also special tokens and a digit that the small grid does not have."""
    tokenizer, generator = digit_tokenizer(85), torch.Generator().manual_seed(1)
    puzzles = make_puzzles(4, 30, (2, 8), seed=3)
    ids = to_ids(tokenizer, [puzzle.solution for puzzle in puzzles])
    wrong = torch.rand(ids.shape, generator=generator) < 0.08
    ids = torch.where(find_blanks(puzzles) & wrong, torch.randint(0, 17, ids.shape, generator=generator), ids)
    scores = score_boards(ids, puzzles, tokenizer)
    seen = set()
    for index, (row, puzzle) in enumerate(zip(ids.tolist(), puzzles, strict=True)):
        grid = [tokenizer.convert_ids_to_tokens(token) for token in row]
        blanks = [cell for cell in range(16) if puzzle.clues[cell] == "."]
        right = [grid[cell] == puzzle.solution[cell] for cell in blanks]
        legal = all(char in "1234" for char in grid)
        for i in range(16):
            for j in range(i):
                box = (i // 8 == j // 8) and (i % 4 // 2 == j % 4 // 2)
                legal &= not (grid[i] == grid[j] and (i // 4 == j // 4 or i % 4 == j % 4 or box))
        assert bool(scores.exact[index]) == all(right)
        assert float(scores.token_accuracy[index]) == sum(right) / len(right)
        assert bool(scores.legal[index]) == legal
        seen.add((bool(scores.exact[index]), legal))
    assert {(True, True), (False, False)} <= seen


def test_a_legal_grid_need_not_be_the_solution():
    """Legality looks at the rules alone."""
    other = FULL.translate(str.maketrans("12", "21"))
    tokenizer = digit_tokenizer(85)
    puzzle = Puzzle("." * 16, FULL)
    scores = score_boards(to_ids(tokenizer, [other]), [puzzle], tokenizer)
    assert bool(scores.legal) and not bool(scores.exact) and float(scores.token_accuracy) == 0.5
