"""RolloutBuffer: rows at different stages of their denoising, on the device, from training step to training step.

Shapes: B rows (places), L columns of the longest row, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F

from dllm.core.noising import apply_mask
from dllm.data.collators import Batch
from dllm.utils.parsing import InputError


@dataclass
class Rollout:
    """The rows of a buffer. What a row does not have (it is shorter than L) is padding: never maskable."""

    input_ids: torch.Tensor  # [B, L] int64, true tokens
    maskable: torch.Tensor  # [B, L] bool, what decoding would have to fill in
    is_masked: torch.Tensor  # [B, L] bool, what is not revealed yet
    length: torch.Tensor  # [B] int64, columns of each row as the collator padded it
    num_tokens: torch.Tensor  # [B] int64, tokens of each row before that
    example_id: torch.Tensor  # [B] int64
    hidden: torch.Tensor  # [B, L, D] float32, state of the last forward, detached; zeros for a fresh row
    is_set: torch.Tensor  # [B] bool, whether there was a forward
    attention_mask: torch.Tensor | None = None  # [B, L] int64, only if the collator makes one


# Padding of a row up to L, by field; `input_ids` is padded with the pad token.
_FILL = {"maskable": False, "is_masked": False, "hidden": 0.0, "attention_mask": 0}


class RolloutBuffer:
    """`capacity` rows in the middle of their denoising; a row leaves when nothing of it is masked any more.

    Args:
        capacity: rows, at least 1.
        size: D.
        mask_token_id, pad_token_id: ids.
        device: where the rows live.
    """

    def __init__(
        self, capacity: int, size: int, mask_token_id: int, pad_token_id: int, device: torch.device | str
    ) -> None:
        self.capacity, self.size = capacity, size
        self.mask_token_id, self.pad_token_id = mask_token_id, pad_token_id
        self.device = torch.device(device)
        self.rows: Rollout | None = None
        self.num_refilled = 0  # rows that have come in
        self.num_calls = 0  # of `refill`, that is training steps

    def refill(self, take: Callable[[int], Sequence[Batch]]) -> None:
        """Rows that are done give their places to fresh ones: all maskable positions masked, the state zero.

        The host waits here for the device, once per call: it must know how many rows are done.

        Args:
            take: number -> so many rows, or fewer where there are no more: {"input_ids" [l], "maskable" [l],
                "example_id", "num_tokens"[, "attention_mask" [l]]} each.

        Raises:
            InputError: no rows at all.
        """
        kept = [] if self.rows is None else torch.nonzero(self.rows.is_masked.any(dim=1))[:, 0].tolist()
        fresh = [self._fresh(row) for row in take(self.capacity - len(kept))]
        self.num_refilled += len(fresh)
        self.num_calls += 1
        if not kept and not fresh:
            raise InputError("there is no row to train on: give a data set with rows")
        parts = ([] if self.rows is None or not kept else [_select(self.rows, kept)]) + fresh
        longest = max(int(part.length.max()) for part in parts)
        self.rows = _stack([self._to_length(part, longest) for part in parts])

    def _fresh(self, row: Batch) -> Rollout:
        ids = row["input_ids"].to(self.device)[None]
        maskable = row["maskable"].to(self.device)[None]
        mask = row.get("attention_mask")
        return Rollout(
            input_ids=ids,
            maskable=maskable,
            is_masked=maskable.clone(),
            length=torch.tensor([ids.shape[1]], device=self.device),
            num_tokens=torch.as_tensor(row["num_tokens"], device=self.device).reshape(1),
            example_id=torch.as_tensor(row["example_id"], device=self.device).reshape(1),
            hidden=torch.zeros(1, ids.shape[1], self.size, device=self.device),
            is_set=torch.zeros(1, dtype=torch.bool, device=self.device),
            attention_mask=None if mask is None else mask.to(self.device)[None],
        )

    def _to_length(self, part: Rollout, length: int) -> Rollout:
        """`part` padded or cut to `length` columns; what is cut off is padding."""
        values = {}
        for name, value in _tensors(part).items():
            if value.dim() > 1:
                fill = self.pad_token_id if name == "input_ids" else _FILL[name]
                behind = length - value.shape[1]
                pad = (0, 0, 0, behind) if value.dim() == 3 else (0, behind)
                value = F.pad(value, pad, value=fill)
            values[name] = value
        return Rollout(**values)

    @property
    def noised_ids(self) -> torch.Tensor:
        """The states, int64 [B, L]."""
        assert self.rows is not None
        return apply_mask(self.rows.input_ids, self.rows.is_masked, self.mask_token_id)

    def store(self, is_masked: torch.Tensor, hidden: torch.Tensor | None) -> None:
        """Notes where a training step has brought the rows.

        Args:
            is_masked: bool [B, L].
            hidden: [B, L, D], state of the last forward; detached and kept in float32. A row whose state is not finite
                goes on without one. None: nothing is carried.
        """
        assert self.rows is not None
        self.rows.is_masked = is_masked
        if hidden is not None:
            state = hidden.detach().float()
            self.rows.is_set = state.isfinite().all(dim=2).all(dim=1)
            self.rows.hidden = torch.where(self.rows.is_set[:, None, None], state, 0)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All rows, by field; empty before the first refill."""
        counts = {"num_refilled": torch.tensor(self.num_refilled), "num_calls": torch.tensor(self.num_calls)}
        return counts | ({} if self.rows is None else _tensors(self.rows))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on with the rows of `state_dict`.

        Raises:
            InputError: they are more than the buffer holds, or their states of another width.
        """
        values = {name: value.to(self.device) for name, value in state.items()}
        self.num_refilled, self.num_calls = int(values.pop("num_refilled")), int(values.pop("num_calls"))
        rows = Rollout(**values) if values else None
        if rows is not None and (len(rows.length) > self.capacity or rows.hidden.shape[-1] != self.size):
            raise InputError(
                f"the checkpoint's rollout has {len(rows.length)} rows of width {rows.hidden.shape[-1]}, this run "
                f"{self.capacity} of width {self.size}: resume with the same model and per_device_train_batch_size"
            )
        self.rows = rows


def _tensors(rows: Rollout) -> dict[str, torch.Tensor]:
    values: dict[str, Any] = {field.name: rows.__dict__[field.name] for field in fields(rows)}
    return {name: value for name, value in values.items() if value is not None}


def _select(rows: Rollout, which: list[int]) -> Rollout:
    return Rollout(**{name: value[which] for name, value in _tensors(rows).items()})


def _stack(parts: Sequence[Rollout]) -> Rollout:
    named = [_tensors(part) for part in parts]
    if any(part.keys() != named[0].keys() for part in named):
        raise InputError("some batches have an attention_mask and others have none: make the data collator consistent")
    return Rollout(**{name: torch.cat([part[name] for part in named]) for name in named[0]})
