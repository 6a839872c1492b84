"""Puzzles with one solution: read from files, or made from a seed; and how hard they are."""

from __future__ import annotations

import csv
import pathlib
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from dllm.core.noising import derive_seed
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError
from memdlm.studies.sudoku.grid import BLANK, BLANKS, SIDES, canonical, conflict, geometry, is_complete, side_of
from memdlm.studies.sudoku.solver import solve

logger = get_default_logger(__name__)

# Most guesses of `solve` in a tier; the last holds the rest.
TIERS: dict[str, int | None] = {"singles": 0, "1-9 guesses": 9, "10+ guesses": None}
_PUZZLE_NAMES = ("puzzle", "question", "quizzes", "quiz")
_SOLUTION_NAMES = ("solution", "answer", "solutions")
_MOST_TRIES = 200  # grids that are dug out for one puzzle before giving up


@dataclass(frozen=True)
class Puzzle:
    """A puzzle with its one solution.

    clues: 16 or 81 characters, digits and '.'.
    solution: the same with a digit in every cell.
    guesses: that the solver needed (see `memdlm.studies.sudoku.solver.Solved`); None where it did not run.
    """

    clues: str
    solution: str
    guesses: int | None = None

    @property
    def side(self) -> int:
        """4 or 9."""
        return side_of(self.clues)

    @property
    def num_blanks(self) -> int:
        """Cells to be filled in."""
        return self.clues.count(BLANK)

    @property
    def tier(self) -> str:
        """Name of its tier of difficulty, one of TIERS.

        Raises:
            ValueError: the solver did not run.
        """
        if self.guesses is None:
            raise ValueError("the difficulty of a puzzle that was not solved is not known")
        return next(name for name, most in TIERS.items() if most is None or self.guesses <= most)


def check_puzzle(clues: str, solution: str | None = None, prove: bool = True) -> Puzzle:
    """The puzzle, with its solution.

    Args:
        clues: digits, and '.' or '0' for blanks.
        solution: as a file states it; None: it is searched for.
        prove: search for a second solution; False believes a stated solution that breaks no rule.

    Raises:
        InputError: of another length, with other characters, without a blank, with clues that exclude each other,
            without a solution, with more than one, or with a stated one that is wrong.
    """
    if len(clues) not in [side**2 for side in SIDES]:
        raise InputError(f"a puzzle has 16 or 81 characters, this one has {len(clues)}")
    clues = "".join(BLANK if char in BLANKS else char for char in clues)
    digits = geometry(side_of(clues)).digits
    strange = [char for char in clues if char != BLANK and char not in digits]
    if strange:
        raise InputError(f"{strange[0]!r} is neither a digit of {digits[0]} to {digits[-1]} nor a blank ('.' or '0')")
    if BLANK not in clues:
        raise InputError("the puzzle has no blank: there is nothing to fill in")
    if solution is not None:
        _check_solution(clues, solution)
        if not prove:
            return Puzzle(clues, solution)
    pair = conflict(clues)
    if pair is not None:
        raise InputError(
            f"the clues exclude each other: {clues[pair[0]]} stands in cells {pair[0] + 1} and {pair[1] + 1}"
        )
    found = solve(clues)
    if not found.solutions:
        raise InputError("the puzzle has no solution")
    only, *more = found.solutions
    if more:
        raise InputError("the puzzle has more than one solution")
    return Puzzle(clues, only, found.guesses)


def _check_solution(clues: str, solution: str) -> None:
    if len(solution) != len(clues) or not is_complete(solution):
        raise InputError("its stated solution is no complete grid")
    if any(clue not in (BLANK, digit) for clue, digit in zip(clues, solution, strict=True)):
        raise InputError("its stated solution does not keep the clues")


