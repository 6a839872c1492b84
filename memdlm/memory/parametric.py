"""ParametricMemory: the fast weights of one model, and writing them inside a forward of that model.

The layers below `start` (the first one with fast weights) do not depend on the memory. So the states that are known
before the outer forward run through them once, batched, without gradients; the anchor's pass through them is the outer
forward itself: at the split point it hands over its hidden state, the inner loop runs on the layers above, and the same
forward goes on with the memory in place. Shapes: B rows, L positions, D hidden, N loss positions, V vocabulary,
G memories of P numbers (1 for scope batch, B for scope row).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dllm.core.modes import evaluating
from dllm.core.schedulers import BaseAlphaScheduler, LinearAlphaScheduler
from dllm.core.split import at_layer
from dllm.models.backbone import unwrap
from dllm.models.layers import pick
from dllm.models.moe import RoutedExperts
from dllm.models.spec import spec_of
from dllm.utils.parsing import InputError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.export import export_adapter
from memdlm.memory.fast_weights import FastWeights, find_targets, first_adapted_layer
from memdlm.memory.guards import refuse_compiled, refuse_reentrant
from memdlm.memory.inner_loop import InnerReport, Network, fit, no_autocast_cache
from memdlm.memory.plan import InnerPlan, plan_prompts
from memdlm.memory.prompts import Prompt, WrittenMemory, stack_memories, write_prompts
from memdlm.memory.store import load_memory, save_memory

LayerInputs = dict[str, Any]
Reduce = Callable[[torch.Tensor], torch.Tensor]
Observer = Callable[[torch.Tensor, LayerInputs], None]


@dataclass(frozen=True)
class Prefixes:
    """What the layers below `start` made of a plan's states.

    hidden: [B, L, D] of each state; None where it comes from the outer forward.
    layer_inputs: of these states; None where those of the outer forward hold.
    """

    hidden: list[torch.Tensor | None]
    layer_inputs: LayerInputs | None


class ParametricMemory:
    """Fast weights over the last layers of a masked-diffusion LM, written by an inner loop (MemDLM, arXiv 2603.22241).

        with memory.attached():                           # hooks in place; gone after the block, also by an exception
            with memory.writing(plan, memory.prefixes(plan), initial):
                outputs = model(noised_ids)               # writes at the split point, goes on with the memory
            loss(outputs).backward()                      # inside: checkpointed layers are recomputed with the memory

        with memory.attached():                           # outside training
            memory.adapt(prompts)                         # one memory per prompt, in place for the coming forwards
            sampler.sample(prompts, ...)                  # decodes with them
            memory.reset()                                # the base model again

    Nothing of it appears in the model's state_dict, parameters, optimizer or gradient norm.

    Args:
        model: a model of `dllm.models`, plain, quantised or wrapped (PEFT, DDP).
        config: the settings.
        scheduler: masking schedule behind the inner loss weight; None is the linear one.
        mask_token_id: for memories written from prompts; None: that of the model's configuration.

    Raises:
        InputError: targets that match nothing, a fraction that leaves no layer, weights of a schedule that is not
            linear, a compiled model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MemoryConfig,
        scheduler: BaseAlphaScheduler | None = None,
        *,
        mask_token_id: int | None = None,
    ) -> None:
        self.config = config
        self.scheduler = scheduler or LinearAlphaScheduler()
        if config.loss_weight_type == "scheduler" and not isinstance(self.scheduler, LinearAlphaScheduler):
            # A state's t is its share of masks, which is a time of the linear schedule only.
            raise InputError(
                "the inner loss can be weighted by the schedule only if that is linear: use alpha_scheduler linear or "
                "loss_weight_type uniform"
            )
        refuse_compiled(model)
        self.lm = unwrap(model)
        self.backbone = self.lm.backbone
        self.spec = spec_of(self.lm)
        self.start = first_adapted_layer(len(self.backbone.layers), config.inner_layer_fraction)
        targets = find_targets(self.backbone, self.spec, config.target_roles, self.start)
        adapted = list(self.backbone.layers)[self.start :]
        routed = [part for layer in adapted for part in layer.modules() if isinstance(part, RoutedExperts)]
        self.fast = FastWeights(targets, routed, config, self.backbone.embedding.weight.dtype)
        self._mask_token_id: int | None = self.lm.config.mask_token_id if mask_token_id is None else mask_token_id
        self._placed: tuple[WrittenMemory, ...] = ()  # what `place` put in place
        self.report: InnerReport | None = None  # of the last write
        # Around prefixes and inner loops; a DeviceTimer measures them.
        self.timer: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        # See `Network.lockstep`: set where an engine shares out the weights over ranks.
        self.lockstep = False
        # Around the backward passes of the inner loop, which run inside a forward: the engine may have to know.
        self.inner_backward: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        # Around forwards on states of their own (prompts): whoever carries a state from forward to forward stops here.
        self.alone: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def attached(self) -> contextlib.AbstractContextManager[FastWeights]:
        """A block in which a memory can be written and is in place; nothing of it stays behind.

        Raises:
            InputError: the model has been compiled.
            RuntimeError: already attached.
        """
        refuse_compiled(self.lm)
        return self._attached()

    @contextlib.contextmanager
    def _attached(self) -> Iterator[FastWeights]:
        with self.fast.attached() as fast:
            try:
                yield fast
            finally:
                self._placed = ()

    def reset(self) -> None:
        """Takes the memory away: inside `attached()` the model is the base model again, bit for bit."""
        self.fast.set(None)
        self._placed = ()

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token.

        Raises:
            InputError: it was not given, and the model's configuration has none.
        """
        if self._mask_token_id is None:
            raise InputError(
                "the model's configuration has no mask_token_id: pass ParametricMemory(..., "
                "mask_token_id=tokenizer.mask_token_id)"
            )
        return self._mask_token_id

    def values(self) -> dict[str, torch.Tensor]:
        """The memory in place by name, as `FastWeights.named` gives it (scope batch without the leading 1); empty if
        none was written."""
        value = self.fast.value
        if value is None:
            return {}
        return self.fast.named(value if self.fast.by_row else value[0])

    def plan_prompts(self, prompts: Sequence[Sequence[int]], mask_token_id: int) -> InnerPlan:
        """The plan for writing the memory from prompts, on the model's device.

        Arguments as in `memdlm.memory.plan.plan_prompts`.
        """
        plan = plan_prompts(prompts, self.config, mask_token_id, self.spec.logit_shift)
        return plan.to(self.backbone.device)

    def write_prompts(self, prompts: Sequence[Prompt], *, batch_size: int = 1) -> list[WrittenMemory]:
        """One memory per prompt, in order; none is left in place. Needs `attached()`.

        A prompt that no memory can be written from does not stop the others: its entry has a `failure` and values that
        add nothing. So it is for an empty prompt, one of whose tokens none was drawn to be predicted (short ones), an
        inner loss or gradient that is not finite, and one prompt too long for the device's memory.

        Args:
            prompts: token ids of each prompt.
            batch_size: prompts per pass of the inner loop. 1: each in a pass of its own, so that one prompt gives bit
                for bit one memory whatever else is written. More (scope row): padded and written side by side, the same
                up to rounding.

        Raises:
            InputError: batch_size below 1, or above 1 with scope batch; ids outside the vocabulary; no mask token.
        """
        return write_prompts(self, prompts, batch_size)

    def place(self, memories: Sequence[WrittenMemory], *, shared: bool = False) -> None:
        """Puts memories in place of what is there: row b of the coming forwards has memories[b]. Needs `attached()`.

        Rows whose memory failed are those of the base model; if all failed, nothing is in place.

        Args:
            memories: one per row.
            shared: one memory for all rows of whatever batch.

        Raises:
            InputError: none; several, though shared or with scope batch; one of another model or other settings.
        """
        if not self.fast.is_attached:
            raise RuntimeError("a memory is put in place inside `with memory.attached():`")
        phi = stack_memories(memories, self.fast, shared)  # [B, P]
        self.reset()
        if phi is not None:
            self.fast.set(phi.to(self.backbone.device), shared=shared)
        self._placed = tuple(memories)

    def adapt(self, prompts: Sequence[Prompt], *, batch_size: int = 1) -> list[WrittenMemory]:
        """`write_prompts`, then `place`: row b of the coming forwards has the memory of prompts[b].

        Raises:
            InputError: no prompt, or several with scope batch; those of `write_prompts`.
        """
        if len(prompts) > 1 and not self.fast.by_row:
            raise InputError(
                f"{len(prompts)} prompts and one memory for all rows (mem_scope=batch): use mem_scope row, which is "
                "the default of MemoryConfig.for_decoding()"
            )
        memories = self.write_prompts(prompts, batch_size=batch_size)
        self.place(memories)
        return memories

    def save(self, path: str | os.PathLike[str], *, adapter: str | None = None) -> None:
        """Saves the one memory in place (of `adapt`, `place` or `load`) as a file, whole or not at all.

        Args:
            path: a safetensors file (see `memdlm.memory.store`); an older memory file there is replaced.
            adapter: name or folder of the PEFT adapter on the model, noted for whoever loads the model again.

        Raises:
            InputError: no such memory, several, or one that failed; another file is there, or it cannot be written.
        """
        if len(self._placed) != 1:
            raise InputError(
                f"a file holds one memory, {len(self._placed)} are in place: place([memory]) first, inside attached()"
            )
        save_memory(self, self._placed[0], path, adapter)

    def load(self, path: str | os.PathLike[str], *, shared: bool = False) -> WrittenMemory:
        """Puts the memory in a file in place (`shared` as in `place`), and returns it. Needs `attached()`.

        Raises:
            InputError: the file is missing, cut short, damaged or no memory file; it was written for another model or
                adapter, or with settings that make other fast weights.
        """
        written = load_memory(self, path)
        self.place([written], shared=shared)
        return written

    def export_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Writes the one memory in place as a LoRA adapter that plain PEFT loads; see
        `memdlm.memory.export.export_adapter`."""
        export_adapter(self, folder)

    def initial(self, plan: InnerPlan, *seed_parts: int | str) -> torch.Tensor:
        """phi_0, float32 [G, P] on the model's device, from (config.seed, *seed_parts), with scope row also from each
        row's own seed."""
        seeds = [(seed,) for seed in plan.row_seeds] if self.fast.by_row else [()]
        device = self.backbone.device
        return torch.stack([self.fast.initial(self.config.seed, *seed_parts, *own, device=device) for own in seeds])

    @torch.no_grad()
    def prefixes(self, plan: InnerPlan, share_anchor: bool = True) -> Prefixes:
        """The states before layer `start`, without dropout: all but the outer one in one batched pass.

        Args:
            plan: the states.
            share_anchor: leave out the outer state, which the outer forward brings; False runs it here too.
        """
        hidden: list[torch.Tensor | None] = [None] * len(plan.states)
        others = [index for index in range(len(plan.states)) if index != plan.anchor]
        layer_inputs = None
        alone = self.alone() if plan.apart else contextlib.nullcontext()
        with self.timer, evaluating(self.lm), no_autocast_cache(), alone:
            if others or self.lockstep:  # all states may be equal on one rank; its pass is thrown away
                states = self._prefix([plan.states[index] for index in others or [0]], plan)
                for index, state in zip(others, states, strict=False):
                    hidden[index] = state
            if plan.anchor is not None and not share_anchor:
                # In a pass of its own, as the outer forward would: products of other sizes round in another way.
                (hidden[plan.anchor],) = self._prefix([plan.states[plan.anchor]], plan)
            if plan.apart or not share_anchor:
                # The embedding alone: the layer inputs of one state.
                embedded = self.backbone(**self._network_inputs(plan.states[:1], plan), stop_at=0)
                layer_inputs = embedded.layer_inputs
        return Prefixes(hidden, layer_inputs)

    def _prefix(self, states: Sequence[torch.Tensor], plan: InnerPlan) -> Sequence[torch.Tensor]:
        """Hidden state [B, L, D] before layer `start` of each state, in one pass."""
        hidden = self.backbone(**self._network_inputs(states, plan), stop_at=self.start).hidden
        return hidden.split(plan.num_network_rows)

    def _network_inputs(self, states: Sequence[torch.Tensor], plan: InnerPlan) -> dict[str, Any]:
        return plan.network_inputs(states, self.lm.config._attn_implementation)

    @contextlib.contextmanager
    def writing(
        self,
        plan: InnerPlan,
        prefixes: Prefixes | None,
        initial: torch.Tensor,
        *,
        reduce_gradient: Reduce | None = None,
        before_write: Observer | None = None,
        after_write: Observer | None = None,
    ) -> Iterator[None]:
        """While open, a forward of the model on the outer state writes the memory at the split point and goes on with
        it.

        `report` then holds what happened. The anchor's hidden state is that of the outer forward, with its dropout if
        it has any; the replayed layers run without.

        Args:
            plan: what to write (made for the batch of that forward).
            prefixes: what `prefixes(plan)` gave; None: made at the split point, inside the forward, where an engine
                that shards the weights is ready to gather them.
            initial: phi_0 [G, P] (see `initial`).
            reduce_gradient: see `memdlm.memory.inner_loop.fit`.
            before_write, after_write: called with (hidden, layer inputs) at the split point, without and with the
                memory in place, without gradients and dropout.

        Raises:
            InputError: the model checkpoints activations in the reentrant way.
        """

        def callback(hidden: torch.Tensor, layer_inputs: LayerInputs) -> torch.Tensor:
            anchor = hidden.detach()
            self.reset()
            known = self.prefixes(plan) if prefixes is None else prefixes
            self._observe(before_write, anchor, layer_inputs)
            self._write(plan, known, anchor, layer_inputs, initial, reduce_gradient)
            self._observe(after_write, anchor, layer_inputs)
            return hidden

        refuse_reentrant(self.backbone)
        with at_layer(self.backbone, self.start, callback):
            yield

    def _observe(self, observer: Observer | None, hidden: torch.Tensor, layer_inputs: LayerInputs) -> None:
        if observer is not None:
            with torch.no_grad(), evaluating(self.lm), no_autocast_cache():
                observer(hidden, layer_inputs)

    @torch.no_grad()
    def write(self, plan: InnerPlan, initial: torch.Tensor, *, reduce_gradient: Reduce | None = None) -> InnerReport:
        """Writes the memory in a pass of its own (every state through the lower layers) and leaves it in place.

        Equals `writing` around a forward, at the price of one more prefix; needs `attached()`. Arguments as there.
        """
        prefixes = self.prefixes(plan, share_anchor=False)
        return self._write(plan, prefixes, None, {}, initial, reduce_gradient)

    def readout(self, hidden: torch.Tensor, layer_inputs: LayerInputs, positions: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] that predict the tokens at flat `positions` [N], from the hidden state [B, L, D] before layer
        `start`."""
        return self.lm.head(self.hidden_at(hidden, layer_inputs, positions))

    def hidden_at(self, hidden: torch.Tensor, layer_inputs: LayerInputs, positions: torch.Tensor) -> torch.Tensor:
        """What the head needs for `readout`: hidden states after the final norm, [N, D]."""
        if len(positions) == 0:  # a batch without a masked position
            if self.lockstep:
                return self.hidden_at(hidden, layer_inputs, positions.new_zeros(1) + self.spec.logit_shift)[:0]
            return hidden.flatten(0, 1)[positions]
        recomputes = any(layer.gradient_checkpointing for layer in self.backbone.layers)
        checkpoint = self.config.inner_gradient_checkpointing and recomputes
        wanted = (positions - self.spec.logit_shift)[None]  # [1, N]
        if not self.fast.by_row or len(hidden) == 1:
            return self.backbone.run_layers(hidden, layer_inputs, self.start, checkpoint, wanted)[0]
        # One memory per row: the layers must see rows, and these have unequal numbers of positions.
        return pick(self.backbone.run_layers(hidden, layer_inputs, self.start, checkpoint), wanted)[0]

    def _write(
        self,
        plan: InnerPlan,
        prefixes: Prefixes,
        anchor: torch.Tensor | None,
        anchor_inputs: LayerInputs,
        initial: torch.Tensor,
        reduce_gradient: Reduce | None,
    ) -> InnerReport:
        if not self.fast.is_attached or torch.is_inference_mode_enabled():
            raise RuntimeError(
                "a memory is written inside `with memory.attached():`, under torch.no_grad() if need be but not under "
                "torch.inference_mode(), which allows no gradients"
            )
        self._placed = ()
        layer_inputs = anchor_inputs if prefixes.layer_inputs is None else prefixes.layer_inputs

        def hidden_at(state: int, positions: torch.Tensor) -> torch.Tensor:
            hidden = prefixes.hidden[state]
            if hidden is None:
                assert anchor is not None
                hidden = anchor
            return self.hidden_at(hidden, layer_inputs, plan.network_positions(positions))

        network = Network(hidden_at, self.lm.head, self.lm.config.vocab_size, self.lockstep)
        with self.timer, evaluating(self.lm), self.inner_backward(), contextlib.ExitStack() as undo:
            undo.callback(self.reset)  # an error must leave no half-written memory to the next prompt
            self.report = fit(self.fast, initial, plan, network, self.config, self.scheduler, reduce_gradient)
            undo.pop_all()
        return self.report
