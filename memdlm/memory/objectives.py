"""Inner objectives: one loss per position from the suffix's logits. An entry in `OBJECTIVES` adds one.

Shapes: N loss positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dllm.core.losses import token_nll

# name -> function(logits [N, V], targets int64 [N]) -> float32 [N]
Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

OBJECTIVES: dict[str, Objective] = {"ce": token_nll}
