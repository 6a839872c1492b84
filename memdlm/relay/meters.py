"""What RelayTrainer logs. Sums stay on the device until they are logged."""

from __future__ import annotations

import torch

from memdlm.relay.rollout import GradientShare, Unrolled


class RelaySums:
    """Sums over the training steps since the last log.

    Args:
        num_steps: K.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.count = 0
        # [4, K]: losses, mask ratios, tokens revealed, and how many forwards had anything masked
        self._sums: torch.Tensor | None = None
        self._gradients: list[GradientShare] = []

    def add(self, made: Unrolled) -> None:
        """Adds a step; its gradient share is read when logging, after backward."""
        parts = (made.losses, made.mask_ratios, made.num_revealed, [ratio > 0 for ratio in made.mask_ratios])
        values = torch.stack([torch.stack([value.float() for value in part]) for part in parts])
        self._sums = values if self._sums is None else self._sums + values
        self._gradients.append(made.gradients)
        self.count += 1

    def logs(self) -> dict[str, float]:
        """Means per step: relay_loss_s (over the steps in which forward s saw a mask), relay_mask_ratio_s,
        relay_revealed_s (tokens) of forward s, and relay_gradient_share (see `GradientShare`); empty before the first
        step."""
        if self._sums is None:
            return {}
        losses, ratios, revealed, counts = self._sums
        means = torch.stack([losses / counts.clamp(min=1), ratios / self.count, revealed / self.count]).tolist()
        logs = {
            f"relay_{name}_{step + 1}": values[step]
            for name, values in zip(("loss", "mask_ratio", "revealed"), means, strict=True)
            for step in range(self.num_steps)
        }
        shares = [share.value() for share in self._gradients if share.relay]
        logs["relay_gradient_share"] = float(torch.stack(shares).mean()) if shares else 0.0
        return logs
