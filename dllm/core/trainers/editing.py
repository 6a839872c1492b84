"""What a trainer does for the editing objective beside the loss: ask the model for wrong tokens, and count repairs.

Shapes: B rows, L positions, N loss positions of the batch, M wrong tokens among them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dllm.core.editing import CORRUPTED, KEPT, MASKED, likeliest_wrong_tokens
from dllm.core.losses import row_sums, token_nll
from dllm.core.trainers.meters import MeanMetric
from dllm.data.collators import Batch

# name of what is measured -> the kind of loss position that it is a mean over
MEANS = {"masked_loss": MASKED, "edit_loss": CORRUPTED, "repair_rate": CORRUPTED, "false_edit_rate": KEPT}


class Editor:
    """Wrong tokens and repairs of one training run. Sums stay on the device until `logs` reads them.

    Measured are, as plain means whatever the weights in the loss:
        masked_loss      cross-entropy at masked positions, in a state that holds wrong tokens too
        edit_loss        cross-entropy at replaced positions
        repair_rate      share of replaced positions whose likeliest token is the true one
        false_edit_rate  share of kept positions whose likeliest token is not the (true) one that stands there

    Args:
        replacements: ids that may stand in as wrong tokens, int64 [A].
        device: of the sums.
    """

    def __init__(self, replacements: torch.Tensor, device: torch.device) -> None:
        self.replacements = replacements.to(device)
        self._sums = torch.zeros(2, len(MEANS), device=device, dtype=torch.float64)

    def eval_metrics(self) -> dict[str, MeanMetric]:
        """One metric for every measure."""
        return {name: MeanMetric() for name in MEANS}

    def fill(self, edited: Batch, logits: torch.Tensor) -> Batch:
        """The batch with the model's likeliest wrong tokens at its corrupted positions.

        Args:
            edited: a batch under the editing objective, masks standing where wrong tokens are to come.
            logits: what the model predicts there, [M, V].
        """
        positions = edited["corrupted_positions"]
        is_allowed = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        is_allowed[self.replacements.to(logits.device)] = True
        wrong = likeliest_wrong_tokens(logits, edited["input_ids"].reshape(-1)[positions], is_allowed)
        ids = edited["noised_ids"].reshape(-1).index_copy(0, positions, wrong)
        return {**edited, "noised_ids": ids.view_as(edited["noised_ids"])}

    @torch.no_grad()
    def row_sums(self, logits: torch.Tensor, edited: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """name -> (sum over each row's positions of that kind, how many there are), float32 [B] each.

        Args:
            logits: [N, V] at the batch's loss positions.
            edited: a batch under the editing objective.
        """
        positions, kinds = edited["loss_positions"], edited["loss_kind"]
        targets = edited["input_ids"].reshape(-1)[positions]
        nll = token_nll(logits, targets)
        hits = (logits.argmax(dim=-1) == targets).to(nll.dtype)
        ones, length = torch.ones_like(edited["t"]), edited["input_ids"].shape[1]
        values = {"masked_loss": nll, "edit_loss": nll, "repair_rate": hits, "false_edit_rate": 1 - hits}
        sums = {}
        for name, kind in MEANS.items():
            chosen = (kinds == kind).to(nll.dtype)
            # where, not a product: a loss of one kind that is not finite must not spoil the sum of another.
            terms = torch.where(kinds == kind, values[name], torch.zeros_like(nll))
            sums[name] = tuple(row_sums(part, positions, length, ones) for part in (terms, chosen))
        return sums

    def add(self, logits: torch.Tensor, edited: Batch) -> None:
        """Adds a training batch; arguments as in `row_sums`."""
        sums = self.row_sums(logits.detach(), edited).values()
        self._sums += torch.stack([torch.stack([part.sum() for part in pair]) for pair in sums], dim=1)

    def logs(self, over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The means since the last call, of those measures that had a position.

        Args:
            over_ranks: adds a tensor up over all ranks.
        """
        totals, counts = over_ranks(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        return {
            name: round(total / count, 6) for name, total, count in zip(MEANS, totals, counts, strict=True) if count
        }
