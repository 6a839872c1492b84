"""What a sweep found: cells, their table, their heat map."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One task at one length in one setting.

    setting: "plain" or "memory".
    task: name.
    length: tokens of prompt and answer.
    scores: accuracy of each document, by the depth asked for its needle; None where the task has no single needle.
    seconds: of decoding and writing memories; answers that an earlier run gave took none.
    mean_nfe: forwards per answer.
    num_without_memory: answers without the memory that was asked for.
    """

    setting: str
    task: str
    length: int
    scores: dict[float | None, list[float]]
    seconds: float
    mean_nfe: float
    num_without_memory: int

    @property
    def all_scores(self) -> list[float]:
        """Of all documents."""
        return [score for scores in self.scores.values() for score in scores]

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON; depths become a list, since JSON has no None among keys."""
        return {**vars(self), "scores": [[depth, scores] for depth, scores in self.scores.items()]}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Cell:
        """The cell of `to_json`."""
        return cls(**{**kept, "scores": {depth: scores for depth, scores in kept["scores"]}})

    def row(self) -> dict[str, Any]:
        """The cell in numbers: mean accuracy, its standard error, number of documents, the same by depth."""
        by_depth = [
            {"depth": depth, "accuracy": mean(scores), "n": len(scores)} for depth, scores in self.scores.items()
        ]
        return {
            "task": self.task,
            "length": self.length,
            "setting": self.setting,
            "accuracy": mean(self.all_scores),
            "standard_error": standard_error(self.all_scores),
            "n": len(self.all_scores),
            "by_depth": by_depth,
            "seconds": self.seconds,
            "mean_nfe": self.mean_nfe,
            "num_without_memory": self.num_without_memory,
        }


def mean(scores: Sequence[float]) -> float:
    """sum / number."""
    return math.fsum(scores) / len(scores)


def standard_error(scores: Sequence[float]) -> float | None:
    """Of the mean: sqrt(sum (x - mean)^2 / (n - 1) / n); None for a single score."""
    if len(scores) < 2:
        return None
    middle = mean(scores)
    return math.sqrt(math.fsum((score - middle) ** 2 for score in scores) / (len(scores) - 1) / len(scores))


def _distinct(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def markdown(cells: Sequence[Cell]) -> str:
    """A table with one row per task and length, and per setting the accuracy in percent, its standard error and the
    number of documents, and the seconds."""
    settings = _distinct([cell.setting for cell in cells])
    found = {(cell.task, cell.length, cell.setting): cell for cell in cells}
    headings = [f"{setting}: accuracy, % (n)" for setting in settings] + [f"{setting}: seconds" for setting in settings]
    lines = [f"| task | length, tokens | {' | '.join(headings)} |", f"|---|---:|{'---:|' * len(headings)}"]
    for task, length in _distinct([(cell.task, cell.length) for cell in cells]):
        row = [found[task, length, setting] for setting in settings]
        words = [*(_accuracy(cell) for cell in row), *(f"{cell.seconds:.1f}" for cell in row)]
        lines.append(f"| {task} | {length} | {' | '.join(words)} |")
    failed = sum(cell.num_without_memory for cell in cells)
    if failed:
        lines += ["", f"{failed} answers were made without the memory that was asked for."]
    return "\n".join(lines) + "\n"


def _accuracy(cell: Cell) -> str:
    error = standard_error(cell.all_scores)
    around = "" if error is None else f" +- {100 * error:.1f}"
    return f"{100 * mean(cell.all_scores):.1f}{around} ({len(cell.all_scores)})"


def draw(cells: Sequence[Cell], path: pathlib.Path) -> None:
    """Writes a PNG: for each task and setting a panel of accuracy over context length and needle depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = _distinct([cell.task for cell in cells])
    settings = _distinct([cell.setting for cell in cells])
    lengths = sorted(_distinct([cell.length for cell in cells]))
    figure, axes = plt.subplots(
        len(tasks),
        len(settings),
        figsize=(1.5 + len(settings) * (1.6 + 0.9 * len(lengths)), 1 + 3.1 * len(tasks)),
        squeeze=False,
        layout="constrained",
    )
    image = None
    for row, task in enumerate(tasks):
        for column, setting in enumerate(settings):
            panel = {cell.length: cell for cell in cells if (cell.task, cell.setting) == (task, setting)}
            image = _draw_panel(axes[row][column], panel, lengths)
            axes[row][column].set(title=f"{task}\n{setting}", xlabel="context length (tokens)")
            if column == 0:
                axes[row][column].set_ylabel("needle depth (0 beginning, 1 end)")
    assert image is not None
    figure.colorbar(image, ax=axes, label="accuracy")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_panel(axis: Any, panel: dict[int, Cell], lengths: Sequence[int]) -> Any:
    """A cell per length and depth, with its accuracy and number of documents; gives the image."""
    depths = _distinct([depth for cell in panel.values() for depth in cell.scores])
    depths.sort(key=lambda depth: -1.0 if depth is None else depth)
    values = [[math.nan] * len(lengths) for _ in depths]
    for column, length in enumerate(lengths):
        for row, depth in enumerate(depths):
            scores = panel[length].scores.get(depth)
            if not scores:
                continue
            values[row][column] = mean(scores)
            # cividis is dark at 0 and light at 1, and reads alike with all common kinds of colour vision
            colour = "white" if values[row][column] < 0.5 else "black"
            axis.text(
                column,
                row,
                f"{mean(scores):.2f}\nn={len(scores)}",
                ha="center",
                va="center",
                color=colour,
                fontsize=8,
            )
    image = axis.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_yticks(range(len(depths)), ["any" if depth is None else f"{depth:g}" for depth in depths])
    # White lines between the cells.
    axis.set_xticks([column + 0.5 for column in range(len(lengths) - 1)], minor=True)
    axis.set_yticks([row + 0.5 for row in range(len(depths) - 1)], minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="minor", length=0)
    return image
