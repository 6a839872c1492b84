"""MemDLMTrainer and MemBD3LMTrainer: masked and block diffusion with Parametric Memory in place."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, make_dataclass
from typing import Any

import torch
from transformers.trainer_utils import IntervalStrategy

from dllm.core.trainers.bd3lm import BD3LMConfig, BD3LMTrainer
from dllm.core.trainers.engines import inner_backward, refuse_fsdp1, refuse_torch_compile, shards_weights
from dllm.core.trainers.mdlm import MDLMConfig, MDLMTrainer
from dllm.core.trainers.meters import DeviceTimer, MeanMetric
from dllm.data.collators import Batch, NoisingCollator
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError
from memdlm.memory.collator import MemoryCollator, inner_plan, refuse_packing
from memdlm.memory.config import FLAG_PREFIX, MemoryConfig, flag_fields
from memdlm.memory.meters import GapWatch, WriteSums
from memdlm.memory.parametric import LayerInputs, Observer, ParametricMemory

logger = get_default_logger(__name__)

# `mem_*`: one field per setting of MemoryConfig, so that a flag is declared once.
_MemoryFlags = make_dataclass("_MemoryFlags", flag_fields())
_MemoryFlags.__module__ = __name__


@dataclass
class MemDLMConfig(MDLMConfig, _MemoryFlags):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    """`MDLMConfig` plus the settings of `MemoryConfig`, each with the prefix `mem_`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        memory = self.memory()
        names = [(name, name.removeprefix(FLAG_PREFIX), setting.default) for name, _, setting in flag_fields()]
        changed = [flag for flag, name, default in names if getattr(memory, name) != default]
        if changed and not memory.enabled:
            raise InputError(f"{', '.join(changed)} has no effect without --mem_enabled True")
        uses_ratio = memory.masking_strategy == "progressive_memory" or memory.inner_target == "prompt"
        if memory.prompt_mask_ratio != MemoryConfig.prompt_mask_ratio and not uses_ratio:
            raise InputError(
                f"mem_prompt_mask_ratio has no effect in training with mem_masking_strategy={memory.masking_strategy} "
                f"and mem_inner_target={memory.inner_target}: drop it"
            )

    def memory(self) -> MemoryConfig:
        """The memory's settings; in training its loss is weighted and normalised like the outer one.

        Written from the prompt (`mem_inner_target` prompt) it has uniform weights, as at inference.

        Raises:
            InputError: see `MemoryConfig`.
        """
        weight_type = "uniform" if self.mem_inner_target == "prompt" else self.loss_weight_type
        return MemoryConfig.from_flags(self, loss_weight_type=weight_type, loss_norm_type=self.loss_norm_type)


