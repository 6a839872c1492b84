"""Checkpoints that are whole or not there, and a run that saves and stops when the system asks it to."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints

from dllm.utils.args import TrainingArguments
from dllm.utils.checkpoints import (
    STAGING_FOLDER,
    TRAINER_STATE_NAME,
    check_engine,
    clear_staging,
    publish,
    read_manifest,
    resolve_for_all,
    write_manifest,
)
from dllm.utils.distributed import is_main_process, world_size
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError

logger = get_default_logger(__name__)

# sysexits.h calls it a failure that passes: whoever started the run is to start it again.
EXIT_STOPPED = 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class SaveOnSignal(transformers.TrainerCallback):
    """Ends training with a checkpoint at the end of the step in which SIGTERM or SIGUSR1 came to any of the processes.

    A signal reaches processes at different times, so they agree at every step's end on the largest number that one of
    them got: a collective of 8 bytes on the CPU, which waits for no device. At the end of an epoch the checkpoint is
    written after what belongs there (an evaluation), else right after the step.
    """

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None
        self._received = 0
        self._group: Any = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Begins to listen."""
        self._received, self.stopped_by = 0, None
        # Gloo works on the CPU, whatever the group of the gradients uses.
        if world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=args.ddp_timeout_delta)
        if threading.current_thread() is threading.main_thread():  # Python allows no other thread to listen
            self._before = {one: signal.signal(one, self._receive) for one in STOP_SIGNALS}

    def _receive(self, number: int, frame: Any) -> None:
        self._received = number

    def _agreed(self) -> int:
        if self._group is None:
            return self._received
        largest = torch.tensor(self._received)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return int(largest)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Asks for a checkpoint and the end if a signal came."""
        number = self._agreed()
        if number:
            self.stopped_by = signal.Signals(number)
            control.should_training_stop = True
            control.should_save = not _ends_epoch(state)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """Nothing but the checkpoint is left to do for a run that stops; inside an epoch it has been written."""
        if self.stopped_by is None:
            return
        control.should_save = _ends_epoch(state)
        if not control.should_save:
            control.should_evaluate = control.should_log = False

    def close(self) -> None:
        """Listens no more."""
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}
        if self._group is not None and dist.is_initialized():  # a run that stops has ended all groups
            dist.destroy_process_group(self._group)
        self._group = None


def _ends_epoch(state: transformers.TrainerState) -> bool:
    epoch = state.epoch or 0.0
    return abs(epoch - round(epoch)) < 1e-6  # a quotient of whole numbers


class _KeepUnlogged(transformers.TrainerCallback):
    """Gives a resumed run the losses since the last log, so that its first log is that of the uninterrupted run."""

    def __init__(self, trainer: CheckpointingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Trainer has just set its sums to zero."""
        self.trainer.restore_unlogged()


