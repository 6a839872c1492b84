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
        self._sums: torch.Tensor | None = None  # [3, K]: losses, mask ratios, tokens revealed
        self._gradients: list[GradientShare] = []

    def add(self, made: Unrolled) -> None:
        """Adds a step; its gradient share is read when logging, after backward."""
        parts = (made.losses, made.mask_ratios, made.num_revealed)
        values = torch.stack([torch.stack([value.float() for value in part]) for part in parts])
        self._sums = values if self._sums is None else self._sums + values
        self._gradients.append(made.gradients)
        self.count += 1

    def logs(self) -> dict[str, float]:
        """Means per step: relay_loss_s, relay_mask_ratio_s, relay_revealed_s (tokens) of forward s, and
        relay_gradient_share (see `GradientShare`); empty before the first step."""
        if self._sums is None:
            return {}
        means = (self._sums / self.count).tolist()
        logs = {
            f"relay_{name}_{step + 1}": values[step]
            for name, values in zip(("loss", "mask_ratio", "revealed"), means, strict=True)
            for step in range(self.num_steps)
        }
        shares = [share.value() for share in self._gradients if share.relay]
        logs["relay_gradient_share"] = float(torch.stack(shares).mean()) if shares else 0.0
        return logs
