"""RelayTrainer: masked diffusion trained on its own denoising, with a state carried from forward to forward (Relay,
arXiv 2605.22967)."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field, make_dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from dllm.core.losses import WeightType
from dllm.core.noising import flat_positions
from dllm.core.trainers.bd3lm import BD3LMConfig, BD3LMTrainer
from dllm.core.trainers.engines import gathered, refuse_fsdp1, refuse_torch_compile
from dllm.core.trainers.mdlm import MDLMConfig, MDLMTrainer
from dllm.core.trainers.meters import MeanMetric
from dllm.data.collators import Batch
from dllm.models.backbone import unwrap
from dllm.models.relay_norm import RELAY_NORM
from dllm.models.spec import block_size_of
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError
from dllm.utils.tokens import token_id
from memdlm.relay.buffer import RolloutBuffer
from memdlm.relay.channel import RelayChannel, RelayState
from memdlm.relay.config import RelayConfig, flag_fields
from memdlm.relay.meters import RelaySums
from memdlm.relay.rollout import RevealRule, unroll
from memdlm.relay.source import RowSource

logger = get_default_logger(__name__)

ROLLOUT_FILE = "rollout_{}.safetensors"  # in a checkpoint, one of each process

# `relay_*`: one field per setting of RelayConfig, so that a flag is declared once.
_RelayFlags = make_dataclass("_RelayFlags", flag_fields(), kw_only=True)
_RelayFlags.__module__ = __name__


@dataclass
class RelayTrainerConfig(MDLMConfig, _RelayFlags):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    """`MDLMConfig` plus the settings of `RelayConfig`, each with the prefix `relay_`.

    Raises:
        InputError: see `RelayConfig`; a weighted loss, another normaliser, wrong tokens: the relay's loss is the plain
            mean over masked tokens.
    """

    loss_weight_type: WeightType = field(
        default="uniform", metadata={"help": "Must be uniform: the relay's loss is the mean over masked tokens."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.relay()
        fixed = {"loss_weight_type": "uniform", "loss_norm_type": "token", "edit_ratio": 0.0}
        for name, only in fixed.items():
            if getattr(self, name) != only:
                raise InputError(
                    f"{name}={getattr(self, name)} has no effect on the relay's loss, the mean over masked tokens: "
                    f"use {name}={only}"
                )

    def relay(self) -> RelayConfig:
        """The relay's settings.

        Raises:
            InputError: see `RelayConfig.from_flags`.
        """
        return RelayConfig.from_flags(self)


class RelayTrainer(MDLMTrainer):
    """`MDLMTrainer` on the states that decoding goes through: K forwards per step, each on what the one before
    revealed, with its hidden state; the loss is L_1 + ... + L_K (see `memdlm.relay.rollout.unroll`).

    The rows live in a `RolloutBuffer` of per_device_train_batch_size places from step to step, and are saved with
    checkpoints. An epoch of the Trainer is as many steps as the data loader has batches; the rows come in at their own
    pace (`relay_epochs` in the log says how often the data were gone through). `eval_loss` is the loss at random masks
    with the state of a first forward, comparable between arms; `eval_relay_loss_s` that of forward s from all masks on.
    Overrides
        get_train_dataloader              steps instead of batches; the rows come from the buffer
        training_step                     refills the buffer
        loss_and_outputs                  K forwards
        prediction_step                   adds `eval_relay_loss_s`
        _save_rng_state, _load_rng_state  the rollout of each process

    Args:
        As in `MDLMTrainer`; a model without a relay norm gets a new one, unless it has PEFT adapters, which must have
        the norm among their `modules_to_save` (see `memdlm.relay.load_model`).

    Raises:
        InputError: those of `RelayConfig`, `RelayChannel` and `MDLMTrainer`; a PEFT model without a relay norm.
    """

    takes_streams = takes_packed_rows = False

    args: RelayTrainerConfig

    def __init__(self, model=None, args: RelayTrainerConfig | None = None, processing_class=None, **kwargs) -> None:
        if args is None or processing_class is None:
            raise InputError(f"{type(self).__name__} needs args (a RelayTrainerConfig) and processing_class")
        self.relay_config = args.relay()
        self.channel: RelayChannel | None = None
        mask_token_id = token_id(processing_class, "mask_token")
        if self.relay_config.carry:
            _check_adapters(model)
            self.channel = RelayChannel.attach(
                model,  # pyright: ignore[reportArgumentType] (checked by unwrap)
                self.relay_config,
                mask_token_id=mask_token_id,
            )
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        size = self.find_reveal_block()
        if self.channel is not None and self.channel.keys.shift_within == "block":
            self.channel.block_size = size
        self.rule = RevealRule(self.relay_config, size, mask_token_id)
        self.buffer = RolloutBuffer(
            self.args.per_device_train_batch_size,
            self.channel.size if self.channel is not None else 0,
            mask_token_id,
            token_id(processing_class, "pad_token"),
            self.args.device,
        )
        self._refuse_engines()
        self.source: RowSource | None = None
        self._sums = RelaySums(self.relay_config.num_steps)
        self._logged_refills = 0
        if self.rolls_out:
            for step in range(self.relay_config.num_steps):
                self.eval_metrics.metrics[f"relay_loss_{step + 1}"] = MeanMetric()

    def _refuse_engines(self) -> None:
        refuse_torch_compile(self, "a relay")
        refuse_fsdp1(self, "a relay")
        if not self.rolls_out:
            return
        if self.args.auto_find_batch_size:
            raise InputError("auto_find_batch_size has no effect on a rollout, whose places are fixed: drop it")
        loading = self.args.accelerator_config
        # Every process goes through the data at its own pace, so none may wait for the others there.
        if self.args.world_size > 1 and (loading.dispatch_batches or not loading.use_seedable_sampler):
            raise InputError(
                "with several processes a rollout needs accelerator_config with use_seedable_sampler true and "
                "dispatch_batches false: drop the other values"
            )

    @property
    def uses_relay(self) -> bool:
        """Whether this arm carries a state."""
        return self.channel is not None

    @property
    def rolls_out(self) -> bool:
        """Whether training goes through the states of decoding."""
        return self.relay_config.states == "rollout"

    def find_reveal_block(self) -> int:
        """Positions of the blocks in which a forward reveals, and inside which a state is shifted."""
        return block_size_of(self.lm, self.relay_config.block_size)

    def get_train_dataloader(self) -> DataLoader:
        """As in Trainer; with a rollout one entry per step, and the real loader feeds the buffer."""
        loader = super().get_train_dataloader()
        if not self.rolls_out:
            return loader
        self.source = RowSource(loader, self.relay_config.drop_rows, self.args.seed)
        steps: Any = [{"step": index} for index in range(len(loader))]
        return DataLoader(steps, batch_size=1)

    def training_step(self, model, inputs: Batch, num_items_in_batch=None) -> torch.Tensor:
        """As in `MDLMTrainer`, on the rows of the buffer."""
        if self.rolls_out:
            inputs = self.next_rows()
        return super().training_step(model, inputs, num_items_in_batch)

    def next_rows(self) -> Batch:
        """The rows of the buffer after a refill, laid out like a collator's batch."""
        assert self.source is not None
        self.buffer.refill(self.source.take)
        rows = self.buffer.rows
        assert rows is not None
        batch = self.laid_out(rows.input_ids, rows.maskable, rows.is_masked, rows.example_id, rows.attention_mask)
        return {**batch, "num_tokens": rows.num_tokens}

    def laid_out(self, input_ids, maskable, is_masked, example_id, attention_mask) -> Batch:
        """What a collator would make of a state: masked tokens count alike, so t is each row's share of them."""
        positions, num_masked = flat_positions(is_masked), is_masked.sum(dim=1)
        t = num_masked / maskable.sum(dim=1).clamp(min=1)  # [B]
        batch = {
            "input_ids": input_ids,
            "noised_ids": input_ids.masked_fill(is_masked, self.rule.mask_token_id),
            "maskable": maskable,
            "is_masked": is_masked,
            "t": t,
            "loss_positions": positions,
            "loss_t": t[positions // input_ids.shape[1]],
            "num_maskable": num_masked,
            "example_id": example_id,
        }
        return batch if attention_mask is None else {**batch, "attention_mask": attention_mask}

    def loss_and_outputs(self, model, inputs: Batch):
        """(L_1 + ... + L_K, the last forward's output) in training; in evaluation the loss of one forward at random
        masks. Router losses are added with the configuration's weight."""
        if not model.training:
            with self._first_state(inputs):
                return super().loss_and_outputs(model, inputs)
        if "complement" in inputs:  # plain fine-tuning of Fast-dLLM v2: the same mean, over both copies of each row
            return super().loss_and_outputs(model, inputs)
        made, output = self.unroll(model, inputs, self._state_of(), self.rule, watch=True)
        if self.rolls_out:
            self.buffer.store(made.is_masked, made.hidden)
        self._sums.add(made)
        loss = made.loss
        if made.aux_losses:
            loss = loss + self.lm.config.router_aux_loss_coef * torch.stack(made.aux_losses).sum()
        return loss, output

    def unroll(self, model, inputs: Batch, state: RelayState | None, rule: RevealRule, watch: bool = False):
        """(what K forwards made, the last one's output); see `memdlm.relay.rollout.unroll`."""
        last: list[Any] = [None]

        def network(step: int, noised_ids, is_masked, positions):
            now = {**inputs, "noised_ids": noised_ids, "is_masked": is_masked, "loss_positions": positions}
            # The first forward is the one that a subclass may do more in.
            forward = self.forward_loss_positions if step == 0 else self._forward_later
            last[0] = forward(model, now)
            return last[0]

        made = unroll(
            network,
            inputs["input_ids"],
            inputs["maskable"],
            inputs["is_masked"],
            self.relay_config,
            rule,
            self.channel,
            state,
            # Not the optimizer's step: with accumulation several batches share that.
            (self.args.seed, "relay", self.buffer.num_calls),
            watch,
        )
        return made, last[0]

    def _forward_later(self, model, inputs: Batch):
        return self.forward_positions(model, inputs, inputs["loss_positions"])

    def _state_of(self) -> RelayState | None:
        if self.channel is None:
            return None
        rows = self.buffer.rows
        assert rows is not None
        return RelayState(rows.hidden, rows.is_set)

    def _first_state(self, inputs: Batch) -> contextlib.AbstractContextManager[None]:
        if self.channel is None:
            return contextlib.nullcontext()
        return self.channel.passing(self.channel.first(*inputs["input_ids"].shape))

    def prediction_step(self, model, inputs: Batch, prediction_loss_only: bool, ignore_keys=None):
        """As in `MDLMTrainer`; also the losses of K forwards that begin at all masks."""
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.rolls_out:
            inputs = self._prepare_inputs(inputs)
            inputs = {**inputs, "is_masked": inputs["maskable"]}
            # Without the jitter: evaluations of one model must agree.
            rule = replace(self.rule, config=replace(self.relay_config, tau_jitter=0.0))
            with torch.no_grad():
                made, _ = self.unroll(model, inputs, None, rule)
            for step, (total, count) in enumerate(zip(made.row_nll, made.row_counts, strict=True)):
                total, count = self.gather_function((total, count))
                self.eval_metrics.update(f"relay_loss_{step + 1}", total / count.clamp(min=1), count)
        return result

    def training_logs(self) -> dict[str, float]:
        """As in `MDLMTrainer`; also what `RelaySums.logs` says of the steps since the last call (on this rank), the
        norms of the relay's weight and bias, and how often the data were gone through."""
        logs = {**super().training_logs(), **self._sums.logs()}
        if self.rolls_out and self.source is not None:
            logs["relay_refills"] = self.buffer.num_refilled - self._logged_refills
            logs["relay_epochs"] = round(self.source.epochs, 4)
            self._logged_refills = self.buffer.num_refilled
        if self.channel is not None:
            norm = self.channel.norm
            with torch.no_grad(), gathered(norm.weight, norm.bias) as (gate, bias):
                logs["relay_gate_norm"], logs["relay_bias_norm"] = float(gate.norm()), float(bias.norm())
        self._sums = RelaySums(self.relay_config.num_steps)
        return logs

    def floating_point_ops(self, inputs: Batch) -> float:
        """As in Trainer, of all K forwards; entries of the step loader hold no tokens themselves."""
        rows = self.buffer.rows
        if not self.rolls_out or rows is None:
            return super().floating_point_ops(inputs)
        return self.relay_config.num_steps * super().floating_point_ops({"input_ids": rows.input_ids})

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.rolls_out and self.source is not None:
            parts = {"buffer": self.buffer.state_dict(), "source": self.source.state_dict()}
            tensors = {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}
            tensors["world_size"] = torch.tensor(self.args.world_size)
            save_file(
                {name: value.contiguous() for name, value in tensors.items()},
                os.path.join(output_dir, ROLLOUT_FILE.format(self.args.process_index)),
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not self.rolls_out:
            return
        assert self.source is not None
        path = os.path.join(checkpoint, ROLLOUT_FILE.format(self.args.process_index))
        if not os.path.exists(path):
            logger.warning(
                f"{path} is missing: the rows of this process begin anew, the run is not the uninterrupted one"
            )
            return
        tensors = load_file(path)
        if (saved := int(tensors["world_size"])) != self.args.world_size:
            logger.warning(
                f"{checkpoint} was saved by {saved} processes and this run has {self.args.world_size}: all rows begin "
                "anew, the run is not the uninterrupted one"
            )
            return
        for part, owner in (("buffer", self.buffer), ("source", self.source)):
            own = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{part}.")}
            owner.load_state_dict(own)
        self._logged_refills = self.buffer.num_refilled


def _check_adapters(model: Any) -> None:
    if not isinstance(model, PeftModel):
        return
    if not isinstance(unwrap(model).backbone.relay_layer_norm, ModulesToSaveWrapper):
        raise InputError(
            f"the model's adapters were made without {RELAY_NORM} and do not save it: begin new ones with "
            "memdlm.relay.load_model(..., lora=True), after merging these into the base if they are to be kept"
        )


@dataclass
class RelayBD3LMConfig(RelayTrainerConfig, BD3LMConfig):
    """`BD3LMConfig` plus the settings of `RelayConfig`, each with the prefix `relay_`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relay().block_size is not None:
            raise InputError("relay_block_size has no effect under block diffusion: give --block_size")
        if self.complementary_masks and self.relay().states == "rollout":
            raise InputError("complementary_masks belongs to random masks, a rollout makes its own: drop it")


class RelayBD3LMTrainer(RelayTrainer, BD3LMTrainer):
    """`RelayTrainer` for block diffusion: each forward sees [x ; x_0], all blocks go forward side by side (Fast-dLLM v2
    with Relay, arXiv 2605.22967).

    The state is that of the noised half; nothing is added to the clean one.

    Raises:
        InputError: those of the two.
    """

    args: RelayBD3LMConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def find_reveal_block(self) -> int:
        """Those of block diffusion."""
        return self.block_size
