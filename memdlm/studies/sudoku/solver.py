"""Solve a Sudoku, prove its solution unique, and measure how hard it is.

Candidates of a cell are the bits of an integer: bit d - 1 stands for digit d. Whatever follows from singles (a cell
with one candidate left, a digit with one cell of a unit left) is done at once; then the solver guesses in the cell with
the fewest candidates.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from memdlm.studies.sudoku.grid import BLANK, Geometry, geometry, side_of


@dataclass(frozen=True)
class Solved:
    """What a search found.

    solutions: in the order found, at most as many as asked for.
    guesses: cells in which the search had to try several digits, until it ended. With a limit of 2 the search also
        proves that there is one solution only; 0 then means that singles solve the puzzle.
    """

    solutions: tuple[str, ...]
    guesses: int


def solve(puzzle: str, limit: int = 2, rng: random.Random | None = None) -> Solved:
    """The solutions of a puzzle, up to `limit` of them, and the guesses that it took.

    Args:
        puzzle: 16 or 81 characters, digits and '.'.
        limit: end the search when so many are found, at least 1.
        rng: order in which a guess tries the digits; None: ascending, the same on every machine.
    """
    search = _Search(geometry(side_of(puzzle)), rng)
    candidates = search.start(puzzle)
    found: list[str] = []
    if candidates is not None:
        for solution in search.solutions(candidates):
            found.append(solution)
            if len(found) == limit:
                break
    return Solved(tuple(found), search.guesses)


@dataclass
class _Search:
    geometry: Geometry
    rng: random.Random | None
    guesses: int = field(default=0, init=False)

    def start(self, puzzle: str) -> list[int] | None:
        """Candidates of every cell once the clues are placed; None if they contradict each other."""
        candidates = [(1 << self.geometry.side) - 1] * self.geometry.num_cells
        for cell, char in enumerate(puzzle):
            if char != BLANK and not self._place(candidates, cell, 1 << (int(char) - 1)):
                return None
        return candidates

    def solutions(self, candidates: list[int]) -> Iterator[str]:
        """All grids that agree with the candidates."""
        open_cells = [(bits.bit_count(), cell) for cell, bits in enumerate(candidates) if bits & (bits - 1)]
        if not open_cells:
            yield "".join(str(bits.bit_length()) for bits in candidates)
            return
        self.guesses += 1
        _, cell = min(open_cells)
        digits = [1 << d for d in range(self.geometry.side) if candidates[cell] >> d & 1]
        if self.rng is not None:
            self.rng.shuffle(digits)
        for digit in digits:
            tried = candidates.copy()
            if self._place(tried, cell, digit):
                yield from self.solutions(tried)

    def _place(self, candidates: list[int], cell: int, digit: int) -> bool:
        """Leaves `digit` alone in a cell and draws the consequences; False if that is a contradiction."""
        others, place = candidates[cell] & ~digit, 1
        if not candidates[cell] & digit:
            return False
        while others:
            if others & 1 and not self._rule_out(candidates, cell, place):
                return False
            others, place = others >> 1, place << 1
        return True

    def _rule_out(self, candidates: list[int], cell: int, digit: int) -> bool:
        if not candidates[cell] & digit:
            return True
        left = candidates[cell] & ~digit
        candidates[cell] = left
        if not left:
            return False
        if not left & (left - 1):
            for peer in self.geometry.peers[cell]:
                if candidates[peer] & left and not self._rule_out(candidates, peer, left):
                    return False
        for unit in self.geometry.units_of[cell]:
            places = [other for other in unit if candidates[other] & digit]
            if not places:
                return False
            if len(places) == 1 and not self._place(candidates, places[0], digit):
                return False
        return True
