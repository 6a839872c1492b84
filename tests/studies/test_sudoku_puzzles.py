"""Reading, solving and making Sudoku puzzles."""

import itertools
import random

import pytest

from dllm.utils.parsing import InputError
from memdlm.studies.sudoku.grid import canonical, conflict, geometry, is_complete
from memdlm.studies.sudoku.puzzles import TIERS, Puzzle, check_puzzle, dig, make_puzzles, read_puzzles
from memdlm.studies.sudoku.solver import solve

FULL = "1234341221434321"
# Cells 1, 2, 9 and 10 hold 1 2 / 2 1: without them there are two solutions.
TWO_SOLUTIONS = "..343412" + "..434321"


def all_solutions(puzzle: str) -> set[str]:
    """Every solution of a 4x4 puzzle, by putting all rows together in all ways."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    fitting = [
        [row for row in rows if all(c in (".", d) for c, d in zip(puzzle[4 * i : 4 * i + 4], row, strict=True))]
        for i in range(4)
    ]
    found = set()
    for four in itertools.product(*fitting):
        columns = all(len({row[j] for row in four}) == 4 for j in range(4))
        boxes = all(
            len({four[i + a][j + b] for a in (0, 1) for b in (0, 1)}) == 4 for i, j in itertools.product((0, 2), (0, 2))
        )
        if columns and boxes:
            found.add("".join(four))
    return found


def test_geometry_is_that_of_the_rules():
    for side, box in ((4, 2), (9, 3)):
        own = geometry(side)
        assert len(own.units) == 3 * side and all(len(set(unit)) == side for unit in own.units)
        for a, b in itertools.combinations(range(side**2), 2):
            (i, j), (k, l) = divmod(a, side), divmod(b, side)
            together = i == k or j == l or (i // box, j // box) == (k // box, l // box)
            assert (b in own.peers[a]) == (a in own.peers[b]) == together


def test_the_solver_finds_what_trying_everything_finds():
    rng = random.Random(3)
    counts = set()
    for _ in range(25):
        puzzle = "".join(char if rng.random() < 0.35 else "." for char in FULL)
        wanted = all_solutions(puzzle)
        found = solve(puzzle, limit=1000).solutions
        assert len(found) == len(set(found)) and set(found) == wanted
        assert len(solve(puzzle).solutions) == min(2, len(wanted))
        counts.add(len(wanted))
    assert 1 in counts and max(counts) > 2
    assert len(solve("." * 16, limit=1000).solutions) == 288


def test_guesses_measure_what_singles_leave_open():
    assert solve("." + FULL[1:]).guesses == 0
    both = solve(TWO_SOLUTIONS)
    assert set(both.solutions) == all_solutions(TWO_SOLUTIONS) and both.guesses == 1
    assert solve("11" + "." * 14).solutions == ()


def test_drawing_the_order_of_digits_changes_the_grid_but_not_the_rules():
    grids = {solve("." * 81, limit=1, rng=random.Random(seed)).solutions[0] for seed in range(4)}
    assert len(grids) == 4 and all(is_complete(grid) for grid in grids)


def test_tiers_go_by_guesses():
    names = [Puzzle(FULL, FULL, guesses).tier for guesses in (0, 1, 9, 10, 500)]
    assert names == ["singles", "1-9 guesses", "1-9 guesses", "10+ guesses", "10+ guesses"]
    assert set(names) == set(TIERS)
    with pytest.raises(ValueError, match="not known"):
        assert Puzzle(FULL, FULL).tier


@pytest.mark.parametrize("side, blanks", [(4, (3, 9)), (9, (10, 30))])
def test_made_puzzles_have_one_solution_and_the_asked_blanks(side, blanks):
    made = make_puzzles(side, 12, blanks, seed=5)
    again, other = (make_puzzles(side, 12, blanks, seed=seed) for seed in (5, 6))
    assert made == again and made != other
    assert len({canonical(puzzle.clues) for puzzle in made}) == 12
    for puzzle in made:
        assert blanks[0] <= puzzle.num_blanks <= blanks[1] and is_complete(puzzle.solution)
        assert solve(puzzle.clues).solutions == (puzzle.solution,)
    excluded = {canonical(puzzle.clues) for puzzle in made}
    rest = make_puzzles(side, 12, blanks, seed=5, exclude=excluded)
    assert not excluded & {canonical(puzzle.clues) for puzzle in rest}


def test_what_cannot_be_made_is_an_error():
    with pytest.raises(InputError, match=r"^found only 0 of 3 puzzles of side 4 with 14 to 14 blanks: ask for"):
        make_puzzles(4, 3, (14, 14), seed=0)  # with two clues there are always several solutions
    assert dig(FULL, 14, random.Random(0)) is None


def test_canonical_forms_forget_the_names_of_digits_alone():
    puzzle = "1.34....2.......".replace("3", "4").replace("4", "3", 1)
    renamed = puzzle.translate(str.maketrans("1234", "3142"))
    assert canonical(puzzle) == canonical(renamed) == canonical(canonical(puzzle))
    assert canonical(puzzle) != canonical(puzzle[::-1])
    assert conflict(puzzle) is None


@pytest.mark.parametrize(
    "clues, solution, message",
    [
        ("123", None, "this one has 3"),
        ("12345" + "." * 11, None, "'5' is neither a digit of 1 to 4 nor a blank"),
        ("1x" + "." * 14, None, "'x' is neither"),
        ("1..1" + "." * 12, None, "1 stands in cells 1 and 4"),
        ("1..1" + "." * 12, FULL, "does not keep the clues"),
        ("123." + "...4" + "." * 8, None, "no solution"),
        (TWO_SOLUTIONS, None, "more than one solution"),
        (TWO_SOLUTIONS, FULL, "more than one solution"),
        (FULL, FULL, "has no blank"),
        ("." + FULL[1:], FULL.translate(str.maketrans("12", "21")), "does not keep the clues"),
        ("." + FULL[1:], "1" * 16, "no complete grid"),
        ("." + FULL[1:], "1", "no complete grid"),
    ],
)
def test_bad_puzzles_are_told_with_their_line(tmp_path, clues, solution, message):
    with pytest.raises(InputError, match=message):
        check_puzzle(clues, solution)
    path = tmp_path / "puzzles.csv"
    good = f"0{FULL[1:]},{FULL}"
    path.write_text(f"Puzzle,Solution\n{good}\n{clues},{solution or FULL}\n")
    with pytest.raises(InputError, match=rf"^{path}, line 3: .*--skip_bad True$") as caught:
        read_puzzles(path)
    assert "\n" not in str(caught.value)
    assert [puzzle.clues for puzzle in read_puzzles(path, skip_bad=True)] == ["." + FULL[1:]]


def test_a_stated_solution_may_be_believed():
    assert check_puzzle(TWO_SOLUTIONS, FULL, prove=False) == Puzzle(TWO_SOLUTIONS, FULL, None)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "Sudoku,Solution\n", "no column Puzzle"),
        ("a.csv", "Puzzle,Solution\n", "holds no puzzle"),
        ("a.csv", "Puzzle,Solution\n1\n", "line 2: 1 cells under 2 headings"),
        ("a.txt", "\n\n", "holds no puzzle"),
        ("a.txt", f".{FULL[1:]}\n{'.' * 81}\n", "line 2: the puzzle has more than one"),
        ("a.txt", f".{FULL[1:]}\n{{nine}}\n", "line 2: a puzzle of side 9 among others of 4"),
    ],
)
def test_bad_files_are_told(tmp_path, name, text, message):
    nine = "." + solve("." * 81, limit=1).solutions[0][1:]
    (tmp_path / name).write_text(text.replace("{nine}", nine))
    with pytest.raises(InputError, match=message):
        read_puzzles(tmp_path / name)
    with pytest.raises(InputError, match="no file"):
        read_puzzles(tmp_path / "absent.txt")


def test_plain_lines_are_read(tmp_path):
    path = tmp_path / "puzzles.txt"
    path.write_text(f"\n.{FULL[1:]}\r\n0.{FULL[2:]}\n")
    assert [puzzle.clues for puzzle in read_puzzles(path)] == [f".{FULL[1:]}", f"..{FULL[2:]}"]
    assert [puzzle.clues for puzzle in read_puzzles(path, most=1)] == [f".{FULL[1:]}"]


def test_published_puzzles(shared_dir, tmp_path):
    """Files that others made: their own solutions, where they state any, are those of the solver."""
    path = shared_dir / "data/sudoku/9x9_2000.txt"
    short = tmp_path / "some.txt"
    short.write_text("\n".join(path.read_text().split()[:60]))
    puzzles = read_puzzles(short)
    assert len(puzzles) == 60 and {puzzle.side for puzzle in puzzles} == {9}
    assert len({puzzle.tier for puzzle in puzzles}) == 3
    small = shared_dir / "data/sudoku/4x4_500.csv"
    with pytest.raises(InputError, match="line 10: the puzzle has more than one solution"):
        read_puzzles(small)
    assert len(read_puzzles(small, skip_bad=True)) == 376
