"""ParametricMemory: the fast weights of one model, and writing them inside a forward of that model.

The layers below `start` (the first one with fast weights) do not depend on the memory. So the states before the anchor
run through them once, batched, without gradients; the anchor's pass through them is the outer forward itself: at the
split point it hands over its hidden state, the inner loop runs on the layers above, and the same forward goes on with
the memory in place. Shapes: B rows, L positions, D hidden, N loss positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dllm.core.schedulers import BaseAlphaScheduler, LinearAlphaScheduler
from dllm.core.split import at_layer
from dllm.models.backbone import Backbone, unwrap
from dllm.models.spec import spec_of
from dllm.utils.parsing import InputError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights, find_targets, first_adapted_layer
from memdlm.memory.inner_loop import InnerReport, InnerStep, fit

LayerInputs = dict[str, Any]
Reduce = Callable[[torch.Tensor], torch.Tensor]


class ParametricMemory:
    """Fast weights over the last layers of a masked-diffusion LM, written by an inner loop (MemDLM, arXiv 2603.22241).

        with memory.attached():                  # hooks in place; gone again after the block, also after an exception
            with memory.writing(steps, ...):
                outputs = model(noised_ids)      # writes at the split point, goes on with the memory
            loss(outputs).backward()             # inside the block: checkpointed layers are recomputed with the memory

    Nothing of it appears in the model's state_dict, parameters, optimizer or gradient norm.

    Args:
        model: a model of `dllm.models`, plain, quantised or wrapped (PEFT, DDP).
        config: the settings.
        scheduler: masking schedule behind the inner loss weight; None is the linear one.

    Raises:
        InputError: targets that match nothing, a fraction that leaves no layer.
    """

    def __init__(self, model: nn.Module, config: MemoryConfig, scheduler: BaseAlphaScheduler | None = None) -> None:
        self.config = config
        self.scheduler = scheduler or LinearAlphaScheduler()
        if config.loss_weight_type == "scheduler" and not isinstance(self.scheduler, LinearAlphaScheduler):
            # A state's t is its share of masks, which is a time of the linear schedule only.
            raise InputError(
                "the inner loss can be weighted by the schedule only if that is linear: use alpha_scheduler linear or "
                "loss_weight_type uniform"
            )
        self.lm = unwrap(model)
        self.backbone = self.lm.backbone
        self.spec = spec_of(self.lm)
        self.start = first_adapted_layer(len(self.backbone.layers), config.inner_layer_fraction)
        targets = find_targets(self.backbone, self.spec, config.target_roles, self.start)
        self.fast = FastWeights(targets, config.inner_rank, config.inner_alpha)
        self.report: InnerReport | None = None  # of the last write

    def attached(self) -> contextlib.AbstractContextManager[FastWeights]:
        """A block in which a memory can be written and is in place; nothing of it stays behind."""
        return self.fast.attached()

    def reset(self) -> None:
        """Takes the memory away: inside `attached()` the model is the base model again, bit for bit."""
        self.fast.set(None)

    def initial(self, *seed_parts: int | str) -> torch.Tensor:
        """phi_0, flat float32 [P] on the model's device, from (config.seed, *seed_parts) alone."""
        return self.fast.initial(self.config.seed, *seed_parts, device=self.backbone.device)

    @torch.no_grad()
    def prefixes(self, steps: Sequence[InnerStep], attention_mask: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Hidden state [B, L, D] before layer `start` of each state, None for the anchor; one batched pass, no
        dropout."""
        own = [step.noised_ids for step in steps if not step.is_anchor]
        if not own:
            return [None] * len(steps)
        mask = None if attention_mask is None else torch.cat([attention_mask] * len(own))
        with evaluating(self.backbone):
            split = self.backbone(input_ids=torch.cat(own), attention_mask=mask, stop_at=self.start)
        hidden = iter(split.hidden.split(own[0].shape[0]))
        return [None if step.is_anchor else next(hidden) for step in steps]

    @contextlib.contextmanager
    def writing(
        self,
        steps: Sequence[InnerStep],
        prefixes: Sequence[torch.Tensor | None],
        input_ids: torch.Tensor,
        *,
        initial: torch.Tensor,
        reduce_gradient: Reduce | None = None,
        before_write: Callable[[torch.Tensor, LayerInputs], None] | None = None,
    ) -> Iterator[None]:
        """While open, a forward of the model on the anchor state writes the memory at the split point and goes on with
        it.

        `report` then holds what happened. The anchor's hidden state is that of the outer forward, with its dropout if
        it has any; the replayed layers run without.

        Args:
            steps: the trajectory; the attention mask of the forward holds for all of its states.
            prefixes: what `prefixes(steps, attention_mask)` gave.
            input_ids: true tokens, int64 [B, L].
            initial: phi_0 (see `initial`).
            reduce_gradient: see `memdlm.memory.inner_loop.fit`.
            before_write: called with (hidden, layer inputs) at the split point, no memory in place, no gradients.

        Raises:
            InputError: the model checkpoints activations in the reentrant way.
        """

        def callback(hidden: torch.Tensor, layer_inputs: LayerInputs) -> torch.Tensor:
            anchor = hidden.detach()
            if before_write is not None:
                self.reset()
                with torch.no_grad(), evaluating(self.backbone), _no_autocast_cache():
                    before_write(anchor, layer_inputs)
            states = [anchor if prefix is None else prefix for prefix in prefixes]
            self._write(steps, states, layer_inputs, input_ids, initial, reduce_gradient)
            return hidden

        _refuse_reentrant(self.backbone)
        with at_layer(self.backbone, self.start, callback):
            yield

    @torch.no_grad()
    def write(
        self,
        steps: Sequence[InnerStep],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        initial: torch.Tensor,
        reduce_gradient: Reduce | None = None,
    ) -> InnerReport:
        """Writes the memory in a pass of its own (every state through the lower layers) and leaves it in place.

        Equals `writing` around a forward, at the price of one more prefix; needs `attached()`. Arguments as there.
        """
        states, layer_inputs = [], {}
        with evaluating(self.backbone):
            for step in steps:
                split = self.backbone(input_ids=step.noised_ids, attention_mask=attention_mask, stop_at=self.start)
                states.append(split.hidden)
                layer_inputs = split.layer_inputs
        return self._write(steps, states, layer_inputs, input_ids, initial, reduce_gradient)

    def readout(self, hidden: torch.Tensor, layer_inputs: LayerInputs, positions: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] that predict the tokens at flat `positions` [N], from the hidden state [B, L, D] before layer
        `start`."""
        recomputes = any(layer.gradient_checkpointing for layer in self.backbone.layers)
        checkpoint = self.config.inner_gradient_checkpointing and recomputes
        last = self.backbone.run_layers(hidden, layer_inputs, self.start, checkpoint=checkpoint)
        return self.lm.head(last.reshape(-1, last.shape[-1])[positions - self.spec.logit_shift])

    def _write(self, steps, states, layer_inputs, input_ids, initial, reduce_gradient) -> InnerReport:
        tokens = input_ids.reshape(-1)

        def readout(index: int) -> tuple[torch.Tensor, torch.Tensor]:
            positions = steps[index].loss_positions
            return self.readout(states[index], layer_inputs, positions), tokens[positions]

        with evaluating(self.backbone):
            report = fit(self.fast, initial, steps, readout, self.config, self.scheduler, reduce_gradient)
        self.report = report
        return report


def _refuse_reentrant(backbone: Backbone) -> None:
    for layer in backbone.layers:
        function: Any = layer._gradient_checkpointing_func if layer.gradient_checkpointing else None
        if function is not None and function.keywords.get("use_reentrant", True):
            raise InputError(
                "memory needs non-reentrant activation checkpointing: enable it with "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode (no dropout) inside the block; each one's own mode again afterwards."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    # autocast keeps the low-precision copy of a weight for the whole forward. A copy made without gradients, used again
    # by the outer forward, would cut that weight off from its gradient.
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