class MemDLMTrainer(MDLMTrainer):
    """`MDLMTrainer` that writes fast weights from each batch and takes the loss with them (MemDLM, arXiv 2603.22241).

    With `mem_enabled` false it is `MDLMTrainer`, bit for bit. Overrides
        forward_loss_positions  the forward writes the memory at the split point
        training_step           the memory stays in place until after backward
        prediction_step         adds `eval_memory_loss`; `eval_loss` stays the loss without memory
    and logs, at every logging step, the losses of its batches with and without memory, their gap, and what the inner
    loop did. The loss with memory is conditioned on the very labels that it asks for: it is no evidence of learning
    (docs/memory.md).

    Raises:
        InputError: torch.compile or FSDP1 together with memory, or the errors of `ParametricMemory`.
    """

    MemDLMConfig = MemDLMConfig

    args: MemDLMConfig

    @classmethod
    def check_packing(cls, args: MDLMConfig) -> None:
        """As in `RowsTrainer`, and for a memory that is on `refuse_packing`."""
        super().check_packing(args)
        if isinstance(args, MemDLMConfig) and args.mem_enabled:
            refuse_packing(args.memory())

    def __init__(self, model=None, args: MemDLMConfig | None = None, **kwargs: Any) -> None:
        if args is not None:
            self.memory_config = args.memory()
        super().__init__(model=model, args=args, **kwargs)
        self.memory: ParametricMemory | None = None
        if not self.memory_config.enabled:
            return
        refuse_torch_compile(self, "memory")
        refuse_fsdp1(self, "memory")
        assert self.model is not None
        self.memory = ParametricMemory(self.model, self.memory_config, self.scheduler_alpha)
        self.memory.lockstep = shards_weights(self)
        self.memory.inner_backward = functools.partial(inner_backward, self.model)
        fast = self.memory.fast
        sharded = " and gathers sharded weights layer by layer" if self.memory.lockstep else ""
        logger.info(
            f"memory: {len(fast.targets)} linears from layer {self.memory.start} on, {fast.numel:,} fast weights; "
            f"written inside the forward, which shares the layers below{sharded}"
        )
        if self.memory_config.scope == "row" and self.memory_config.inner_target == "response":
            self._warn(
                "mem_scope=row with mem_inner_target=response: each row's memory can store the very labels that the "
                "loss then asks for, and the model may learn nothing; read docs/memory.md, watch loss_without_memory, "
                "or use mem_scope=batch or mem_inner_target=disjoint"
            )
        self.eval_metrics.metrics["memory_loss"] = MeanMetric()
        self._writes = WriteSums()
        self._gap = GapWatch()
        self._timer = DeviceTimer(self.args.device)
        self._reads_timer = self.args.logging_strategy != IntervalStrategy.NO
        self._observed: dict[str, list[torch.Tensor]] = {"loss_with_memory": [], "loss_without_memory": []}

    def _warn(self, message: str) -> None:
        if self.is_world_process_zero():
            logger.warning(message)

    def make_collator(self, pad, args: MemDLMConfig, tokenizer, stream: str) -> NoisingCollator:
        """A `MemoryCollator`, or with memory off the plain one."""
        if not self.memory_config.enabled:
            return super().make_collator(pad, args, tokenizer, stream)
        return MemoryCollator(pad, config=self.memory_config, **self._noising_settings(args, tokenizer, stream))

    def forward_loss_positions(self, model, inputs: Batch):
        """As in `MDLMTrainer`; with memory attached the forward writes it at the split point."""
        if self.memory is None or not self.memory.fast.is_attached:
            return super().forward_loss_positions(model, inputs)
        plan = inner_plan(inputs)
        training = model.training
        observed = training and self._logs_this_step
        self.memory.timer = self._timer if training and self._reads_timer else contextlib.nullcontext()
        prefixes = None
        if not self.memory.lockstep:
            # A block of its own: weights that autocast copies here, without gradients, must not reach the forward
            # below.
            with self.accelerator.autocast():
                prefixes = self.memory.prefixes(plan)
        seed_parts = ("train", self.state.global_step) if training else ("eval",)
        with self.memory.writing(
            plan,
            prefixes,
            self.memory.initial(plan, *seed_parts),
            reduce_gradient=self._average if training and self._sync_inner else None,
            before_write=self._observer("loss_without_memory", inputs) if observed else None,
            after_write=self._observer("loss_with_memory", inputs) if observed else None,
        ):
            outputs = super().forward_loss_positions(model, inputs)
        if training and self.memory.report is not None:
            self._writes.add(self.memory.report)
        return outputs

    def training_step(self, model, inputs: Batch, num_items_in_batch=None) -> torch.Tensor:
        """As in `MDLMTrainer`, with the memory attached until after backward."""
        if self.memory is None:
            return super().training_step(model, inputs, num_items_in_batch)
        with self.memory.attached():
            return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model, inputs: Batch, prediction_loss_only: bool, ignore_keys=None):
        """As in `MDLMTrainer`, without memory; once more with one written from the batch: `eval_memory_loss`."""
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.memory is not None:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.memory.attached():
                loss = self.loss_and_outputs(model, inputs)[0]
            per_row: Any = self.gather_function(loss.repeat(len(inputs["input_ids"])))
            self.eval_metrics.update("memory_loss", per_row, torch.ones_like(per_row))
        return result

    @property
    def _sync_inner(self) -> bool:
        config = self.memory_config
        return config.sync_inner and config.scope == "batch" and self.accelerator.num_processes > 1

    def _average(self, gradient: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(gradient, reduction="mean")  # pyright: ignore[reportReturnType]

    @property
    def _logs_this_step(self) -> bool:
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return False
        step = self.state.global_step + 1
        every = max(1, int(self.state.logging_steps))
        return step % every == 0 or (step == 1 and self.args.logging_first_step)

    def _observer(self, name: str, inputs: Batch) -> Observer:
        """Notes the loss from the split point on; both are taken so, without dropout: only then do they compare."""

        def observe(hidden: torch.Tensor, layer_inputs: LayerInputs) -> None:
            assert self.memory is not None
            positions = self.network_positions(inputs, inputs["loss_positions"])
            logits = self.memory.readout(hidden, layer_inputs, positions)
            self._observed[name].append(self.weighted_loss(logits, inputs, self.args.loss_norm_type))

        return observe

    def training_logs(self) -> dict[str, float]:
        """As in `MDLMTrainer`; also the losses of the logged step's batches with and without memory (means over ranks),
        their gap (without minus with), the share of the step's time spent on the inner loop, and what the writes since
        the last call did, on this rank (`WriteSums`)."""
        logs = super().training_logs()
        if self.memory is None or not self._writes.count:
            return logs
        inner_seconds = self._timer.read()
        if self.logged_seconds:
            logs["mem_time_share"] = round(inner_seconds / self.logged_seconds, 4)
        logs.update(self._observed_losses())
        logs.update(self._writes.means())
        self._writes = WriteSums()
        return logs

    def _observed_losses(self) -> dict[str, float]:
        if not self._observed["loss_with_memory"]:
            return {}
        own = torch.stack([torch.stack(losses).mean() for losses in self._observed.values()])
        for losses in self._observed.values():
            losses.clear()
        # Every rank logs at the same steps, so all of them take part.
        mean: Any = self.accelerator.reduce(own, reduction="mean")
        values = dict(zip(self._observed, mean.tolist(), strict=True))
        values["memory_gap"] = values["loss_without_memory"] - values["loss_with_memory"]
        if self._gap.grows(values["loss_with_memory"], values["loss_without_memory"]):
            self._warn(GapWatch.MESSAGE)
        return values


@dataclass
class MemBD3LMConfig(MemDLMConfig, BD3LMConfig):
    """`BD3LMConfig` plus the settings of `MemoryConfig`, each with the prefix `mem_`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mem_inner_target != "response":
            raise InputError(
                f"mem_inner_target={self.mem_inner_target} cannot be kept under block diffusion, whose clean half "
                "carries the answers: use response, or --training_objective mdlm (MemDLMTrainer)"
            )
        if self.complementary_masks and self.mem_enabled:
            raise InputError(
                "complementary_masks and mem_enabled exclude each other: one memory would see what the other copy of "
                "its row is asked for; drop one"
            )


class MemBD3LMTrainer(MemDLMTrainer, BD3LMTrainer):
    """`BD3LMTrainer` with the memory of `MemDLMTrainer`: the states of the inner loop, too, are [state ; x_0] under the
    mask of block diffusion.

    With `mem_enabled` false it is `BD3LMTrainer`, bit for bit.

    Raises:
        InputError: those of the two.
    """

    MemDLMConfig = MemBD3LMConfig

    args: MemBD3LMConfig  # pyright: ignore[reportIncompatibleVariableOverride]
