"""Relay and Parametric Memory at once: the memory is written once per training step, before the first forward, and
stays in place for all K.

Shapes: B rows, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dllm.core.noising import derive_seed, make_generator
from dllm.data.collators import Batch
from memdlm.memory.collator import make_plan
from memdlm.memory.plan import Rows
from memdlm.relay.trainer import RelayBD3LMConfig, RelayBD3LMTrainer, RelayTrainer, RelayTrainerConfig
from memdlm.trainer import MemBD3LMConfig, MemBD3LMTrainer, MemDLMConfig, MemDLMTrainer


@dataclass
class MemRelayConfig(RelayTrainerConfig, MemDLMConfig):
    """The settings of `RelayTrainerConfig` and of `MemDLMConfig`."""


@dataclass
class MemRelayBD3LMConfig(RelayBD3LMConfig, MemBD3LMConfig):
    """The settings of `RelayBD3LMConfig` and of `MemBD3LMConfig`."""


class MemRelayTrainer(RelayTrainer, MemDLMTrainer):
    """`RelayTrainer` with the memory of `MemDLMTrainer`.

    The first of a step's K forwards writes the memory, from the state that it sees and with the hidden state that it
    gets, without gradient to either; all K forwards and backward run with it in place. States of the inner loop that
    stand apart from that one (the prompt alone) get what a first forward gets. With `mem_enabled` false this is
    `RelayTrainer`, with `relay_carry` false and uniform states `MemDLMTrainer` with the relay's loss, bit for bit.

    Raises:
        InputError: those of the two.
    """

    args: MemRelayConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, model=None, args: MemRelayConfig | None = None, **kwargs: Any) -> None:
        super().__init__(model=model, args=args, **kwargs)
        if self.memory is not None and self.channel is not None:
            self.memory.alone = self.channel.first_forwards

    def next_rows(self) -> Batch:
        """As in `RelayTrainer`, with the plan of the inner loop."""
        batch = super().next_rows()
        return batch if self.memory is None else {**batch, "memory_plan": self._plan(batch)}

    def _plan(self, batch: Batch) -> dict[str, Any]:
        """The plan for what the buffer holds; made on the CPU like every plan."""
        rows = self.buffer.rows
        assert rows is not None
        cpu = {name: value.cpu() for name, value in batch.items()}
        padding = torch.zeros_like(cpu["maskable"])
        config = self.memory_config
        if config.pad_unmask_mode != "none" or config.inner_target == "prompt":
            padding = torch.arange(padding.shape[1]) >= rows.num_tokens.cpu()[:, None]
        parts = (self.args.seed, "relay memory", self.buffer.num_calls)
        examples = [int(example) for example in cpu["example_id"]]
        plan = make_plan(
            Rows(
                input_ids=cpu["input_ids"],
                maskable=cpu["maskable"],
                is_masked=cpu["is_masked"],
                noised_ids=cpu["noised_ids"],
                is_corrupted=torch.zeros_like(cpu["is_masked"]),
                is_asked=cpu["is_masked"],
                t=cpu["t"].float(),
                is_padding=padding,
                attention_mask=cpu.get("attention_mask"),
                row_seeds=[derive_seed(*parts, example) for example in examples],
                generators=lambda purpose: [make_generator(*parts, example, purpose) for example in examples],
                mask_token_id=self.rule.mask_token_id,
                logit_shift=self.spec.logit_shift,
            ),
            config,
            self.eval_collator.block_size,
        )
        return plan.to(self.args.device).as_batch()


class MemRelayBD3LMTrainer(MemRelayTrainer, RelayBD3LMTrainer, MemBD3LMTrainer):
    """`MemRelayTrainer` for block diffusion.

    Raises:
        InputError: those of `RelayBD3LMTrainer` and `MemBD3LMTrainer`.
    """

    args: MemRelayBD3LMConfig  # pyright: ignore[reportIncompatibleVariableOverride]
