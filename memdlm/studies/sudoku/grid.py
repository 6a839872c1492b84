"""The cells of a Sudoku and what they exclude. A grid is text, row by row: digits, and '.' for a blank."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

BLANK = "."
BLANKS = (BLANK, "0")  # what puzzle files write for a blank
SIDES = (4, 9)


@dataclass(frozen=True)
class Geometry:
    """Cells 0 .. side^2 - 1, row by row.

    side: 4 or 9.
    units: rows, columns and boxes; each a tuple of `side` cells.
    units_of: for each cell the three units it lies in.
    peers: for each cell the cells that share a unit with it, without itself.
    """

    side: int
    units: tuple[tuple[int, ...], ...]
    units_of: tuple[tuple[tuple[int, ...], ...], ...]
    peers: tuple[tuple[int, ...], ...]

    @property
    def digits(self) -> str:
        """ "1234" or "123456789"."""
        return "123456789"[: self.side]

    @property
    def num_cells(self) -> int:
        """16 or 81."""
        return self.side**2


@functools.cache
def geometry(side: int) -> Geometry:
    """The geometry of a side (one of SIDES)."""
    box, span = math.isqrt(side), range(side)
    rows = [tuple(side * i + j for j in span) for i in span]
    columns = [tuple(side * i + j for i in span) for j in span]
    corners = [(i, j) for i in range(0, side, box) for j in range(0, side, box)]
    boxes = [tuple(side * (i + k // box) + j + k % box for k in span) for i, j in corners]
    units = (*rows, *columns, *boxes)
    units_of = tuple(tuple(unit for unit in units if cell in unit) for cell in range(side**2))
    peers = tuple(tuple(sorted({c for unit in own for c in unit} - {cell})) for cell, own in enumerate(units_of))
    return Geometry(side, units, units_of, peers)


def side_of(grid: str) -> int:
    """Side of a grid that has 16 or 81 characters."""
    return math.isqrt(len(grid))


def conflict(grid: str) -> tuple[int, int] | None:
    """The first two cells of a grid (blanks allowed) that share a unit and a digit; None if there are none."""
    for cell, peers in enumerate(geometry(side_of(grid)).peers):
        for peer in peers:
            if peer > cell and grid[cell] != BLANK and grid[cell] == grid[peer]:
                return cell, peer
    return None


def is_complete(grid: str) -> bool:
    """Whether every unit of a grid holds every digit."""
    own = geometry(side_of(grid))
    return all({grid[cell] for cell in unit} == set(own.digits) for unit in own.units)


def canonical(puzzle: str) -> str:
    """The puzzle with its digits renamed in the order in which they first appear: equal for puzzles that differ in the
    names of the digits alone."""
    names: dict[str, str] = {BLANK: BLANK}
    return "".join(names.setdefault(char, str(len(names))) for char in puzzle)
