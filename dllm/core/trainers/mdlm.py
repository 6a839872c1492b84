"""MDLMTrainer: the masked-diffusion objective on transformers.Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import PeftModel

from dllm.core.editing import MASKED, EditPlanner, EditSettings
from dllm.core.losses import NormType, WeightType, loss_weights, normalise, row_sums, token_nll
from dllm.core.modes import evaluating, frozen
from dllm.core.packing import packed_inputs, packed_positions
from dllm.core.schedulers import BaseAlphaScheduler, get_alpha_scheduler_class, make_alpha_scheduler
from dllm.core.trainers.artifacts import KeepConfig, save_model_card, save_record
from dllm.core.trainers.checkpointing import CheckpointingTrainer
from dllm.core.trainers.editing import Editor
from dllm.core.trainers.engines import call_all_experts
from dllm.core.trainers.guard import NonFiniteGuard
from dllm.core.trainers.meters import BatchCounts, NLLMetric, OnEvaluateMetricsCallback, PPLMetric, StepClock
from dllm.core.trainers.rows import RowsTrainer
from dllm.data.collators import Batch, NoisingCollator, PaddingCollator
from dllm.data.examples import with_example_ids
from dllm.models.backbone import unwrap
from dllm.models.relay_norm import relay_keys, save_relay_keys, warn_idle_relay
from dllm.models.spec import spec_of
from dllm.utils.args import TrainingArguments
from dllm.utils.parsing import InputError
from dllm.utils.tokens import token_id


@dataclass
class MDLMConfig(EditSettings, TrainingArguments):
    """Settings of the masked-diffusion objective and of editing, on top of the training arguments."""

    time_epsilon: float = field(
        default=1e-3,
        metadata={"help": "Smallest diffusion time drawn, in (0, 1): t ~ U(time_epsilon, 1) per sequence."},
    )
    alpha_scheduler: str = field(
        default="linear",
        metadata={"help": "Masking schedule alpha(t): linear or cosine (see dllm.core.schedulers)."},
    )
    loss_weight_type: WeightType = field(
        default="scheduler",
        metadata={"help": "Weight of a masked position: scheduler = -alpha'(t) / (1 - alpha(t)), uniform = 1."},
    )
    loss_norm_type: NormType = field(
        default="token",
        metadata={
            "help": "What the summed loss is divided by: token = maskable positions of the batch, "
            "sequence = maskable positions of the row times rows, batch = rows."
        },
    )
    stop_on_nonfinite_loss: bool = field(
        default=True,
        metadata={"help": "Stop where the training loss is nan or infinite, and save the batch to OUTPUT_DIR."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.time_epsilon < 1:
            raise InputError(f"time_epsilon must lie in (0, 1), got {self.time_epsilon}")
        get_alpha_scheduler_class(self.alpha_scheduler)
        self.check_editing()


class MDLMTrainer(CheckpointingTrainer, RowsTrainer):
    """Trains a masked-diffusion LM: mask with t ~ U(eps, 1), predict the masked tokens, weigh by w(t) (arXiv
    2502.09992, equation 3).

    With `edit_ratio` above 0, training also asks for visible tokens that were replaced by wrong ones (`EditPlanner`).
    The loss of a batch is then

        sum over rows b of Z_b * (sum over masked i of w(t_i) CE_i + edit_loss_weight * sum over replaced or kept i of
        CE_i)

    with the normaliser Z_b of the plain loss: it counts maskable positions, whatever was replaced. Evaluation takes
    `eval_loss` without wrong tokens; with them what `Editor` measures (`eval_edit_loss`, `eval_repair_rate`, ...).

    Overrides
        compute_loss                             the objective, on the collator's masks, head on masked positions only
        prediction_step, evaluation_loop         likelihood and perplexity over all ranks; no trace in the random state
        get_eval_dataloader, get_test_dataloader masks that do not change between evaluations
        training_step, log                       the guard; tokens, seconds per step and peak memory in the log
        train                                    the norm of a relay that is off is not trained

    Args:
        model: a model of `dllm.models`, also PEFT-wrapped.
        args: an `MDLMConfig`.
        processing_class: the tokenizer; it must have a mask token and a pad token.
        data_collator: pads rows to {"input_ids", "labels"[, "attention_mask"]}; None pads as LLaDA does
            (`PaddingCollator`).
        scheduler: a masking schedule; None makes the one that `args.alpha_scheduler` names.
        Everything else as in transformers.Trainer.

    Raises:
        InputError: no mask or pad token, rows that `RowsTrainer` refuses, reentrant activation checkpointing, several
            GPUs in one process, or a Trainer option that could not take effect.
    """

    # compute_loss returns the mean over its own batch, so Trainer must divide by gradient_accumulation_steps. Which of
    # the two flags it looks at depends on the version of transformers.
    loss_is_scaled_for_ga = False
    model_accepts_loss_kwargs = False

    args: MDLMConfig

    def __init__(
        self,
        model=None,
        args: MDLMConfig | None = None,
        data_collator: Callable[[list[Batch]], Batch] | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: transformers.PreTrainedTokenizerBase | None = None,
        scheduler: BaseAlphaScheduler | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None or processing_class is None:
            raise InputError(f"{type(self).__name__} needs args (an MDLMConfig) and processing_class (the tokenizer)")
        _check_settings(args, kwargs)
        self.lm = unwrap(model)
        self.spec = spec_of(self.lm)
        self.scheduler_alpha = scheduler or make_alpha_scheduler(args.alpha_scheduler)
        pad = data_collator or self.make_padding(args, processing_class)
        train_collator = self.make_collator(pad, args, processing_class, "train")
        self.eval_collator = self.make_collator(pad, args, processing_class, "eval")
        keep_config = KeepConfig(self.lm.config)
        super().__init__(
            model=model,
            args=args,
            data_collator=train_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        call_all_experts(self, self.lm)
        # Trainer's __init__ infers this from the signature of forward and would overwrite the class attribute.
        self.model_accepts_loss_kwargs = False
        if self.accelerator.ddp_handler is not None:
            # Gradients live in the buckets that DDP exchanges: without this there is a second copy of all of them.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        keep_config.restore()
        self.clock = StepClock()
        self.logged_seconds = 0.0  # spent on the steps of the last training log
        self.eval_metrics = OnEvaluateMetricsCallback(self, {"nll": NLLMetric(), "ppl": PPLMetric()})
        self.editor: Editor | None = None
        if train_collator.editing is not None:
            self.editor = Editor(train_collator.editing.replacements, self.args.device)
            self.eval_metrics.metrics.update(self.editor.eval_metrics())
        self.counts = BatchCounts(self.args.device)
        for callback in (keep_config, self.clock, self.eval_metrics, _SetEpoch(train_collator)):
            self.add_callback(callback)
        self.guard: NonFiniteGuard | None = None
        if self.args.stop_on_nonfinite_loss:
            self.guard = NonFiniteGuard(str(self.args.output_dir), self.args.device, self._sum_over_ranks)
            self.add_callback(self.guard)

    @property
    def uses_relay(self) -> bool:
        """Whether a hidden state is carried from forward to forward; here it never is."""
        return False

    def train(self, *args: Any, **kwargs: Any):
        """As in Trainer. Where the model has a relay that this trainer does not use, one line says so, and its norm is
        frozen meanwhile: it gets no gradient, which DDP would take for an error."""
        idle = None if self.uses_relay else self.lm.backbone.relay_layer_norm
        if idle is None:
            return super().train(*args, **kwargs)
        warn_idle_relay(self.lm, "its norm gets no gradient and stays as it is (memdlm.relay.RelayTrainer trains it)")
        with frozen(idle):
            return super().train(*args, **kwargs)

    def make_collator(self, pad, args: MDLMConfig, tokenizer, stream: str) -> NoisingCollator:
        """The collator of one stream ("train" or "eval"); a subclass that needs more in a batch returns its own."""
        return NoisingCollator(pad, **self._noising_settings(args, tokenizer, stream))

    def make_padding(self, args: MDLMConfig, tokenizer) -> Callable[[list[Batch]], Batch]:
        """What pads rows if no data collator is given."""
        return PaddingCollator(token_id(tokenizer, "pad_token"))

    def _noising_settings(self, args: MDLMConfig, tokenizer, stream: str) -> dict[str, Any]:
        return {
            **self._editing_settings(args, tokenizer, stream),
            "scheduler": self.scheduler_alpha,
            "mask_token_id": token_id(tokenizer, "mask_token"),
            "time_epsilon": args.time_epsilon,
            "seed": args.data_seed if args.data_seed is not None else args.seed,
            "stream": stream,
            "logit_shift": self.spec.logit_shift,
        }

    def _editing_settings(self, args: MDLMConfig, tokenizer, stream: str) -> dict[str, Any]:
        if not args.edit_ratio:
            return {}
        # Evaluation looks at kept tokens even where they are not trained on.
        keep = None if stream == "eval" and not args.keep_share else args.edit_keep_ratio
        settings = EditSettings(args.edit_ratio, args.edit_source, args.edit_loss_weight, keep)
        return {"editing": EditPlanner(settings, tokenizer, self.lm.config.vocab_size)}

    def network_inputs(self, inputs: Batch) -> dict[str, Any]:
        """What the model is called with to look at the state `noised_ids` of a batch."""
        if "packing" in inputs:
            return packed_inputs(self.lm.config._attn_implementation, inputs["packing"], [inputs["noised_ids"]])
        return {"input_ids": inputs["noised_ids"], "attention_mask": inputs.get("attention_mask")}

    def network_positions(self, inputs: Batch, positions: torch.Tensor) -> torch.Tensor:
        """Where the flat `positions` into [B * L] stand in the input that `network_inputs` makes, int64 [N]."""
        return packed_positions(inputs["packing"], positions) if "packing" in inputs else positions

    def forward_positions(self, model, inputs: Batch, positions: torch.Tensor):
        """The model's output on the state of a batch, with logits [N, V] that predict flat `positions` [N] only."""
        wanted = self.network_positions(inputs, positions) - self.spec.logit_shift
        return model(**self.network_inputs(inputs), logit_positions=wanted)

    def forward_loss_positions(self, model, inputs: Batch):
        """The model's output on the noised input, with logits [N, V] of the loss positions only."""
        return self.forward_positions(model, inputs, inputs["loss_positions"])

    def weighted_loss(self, logits: torch.Tensor, inputs: Batch, norm_type: NormType) -> torch.Tensor:
        """The objective on `logits` [N, V] of the batch's loss positions: a scalar."""
        weights = loss_weights(inputs["loss_t"], self.scheduler_alpha, self.args.loss_weight_type)  # [N]
        if "loss_kind" in inputs:
            weights = torch.where(inputs["loss_kind"] == MASKED, weights, self.args.edit_loss_weight)
        positions, ones = inputs["loss_positions"], torch.ones_like(inputs["t"])
        nll = token_nll(logits, inputs["input_ids"].reshape(-1)[positions]) * weights
        return normalise(nll, positions, inputs["input_ids"].shape[1], ones, inputs["num_maskable"], norm_type)

    def row_nll(self, logits: torch.Tensor, inputs: Batch) -> torch.Tensor:
        """Estimate of each row's negative log-likelihood in nats, float32 [B]: sum of w(t) * CE over its masks.

        Always with the schedule's weight, whatever `loss_weight_type` says: only so is it a bound on the likelihood.
        """
        weights = loss_weights(inputs["loss_t"], self.scheduler_alpha, "scheduler")  # [N]
        positions, ones = inputs["loss_positions"], torch.ones_like(inputs["t"])
        nll = token_nll(logits, inputs["input_ids"].reshape(-1)[positions]) * weights
        return row_sums(nll, positions, inputs["input_ids"].shape[1], ones)

    def compute_loss(self, model, inputs: Batch, return_outputs: bool = False, num_items_in_batch=None):
        """Training loss of a collated batch; with nothing maskable it is 0, and the log counts such batches."""
        if self.editor is None:
            loss, outputs = self.loss_and_outputs(model, inputs)
        else:
            inputs = self.with_edits(model, inputs)
            loss, outputs = self.loss_and_outputs(model, inputs)
            self.editor.add(outputs.logits, inputs)
        return (loss, outputs) if return_outputs else loss

    def loss_and_outputs(self, model, inputs: Batch):
        """(scalar loss, model output) of a collated batch; router losses are added with the configuration's weight."""
        outputs = self.forward_loss_positions(model, inputs)
        loss = self.weighted_loss(outputs.logits, inputs, self.args.loss_norm_type)
        if outputs.aux_loss is not None:
            loss = loss + self.lm.config.router_aux_loss_coef * outputs.aux_loss
        return loss, outputs

    def with_edits(self, model, inputs: Batch) -> Batch:
        """The batch under the editing objective; wrong tokens that the model is to name are asked from `model`."""
        assert self.editor is not None
        edited = {**inputs, **inputs["edit"]}
        if self.args.edit_source == "random":
            return edited
        with evaluating(self.lm), torch.no_grad():
            logits = self.forward_positions(model, edited, edited["corrupted_positions"]).logits
        return self.editor.fill(edited, logits)

    def training_step(self, model, inputs: Batch, num_items_in_batch=None) -> torch.Tensor:
        """As in Trainer; also counts tokens and empty batches, and shows the loss to the guard."""
        self.counts.add(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.guard is not None and self.is_in_train:
            self.guard.add(loss, inputs)
        return loss

    def prediction_step(self, model, inputs: Batch, prediction_loss_only: bool, ignore_keys=None):
        """(loss, None, None): logits of a diffusion LM at random masks are of no use to compute_metrics."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.loss_and_outputs(model, inputs)
            nll = self.row_nll(outputs.logits, inputs)
            if self.editor is not None:
                self._evaluate_edits(model, inputs)
        # Gathered by row: where ranks get repeated rows to make the last batch even, those are cut off here.
        nll, count = self.gather_function((nll, inputs["num_maskable"]))
        for name in ("nll", "ppl"):
            self.eval_metrics.update(name, nll / count.clamp(min=1), count)
        return loss.detach(), None, None

    def _evaluate_edits(self, model, inputs: Batch) -> None:
        assert self.editor is not None
        edited = self.with_edits(model, inputs)
        logits = self.forward_positions(model, edited, edited["loss_positions"]).logits
        for name, (total, count) in self.editor.row_sums(logits, edited).items():
            total, count = self.gather_function((total, count))
            self.eval_metrics.update(name, total / count.clamp(min=1), count)

    def evaluation_loop(self, *args, **kwargs):
        """As in Trainer, with metrics that start at zero, also after an evaluation that was broken off. Random states
        are left alone, so that what training draws does not depend on evaluations in between."""
        self.eval_metrics.reset()
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            return super().evaluation_loop(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None):
        """As in Trainer, with masks that are the same at every evaluation."""
        if not isinstance(eval_dataset, str):
            eval_dataset = with_example_ids(eval_dataset)
        with self._collating_with(self.eval_collator):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any):
        """As in Trainer, with masks that are the same at every call."""
        with self._collating_with(self.eval_collator):
            return super().get_test_dataloader(with_example_ids(test_dataset))

    @contextlib.contextmanager
    def _collating_with(self, collator: NoisingCollator) -> Iterator[None]:
        # Trainer knows one collator; evaluation needs masks that do not change from epoch to epoch.
        training_collator, self.data_collator = self.data_collator, collator
        try:
            yield
        finally:
            self.data_collator = training_collator

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer; training entries also get what `training_logs` says."""
        if "loss" in logs:
            logs.update(self.training_logs())
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = output_dir or str(self.args.output_dir)
        save_record(folder, self, self.lm)
        save_model_card(folder, self, self.lm)
        keys = relay_keys(self.lm.config)
        # PEFT saves the relay's norm with an adapter, but not how it is used.
        if keys is not None and isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            save_relay_keys(folder, keys)

    def create_model_card(self, **given: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in Trainer, with the text and the arguments of `save_model_card`."""
        if self.is_world_process_zero():
            save_model_card(str(self.args.output_dir), self, self.lm, **given)

    def training_logs(self) -> dict[str, float]:
        """Seconds per step and tokens of all ranks per second of the steps since the last call; peak memory of the rank
        that has used most; the number of empty batches if there are any; with editing what `Editor.logs` says."""
        self.logged_seconds, steps = self.clock.read()
        counts = self.counts.read(self._gather_ranks)
        logs = {"peak_memory_mib": round(counts["peak_memory_bytes"] / 2**20, 1)}
        if steps:
            logs["step_seconds"] = round(self.logged_seconds / steps, 4)
            logs["tokens_per_second"] = round(counts["num_tokens"] / self.logged_seconds, 1)
        if counts["empty_batches"]:
            logs["empty_batches"] = counts["empty_batches"]
        if self.editor is not None:
            logs.update(self.editor.logs(self._sum_over_ranks))
        return logs

    def _gather_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(values)  # pyright: ignore[reportReturnType]

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, reduction="sum")  # pyright: ignore[reportReturnType]


class _SetEpoch(transformers.TrainerCallback):
    """Tells the training collator which epoch's masks to draw."""

    def __init__(self, collator: NoisingCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        # Fractional when a run resumes inside an epoch; the small term absorbs the rounding of a division.
        self.collator.set_epoch(int((state.epoch or 0.0) + 1e-6))


def _check_settings(args: TrainingArguments, trainer_options: dict[str, Any]) -> None:
    """Refuses what Trainer accepts and this trainer could not honour."""
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if trainer_options.get(name) is not None:
            raise InputError(f"{name} has no effect on a diffusion model's loss and metrics: drop it")
    if args.label_smoothing_factor:
        raise InputError("label_smoothing_factor has no effect on the diffusion loss: drop it")
    if args.n_gpu > 1:
        raise InputError(
            f"one process sees {args.n_gpu} GPUs and would split batches over them (DataParallel), which loss "
            "positions do not survive: start one process per GPU with accelerate launch, or set CUDA_VISIBLE_DEVICES"
        )
    settings = args.gradient_checkpointing_kwargs
    if args.gradient_checkpointing and isinstance(settings, dict) and settings.get("use_reentrant", False):
        raise InputError(
            "reentrant activation checkpointing cannot be used: torch.autograd.grad fails under it; "
            "pass --gradient_checkpointing_kwargs '{\"use_reentrant\": false}'"
        )
