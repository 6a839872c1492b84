"""MemDLMTrainer: masked-diffusion training with Parametric Memory in place."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType, DynamoBackend
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import IntervalStrategy

from dllm.core.trainers.mdlm import MDLMConfig, MDLMTrainer
from dllm.core.trainers.meters import MeanMetric
from dllm.data.collators import Batch, NoisingCollator
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError
from memdlm.memory.collator import MemoryCollator, inner_steps
from memdlm.memory.config import MemoryConfig, flag_fields
from memdlm.memory.inner_loop import InnerReport
from memdlm.memory.parametric import ParametricMemory

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
        changed = [name for name, _, setting in flag_fields() if getattr(self, name) != setting.default]
        if changed and not memory.enabled:
            raise InputError(f"{', '.join(changed)} has no effect without --mem_enabled True")
        if memory.prompt_mask_ratio != MemoryConfig.prompt_mask_ratio:
            raise InputError("mem_prompt_mask_ratio has no effect in training with mem_masking_strategy=pmc: drop it")

    def memory(self) -> MemoryConfig:
        """The memory's settings; in training its loss is weighted and normalised like the outer one.

        Raises:
            InputError: see `MemoryConfig`.
        """
        return MemoryConfig.from_flags(self, loss_weight_type=self.loss_weight_type, loss_norm_type=self.loss_norm_type)


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
        InputError: torch.compile, FSDP or ZeRO-3 together with memory, or the errors of `ParametricMemory`.
    """

    MemDLMConfig = MemDLMConfig

    args: MemDLMConfig

    def __init__(self, model=None, args: MemDLMConfig | None = None, **kwargs: Any) -> None:
        if args is not None:
            self.memory_config = args.memory()
        super().__init__(model=model, args=args, **kwargs)
        self.memory: ParametricMemory | None = None
        if not self.memory_config.enabled:
            return
        self._refuse_engines()
        self.memory = ParametricMemory(self.lm, self.memory_config, self.scheduler_alpha)
        fast = self.memory.fast
        logger.info(
            f"memory: {len(fast.targets)} linears from layer {self.memory.start} on, {fast.numel:,} fast weights; "
            "written inside the forward, which shares the layers below"
        )
        self.eval_metrics.metrics["memory_loss"] = MeanMetric()
        self._writes = _WriteSums()
        self._observed: dict[str, list[torch.Tensor]] = {"loss_with_memory": [], "loss_without_memory": []}

    def _refuse_engines(self) -> None:
        plugin = self.accelerator.state.dynamo_plugin
        if self.args.torch_compile or (plugin is not None and plugin.backend != DynamoBackend.NO):
            raise InputError(
                "memory and torch.compile cannot be combined (compiled code ignores hooks): drop --torch_compile, and "
                "dynamo_backend from the launcher's settings"
            )
        sharded = self.is_fsdp_enabled or (
            self.accelerator.distributed_type == DistributedType.DEEPSPEED and is_deepspeed_zero3_enabled()
        )
        if sharded:
            raise InputError("memory with sharded parameters (FSDP, ZeRO-3) is not available yet: use DDP")

    def make_collator(self, pad, args: MemDLMConfig, tokenizer, stream: str) -> NoisingCollator:
        """A `MemoryCollator`, or with memory off the plain one."""
        if not self.memory_config.enabled:
            return super().make_collator(pad, args, tokenizer, stream)
        return MemoryCollator(pad, config=self.memory_config, **self._noising_settings(args, tokenizer, stream))

    def forward_loss_positions(self, model, inputs: Batch):
        """As in `MDLMTrainer`; with memory attached the forward writes it at the split point."""
        if self.memory is None or not self.memory.fast.is_attached:
            return super().forward_loss_positions(model, inputs)
        steps = inner_steps(inputs)
        # A block of its own: weights that autocast copies here, without gradients, must not reach the forward below.
        with self.accelerator.autocast():
            prefixes = self.memory.prefixes(steps, inputs.get("attention_mask"))
        training = model.training
        observed = training and self._logs_this_step
        seed_parts = ("train", self.state.global_step) if training else ("eval",)
        with self.memory.writing(
            steps,
            prefixes,
            inputs["input_ids"],
            initial=self.memory.initial(*seed_parts),
            reduce_gradient=self._average if training and self._sync_inner else None,
            before_write=self._observe_loss_without_memory(inputs) if observed else None,
        ):
            outputs = super().forward_loss_positions(model, inputs)
        if observed:
            self._observe("loss_with_memory", outputs.logits, inputs)
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
        return self.memory_config.sync_inner and self.accelerator.num_processes > 1

    def _average(self, gradient: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(gradient, reduction="mean")  # pyright: ignore[reportReturnType]

    @property
    def _logs_this_step(self) -> bool:
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return False
        step = self.state.global_step + 1
        every = max(1, int(self.state.logging_steps))
        return step % every == 0 or (step == 1 and self.args.logging_first_step)

    def _observe(self, name: str, logits: torch.Tensor, inputs: Batch) -> None:
        with torch.no_grad():
            self._observed[name].append(self.weighted_loss(logits, inputs, self.args.loss_norm_type))

    def _observe_loss_without_memory(self, inputs: Batch):
        def before_write(hidden: torch.Tensor, layer_inputs: dict[str, Any]) -> None:
            assert self.memory is not None
            logits = self.memory.readout(hidden, layer_inputs, inputs["loss_positions"])
            self._observe("loss_without_memory", logits, inputs)

        return before_write

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `MDLMTrainer`; training entries also get both losses and what the inner loop did."""
        if "loss" in logs and self.memory is not None and self._writes.count:
            logs.update(self._memory_logs())
        super().log(logs, start_time)

    def _memory_logs(self) -> dict[str, float]:
        """Losses of the logged step's batches with and without memory, and means over the writes since the last log.

        On this rank; the gap is the loss without memory minus the loss with.
        """
        values = {}
        for name, losses in self._observed.items():
            if losses:
                values[name] = float(torch.stack(losses).mean())
                losses.clear()
        if values:
            values["memory_gap"] = values["loss_without_memory"] - values["loss_with_memory"]
        values.update(self._writes.means())
        self._writes = _WriteSums()
        return values


class _WriteSums:
    """Sums over the writes since the last log, kept on the device."""

    def __init__(self) -> None:
        self.count = 0
        self.change: torch.Tensor | float = 0.0
        self.per_step: torch.Tensor | float = 0.0  # [3, S]: inner losses, gradient norms, skipped steps

    def add(self, report: InnerReport) -> None:
        self.count += 1
        self.change = self.change + report.change
        self.per_step = self.per_step + torch.stack([report.losses, report.grad_norms, report.skipped])

    def means(self) -> dict[str, float]:
        values = {"mem_change": float(self.change) / self.count}
        assert isinstance(self.per_step, torch.Tensor)
        names = ("mem_inner_loss", "mem_inner_grad_norm", "mem_inner_skipped")
        for name, row in zip(names, (self.per_step / self.count).tolist(), strict=True):
            values.update({f"{name}_{index + 1}": round(value, 6) for index, value in enumerate(row)})
        return values