class CheckpointingTrainer(transformers.Trainer):
    """transformers.Trainer whose folders checkpoint-N are complete by construction.

    A checkpoint is written below OUTPUT_DIR/.saving by all processes, gets a manifest (files with sizes, engine, number
    of processes), and takes its name in one rename when it is on the disk. A failure while saving, as on a full disk,
    ends the run with one line and leaves earlier checkpoints as they are.

    Overrides
        train               refuses torn checkpoints and those of another engine; exits with 75 after a signal
        _save_checkpoint    where the files go while they are written
        _maybe_log_save_evaluate    a signal's checkpoint is written whatever the evaluation before it gave
        _run_epoch          a resumed run that had come to its end takes no further step

    Raises:
        InputError: see `resolve_checkpoint` and `check_engine`; a checkpoint that could not be written; ZeRO-3 set to
            save no weights.
        SystemExit: code 75, after SIGTERM or SIGUSR1 and a checkpoint (`save_on_signal`).
    """

    args: TrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refuse_to_save_no_weights()
        self._writing: pathlib.Path | None = None  # where checkpoint-N is being written
        self._saved_step: int | None = None  # of the last checkpoint that this run has written
        self._resumed: str | None = None
        self._stopper: SaveOnSignal | None = None
        self.add_callback(_KeepUnlogged(self))
        if self.args.save_on_signal and self.args.save_strategy != SaveStrategy.NO:
            self._stopper = SaveOnSignal()
            self.add_callback(self._stopper)

    @property
    def engine(self) -> str:
        """What runs the training: ddp (also one process), fsdp, fsdp2, or zero1 to zero3."""
        plugins: Any = self.accelerator.state
        if self.is_deepspeed_enabled:
            return f"zero{plugins.deepspeed_plugin.zero_stage}"
        if self.is_fsdp_enabled:
            return "fsdp2" if plugins.fsdp_plugin.fsdp_version == 2 else "fsdp"
        return "ddp"

    def _refuse_to_save_no_weights(self) -> None:
        plugins: Any = self.accelerator.state
        setting = "stage3_gather_16bit_weights_on_model_save"
        if self.engine == "zero3" and not plugins.deepspeed_plugin.get_value(f"zero_optimization.{setting}", False):
            raise InputError(
                "without zero3_save_16bit_model: true in the launcher's settings (in a DeepSpeed configuration "
                f"{setting}: true) ZeRO-3 saves no model.safetensors: set it"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As in Trainer, from a whole checkpoint of this engine; True: the newest one of output_dir."""
        folder = str(self.args.output_dir)
        self._resumed = resolve_for_all(folder, resume_from_checkpoint) if resume_from_checkpoint else None
        if self._resumed is not None:
            check_engine(self._resumed, self.engine, self.args.world_size)
            self._warn_of_another_batch(self._resumed)
        if self.args.should_save:
            clear_staging(pathlib.Path(folder))
        self.accelerator.wait_for_everyone()
        try:
            return super().train(self._resumed, *args, **kwargs)
        finally:
            if self._stopper is not None:
                self._stopper.close()

    def _global_batch(self) -> int:
        return self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps

    def _warn_of_another_batch(self, checkpoint: str) -> None:
        saved, now = read_manifest(checkpoint).get("global_batch"), self._global_batch()
        if saved is not None and saved != now and is_main_process():
            logger.warning(
                f"{checkpoint} was saved with {saved} rows per step and this run takes {now}: it goes on at other rows "
                "than the run would have come to; --per_device_train_batch_size and --gradient_accumulation_steps "
                "keep the product with the number of processes"
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer looks at max_steps after a step only.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any):
        wanted = self._stopper is not None and self._stopper.stopped_by is not None and self.control.should_save
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        # Where only better models are saved, Trainer decides anew after an evaluation. Ranks may see the folder at
        # different times; the step they agree on.
        if wanted and self._saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _finalize_training(self, *args: Any, **kwargs: Any):
        if self._stopper is None or self._stopper.stopped_by is None:
            return super()._finalize_training(*args, **kwargs)
        # Trainer would look back on a finished run: delete the checkpoint where only the best is kept, load the best.
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self._finish_current_push()
        self._stop(self._stopper.stopped_by)

    def _stop(self, reason: signal.Signals) -> NoReturn:
        checkpoint = f"{self.args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        then = "it holds the model only" if self.args.save_only_model else "go on with --resume_from_checkpoint True"
        if is_main_process():
            saved = f"saved {checkpoint}: {then}" if os.path.isdir(checkpoint) else f"there is no {checkpoint}"
            print(
                f"stopped by {reason.name} at step {self.state.global_step} of {self.state.max_steps}; {saved}",
                file=sys.stderr,
                flush=True,
            )
        if world_size() > 1:
            dist.barrier()
            dist.destroy_process_group()
        raise SystemExit(EXIT_STOPPED)

    @contextlib.contextmanager
    def writing_whole(self, folder: str | os.PathLike[str]) -> Iterator[str]:
        """Within the block all processes write into the folder that it gives; afterwards it has the name `folder`.

        What had that name before is replaced.

        Raises:
            InputError: it could not be written, and is not there; what had the name before is.
        """
        target = pathlib.Path(folder)
        staging = target.parent / STAGING_FOLDER / target.name
        try:
            # Files of another try, of which there may be more, would be published too.
            if self.args.should_save and staging.exists():
                shutil.rmtree(staging)
            self.accelerator.wait_for_everyone()
            yield str(staging)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(staging, target)
        except (OSError, SafetensorError, RuntimeError) as error:
            # torch.save reports a failed write as a RuntimeError of its archive writer.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            free = shutil.disk_usage(target.parent).free / 2**20
            shutil.rmtree(staging, ignore_errors=True)
            raise InputError(
                f"{target} could not be written ({error}; {free:.1f} MiB are free there): make room and go on with "
                "--resume_from_checkpoint True; earlier checkpoints are as they were"
            ) from error
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        # Asked by Trainer._save_checkpoint for the folder that checkpoint-N lies in.
        return super()._get_output_dir(trial) if self._writing is None else str(self._writing)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = pathlib.Path(self._get_output_dir(trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self.writing_whole(folder) as written:
            self._writing = pathlib.Path(written).parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing = None
            self._finish_files(pathlib.Path(written), run)
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: the upload begins when the folder has its name."""

    def _finish_files(self, staging: pathlib.Path, run: pathlib.Path) -> None:
        unlogged: Any = nested_gather(self._tr_loss, self.args.parallel_mode)
        # Also waits for the files of all processes.
        self.accelerator.wait_for_everyone()
        # Trainer has looked for the best checkpoint beside the one that is being written.
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best.exists() or best.name == staging.name):
            self.state.best_model_checkpoint = str(best)
        if not self.args.should_save:
            return
        self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
        settings = {
            "engine": self.engine,
            "num_processes": self.args.world_size,
            "global_batch": self._global_batch(),
            "unlogged": {"losses": unlogged.reshape(-1).tolist(), "since_step": self._globalstep_last_logged},
        }
        write_manifest(staging, settings)

    def restore_unlogged(self) -> None:
        """Goes on with the losses (summed on each rank) that the checkpoint's run had not logged yet."""
        unlogged = {} if self._resumed is None else read_manifest(self._resumed).get("unlogged", {})
        if not unlogged:
            return
        losses = unlogged["losses"]
        mean = sum(losses) / len(losses)
        own = losses[self.args.process_index] if len(losses) == self.args.world_size else mean
        self._tr_loss += own
        self._globalstep_last_logged = unlogged["since_step"]
        self._total_loss_scalar -= mean  # the mean loss in the end is of this call's steps
