"""What the training log says about the memory: sums over writes, and a watch on the gap between the two losses.

Shapes: S inner steps, G memories.
"""

from __future__ import annotations

import torch

from memdlm.memory.inner_loop import InnerReport


class WriteSums:
    """Sums over the writes since the last log, kept on the device until `means` reads them."""

    def __init__(self) -> None:
        self.count = 0
        self._change = torch.zeros(())
        self._steps = torch.zeros(())  # [7, S]

    def add(self, report: InnerReport) -> None:
        """Adds one write."""
        moved = report.skipped == 0  # [S, G]

        def total(values: torch.Tensor) -> torch.Tensor:
            return torch.where(moved, values, torch.zeros_like(values)).sum(dim=1)

        rows = (
            moved.sum(dim=1),
            total(report.losses),
            total(report.grad_norms),
            total(report.changes),
            report.skipped.mean(dim=1),
            report.empty_rows,
            report.bad_rows,
        )
        self.count += 1
        self._steps = self._steps.to(moved.device) + torch.stack([row.double() for row in rows])
        self._change = self._change.to(moved.device) + report.change.mean()

    def means(self) -> dict[str, float]:
        """For the inner steps k = 1..S, over the writes added:

        mem_inner_loss_k, mem_inner_grad_norm_k (before the clip), mem_inner_change_k (|phi_k - phi_{k-1}|): means
            over the memories that moved; a step in which none did has no entry
        mem_inner_skipped_k: share of memories that did not move (nothing to predict, not finite, or no
            slope)
        mem_change: mean |phi_S - phi_0|
        mem_empty_rows, mem_nonfinite_rows: how often a row had nothing to predict in a step, or was left out since
            its loss was not finite; only where it happened
        """
        moved, *sums, skipped, empty, bad = self._steps.tolist()
        values = {"mem_change": float(self._change) / self.count}
        names = ("mem_inner_loss", "mem_inner_grad_norm", "mem_inner_change")
        for step, number in enumerate(moved):
            if number:
                values.update({f"{name}_{step + 1}": row[step] / number for name, row in zip(names, sums, strict=True)})
            values[f"mem_inner_skipped_{step + 1}"] = skipped[step] / self.count
        for name, row in (("mem_empty_rows", empty), ("mem_nonfinite_rows", bad)):
            if sum(row):
                values[name] = sum(row)
        return {name: round(value, 6) for name, value in values.items()}


class GapWatch:
    """Says once that the loss without memory rises while the loss with memory falls.

    Compared are the means of the last `window` logged values and of the `window` before them; both must have moved by
    more than `margin` of themselves, since single batches scatter.
    """

    MESSAGE = (
        "the loss without memory rises while the loss with memory falls: the memory, which has seen the labels, does "
        "the work and the model unlearns it (docs/memory.md); use mem_inner_target=disjoint or prompt, a smaller "
        "mem_inner_lr, or mem_scope=batch where it is row"
    )

    def __init__(self, window: int = 10, margin: float = 0.01) -> None:
        self.window, self.margin = window, margin
        self._with: list[float] = []
        self._without: list[float] = []
        self._told = False

    def grows(self, with_memory: float, without_memory: float) -> bool:
        """Adds a pair of losses; True the first time that they drift apart."""
        self._with.append(with_memory)
        self._without.append(without_memory)
        del self._with[: -2 * self.window], self._without[: -2 * self.window]
        if self._told or len(self._with) < 2 * self.window:
            return False
        self._told = self._drift(self._with) < -self.margin and self._drift(self._without) > self.margin
        return self._told

    def _drift(self, values: list[float]) -> float:
        """Relative change from the older to the newer half."""
        older, newer = sum(values[: self.window]), sum(values[self.window :])
        return (newer - older) / older if older else 0.0