def read_puzzles(
    path: str | pathlib.Path, prove: bool = True, skip_bad: bool = False, most: int | None = None
) -> list[Puzzle]:
    """The puzzles of a file, in its order.

    A `.csv` file has a header with a column Puzzle (or Question) and may have one Solution (or Answer); any other file
    has one puzzle per line. Empty lines do not count.

    Args:
        path: the file.
        prove: see `check_puzzle`.
        skip_bad: leave out the lines that `check_puzzle` refuses, and log how many.
        most: end with so many puzzles; None: read the whole file.

    Raises:
        InputError: no such file, no such column, no puzzle, puzzles of two sizes; or, with the number of the line, what
            `check_puzzle` says.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path} is no file: give a file of puzzles (81 or 16 characters per line, or a csv)")
    puzzles: list[Puzzle] = []
    bad: list[str] = []
    for line, clues, solution in _entries(path):
        try:
            puzzle = check_puzzle(clues, solution, prove)
        except InputError as error:
            bad.append(f"{path}, line {line}: {error}")
            if not skip_bad:
                raise InputError(f"{bad[0]}; correct or delete it, or drop such lines with --skip_bad True") from None
            continue
        if puzzles and puzzle.side != puzzles[0].side:
            raise InputError(f"{path}, line {line}: a puzzle of side {puzzle.side} among others of {puzzles[0].side}")
        puzzles.append(puzzle)
        if len(puzzles) == most:
            break
    if not puzzles:
        raise InputError(f"{path} holds no puzzle{f' that can be used ({bad[0]})' if bad else ''}: give another file")
    if bad:
        logger.warning(f"{len(bad)} of {len(bad) + len(puzzles)} puzzles are left out, the first one: {bad[0]}")
    return puzzles


def _entries(path: pathlib.Path) -> Iterator[tuple[int, str, str | None]]:
    """(number of the line, puzzle, stated solution or None) of every line that is not empty."""
    # Bytes that are no text become characters that no puzzle has.
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        if path.suffix != ".csv":
            yield from ((number, line.strip(), None) for number, line in enumerate(file, 1) if line.strip())
            return
        rows = csv.reader(file)
        header = [name.strip().lower() for name in next(rows, [])]
        puzzle = _column(header, _PUZZLE_NAMES)
        if puzzle is None:
            raise InputError(f"{path} has no column Puzzle (it has: {', '.join(header)}): name it in the first line")
        solution = _column(header, _SOLUTION_NAMES)
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise InputError(f"{path}, line {rows.line_num}: {len(row)} cells under {len(header)} headings")
            yield rows.line_num, row[puzzle].strip(), None if solution is None else row[solution].strip()


def _column(header: list[str], names: tuple[str, ...]) -> int | None:
    return next((index for index, name in enumerate(header) if name in names), None)


def make_puzzles(
    side: int, count: int, blanks: tuple[int, int], seed: int, exclude: Collection[str] = ()
) -> list[Puzzle]:
    """`count` puzzles, no two of them equal up to the names of the digits; the same arguments give the same ones.

    A full grid is drawn, and cells of it are blanked in random order wherever that leaves one solution, until their
    number is reached.

    Args:
        side: 4 or 9.
        count: number of puzzles.
        blanks: fewest and most blanks; each puzzle draws its number in between.
        seed: of all draws.
        exclude: `canonical` forms that must not come up.

    Raises:
        InputError: no puzzle with so many blanks, or not so many puzzles, were found.
    """
    rng = random.Random(derive_seed("sudoku", side, blanks[0], blanks[1], seed))
    seen, made = set(exclude), []
    failures = 0
    while len(made) < count:
        puzzle = dig(_full_grid(side, rng), rng.randint(*blanks), rng)
        form = None if puzzle is None else canonical(puzzle.clues)
        if puzzle is None or form is None or form in seen:
            failures += 1
            if failures > _MOST_TRIES:
                raise InputError(
                    f"found only {len(made)} of {count} puzzles of side {side} with {blanks[0]} to {blanks[1]} blanks: "
                    "ask for fewer puzzles, or for other numbers of blanks"
                )
            continue
        failures = 0
        seen.add(form)
        made.append(puzzle)
    return made


def _full_grid(side: int, rng: random.Random) -> str:
    return solve(BLANK * side**2, limit=1, rng=rng).solutions[0]


def dig(solution: str, num_blanks: int, rng: random.Random) -> Puzzle | None:
    """A puzzle with this solution, and no other, and so many blanks; None if this order of cells leads to none."""
    clues, left = list(solution), num_blanks
    for cell in rng.sample(range(len(clues)), len(clues)):
        if left == 0:
            break
        clues[cell] = BLANK
        if len(solve("".join(clues)).solutions) == 1:
            left -= 1
        else:
            clues[cell] = solution[cell]
    text = "".join(clues)
    return Puzzle(text, solution, solve(text).guesses) if left == 0 else None
