"""The settings that every script shares: model, data, training; and what happens before a run starts.

A knob is a dataclass field; its help says the unit, the range and what None means.
"""

import dataclasses
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import datasets
import transformers
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from dllm.utils.checkpoints import resolve_for_all
from dllm.utils.distributed import is_main_process, world_size
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError

logger = get_default_logger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
TRUNCATIONS = ("filter", "left", "right")
DEFAULT_SHUFFLE_BUFFER = 1000
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_LORA_BIASES = ("none", "all", "lora_only")
_LORA_OPTIONS = ("lora_r", "lora_alpha", "lora_dropout", "target_modules", "bias")


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"--{flag} {value!r} is unknown; allowed: {', '.join(allowed)}")


def _at_least(flag: str, value: float | None, least: float) -> None:
    if value is not None and value < least:
        raise InputError(f"--{flag} is {value} but must be at least {least}")


# Trackers whose package has another name.
_TRACKER_PACKAGES = {"azure_ml": "azureml-mlflow", "flyte": "flytekit"}


def _check_trackers(names: list[str]) -> None:
    # transformers would find out when the trainer is built, after the model has been loaded, with a RuntimeError.
    for name in names:
        _one_of("report_to", name, ("none", "all", *INTEGRATION_TO_CALLBACK))
        if name not in get_available_reporting_integrations():
            package = _TRACKER_PACKAGES.get(name, name)
            raise InputError(f"--report_to {name} needs a package that is not installed: pip install {package}")


def with_defaults(arguments: type, **defaults: Any) -> type:
    """A subclass of a dataclass of settings in which the named fields have these defaults, and the same help."""
    known = {knob.name: knob for knob in dataclasses.fields(arguments)}
    fields = [
        (name, known[name].type, field(default=value, metadata=known[name].metadata))
        for name, value in defaults.items()
    ]
    made = dataclasses.make_dataclass(arguments.__name__, fields, bases=(arguments,))
    made.__module__ = arguments.__module__
    return made


def resolve_with_base_env(path: str, env_name: str) -> str:
    """`path` below the folder in the environment variable, if something is there; otherwise `path` unchanged.

    Absolute paths and paths that exist as given are never changed, so a Hub name stays a Hub name.
    """
    base = os.environ.get(env_name, "")
    if not base or os.path.isabs(path) or os.path.exists(path):
        return path
    candidate = os.path.join(base, path)
    return candidate if os.path.exists(candidate) else path


@dataclass
class ModelArguments:
    """Which model, in which precision, with which adapter."""

    model_name_or_path: str = field(
        metadata={"help": "Checkpoint folder (also below the environment variable BASE_MODELS_DIR) or Hub name."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Weights' type: auto (as in the checkpoint), float32, bfloat16 or float16."},
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": f"Attention kernel, one of {', '.join(_ATTENTIONS)}."}
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Quantise the base weights to 4-bit NF4 on loading (needs bitsandbytes)."},
    )
    dropout: float | None = field(
        default=0.0,
        metadata={"help": "Dropout of the base model in training, in [0, 1). None: as its config.json says."},
    )
    lora: bool = field(default=False, metadata={"help": "Train LoRA matrices instead of all weights."})
    lora_r: int = field(default=32, metadata={"help": "LoRA rank, at least 1. Needs --lora True."})
    lora_alpha: float = field(
        default=64,
        metadata={"help": "LoRA scale numerator (scale = alpha / rank), above 0. Needs --lora True."},
    )
    lora_dropout: float = field(
        default=0.05, metadata={"help": "Dropout on the LoRA input, in [0, 1). Needs --lora True."}
    )
    target_modules: str = field(
        default="all-linear",
        metadata={"help": "Linears that get LoRA: all-linear or comma-separated module names. Needs --lora True."},
    )
    bias: str = field(
        default="none",
        metadata={"help": "Biases trained beside LoRA: none, all or lora_only. Needs --lora True."},
    )
    adapter_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "PEFT adapter to put on the model. None: no adapter of an earlier run."},
    )
    base_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Base of the adapter. None: as named in the adapter's adapter_config.json."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run model code from the checkpoint. Off: only families that this library knows."},
    )

    def __post_init__(self):
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("bias", self.bias, _LORA_BIASES)
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(f"--dropout is {self.dropout} but must be in [0, 1)")
        _at_least("lora_r", self.lora_r, 1)
        if self.lora_alpha <= 0:
            raise InputError(f"--lora_alpha is {self.lora_alpha} but must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout is {self.lora_dropout} but must be in [0, 1)")
        if not self.target_modules.strip(", "):
            raise InputError("--target_modules is empty; give all-linear or comma-separated module names")
        self._refuse_lora_options_without_lora()
        self.model_name_or_path = resolve_with_base_env(self.model_name_or_path, "BASE_MODELS_DIR")

    def _refuse_lora_options_without_lora(self) -> None:
        if self.lora:
            return
        for knob in dataclasses.fields(ModelArguments):
            if knob.name in _LORA_OPTIONS and getattr(self, knob.name) != knob.default:
                raise InputError(f"--{knob.name} has no effect without --lora True")


@dataclass
class DataArguments:
    """Which rows, and how they become token sequences."""

    dataset_args: str = field(
        metadata={
            "help": "Data sets: name[train:5000,test:500]+other. A name is a Hub name, a file (json, jsonl, "
            "csv, parquet), a folder, or builtin:docstrings."
        }
    )
    load_preprocessed_data: bool = field(
        default=False,
        metadata={"help": "Read rows that python -m dllm.tools.preprocess_sft_dataset has tokenised before."},
    )
    max_length: int = field(default=1024, metadata={"help": "Longest sequence, in tokens, at least 2."})
    truncation: str = field(
        default="right",
        metadata={
            "help": "Rows above max_length: right keeps the prompt and cuts the response, left keeps the response and "
            "cuts the beginning, filter drops the row."
        },
    )
    mask_prompt_loss: bool = field(
        default=True, metadata={"help": "Train on the last answer only. False: on every token of the row."}
    )
    num_proc: int | None = field(
        default=None,
        metadata={"help": "Processes that tokenise, at least 1. None: no extra process."},
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Put several training documents into one row of up to max_length tokens; none attends to another, "
            "and no padding is trained on."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read and tokenise training rows while training, over and over. Needs --max_steps."},
    )
    shuffle_buffer_size: int = field(
        default=DEFAULT_SHUFFLE_BUFFER,
        metadata={"help": "Rows of a stream that are held to be drawn from in random order, 0: none. For --streaming."},
    )

    @property
    def hides_padding(self) -> bool:
        """Whether padding is hidden from attention and not trained on."""
        return self.packing

    def __post_init__(self):
        self._check_streaming()
        if not self.dataset_args.strip():
            raise InputError("--dataset_args is empty; name a data set, e.g. builtin:docstrings")
        _at_least("max_length", self.max_length, 2)
        _one_of("truncation", self.truncation, TRUNCATIONS)
        _at_least("num_proc", self.num_proc, 1)

    def _check_streaming(self) -> None:
        _at_least("shuffle_buffer_size", self.shuffle_buffer_size, 0)
        if not self.streaming and self.shuffle_buffer_size != DEFAULT_SHUFFLE_BUFFER:
            raise InputError("--shuffle_buffer_size has no effect without --streaming True")
        if self.streaming and self.load_preprocessed_data:
            raise InputError("preprocessed rows are read from disk as they are needed: drop --streaming")
        if self.streaming and self.num_proc is not None:
            raise InputError("--num_proc has no effect on a stream, which each process reads itself: drop it")


_HF_FIELDS = {knob.name: knob for knob in dataclasses.fields(transformers.TrainingArguments)}
# transformers 5 renames gradient_* to activation_*; both are set where both exist: neither warns.
_CHECKPOINTING_KWARGS = tuple(
    name for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs") if name in _HF_FIELDS
)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers.TrainingArguments with defaults for fine-tuning diffusion models."""

    per_device_train_batch_size: int = field(default=1, metadata={"help": "Rows per device and forward, at least 1."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate, at least 0."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate over steps."})
    warmup_steps: float = field(
        default=0.1,
        metadata={"help": "Linear warm-up: below 1 a share of all steps, from 1 on a number of steps."},
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Keep False: the collator needs example_id and prompt_len, which are no model inputs."},
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps; below 1 a share of all steps."}
    )
    save_strategy: str = field(default="steps", metadata={"help": "When to save: no, steps, epoch or best."})
    save_steps: float = field(default=0.1, metadata={"help": "Save every so many steps; below 1 a share of all steps."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept, the newest ones, at least 1. None: all."}
    )
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "What --push_to_hub uploads: end = the finished model; every_save, checkpoint, all_checkpoints "
            "also while training, with Trainer's own pickles (training_args.bin, optimizer state)."
        },
    )
    report_to: str | None = field(
        default="none",
        metadata={
            "help": "Where metrics go beside the console: none, tensorboard (OUTPUT_DIR/runs), wandb (offline with the "
            "environment variable WANDB_MODE=offline), ..., or all that are installed."
        },
    )
    save_on_signal: bool = field(
        default=True,
        metadata={
            "help": "On SIGTERM or SIGUSR1 finish the running step, write a checkpoint and exit with code 75. False, "
            "or --save_strategy no: the signals end the run at once."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of initialisation, data order and masks, at least 0."})

    def __post_init__(self):
        _at_least("per_device_train_batch_size", self.per_device_train_batch_size, 1)
        _at_least("per_device_eval_batch_size", self.per_device_eval_batch_size, 1)
        _at_least("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        _at_least("learning_rate", self.learning_rate, 0)
        _at_least("warmup_steps", self.warmup_steps, 0)
        _at_least("save_total_limit", self.save_total_limit, 1)
        _at_least("seed", self.seed, 0)
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise InputError(f"--num_train_epochs is {self.num_train_epochs} but must be above 0")
        if self.enable_jit_checkpoint:
            # It saves inside steps, on each rank by itself, and then reports a finished run.
            raise InputError("--enable_jit_checkpoint has no effect here: use --save_on_signal, which is on by default")
        if self.remove_unused_columns:
            raise InputError("--remove_unused_columns must stay False: the collator needs example_id and prompt_len")
        super().__post_init__()
        _check_trackers(self.report_to)  # pyright: ignore[reportArgumentType] (transformers makes it a list)
        for name in _CHECKPOINTING_KWARGS:
            # Recomputation must be non-reentrant: torch.autograd.grad fails under the reentrant form.
            setattr(self, name, {"use_reentrant": False, **(getattr(self, name) or {})})


def _shown_fields(arguments: Any) -> dict[str, Any]:
    """Every field, but of transformers' own ones only those that differ from transformers' defaults."""
    values = {knob.name: getattr(arguments, knob.name) for knob in dataclasses.fields(arguments)}
    if not isinstance(arguments, transformers.TrainingArguments):
        return values
    values = {**values, **arguments.to_dict()}  # to_dict hides tokens
    defaults = {name: knob.default for name, knob in _HF_FIELDS.items() if name not in ("output_dir", "seed")}
    # transformers turns some unset fields into other empty values ("none" into []).
    unset = (dataclasses.MISSING, None, "", "none", "no", False)
    return {
        name: value
        for name, value in values.items()
        if name not in defaults or not (value == defaults[name] or (not value and defaults[name] in unset))
    }


def print_args_main(*arguments: Any) -> None:
    """Print the fields of dataclass instances, one per line, on the main process only.

    Of transformers.TrainingArguments only what differs from transformers' defaults is printed.
    """
    if not is_main_process():
        return
    for group in arguments:
        print(f"{type(group).__name__}:")
        for name, value in sorted(_shown_fields(group).items()):
            print(f"  {name}: {value}")


def initial_training_setup(model_args: Any, data_args: Any, training_args: transformers.TrainingArguments) -> None:
    """Logging, seeds and the checks that must come before anything is loaded.

    Afterwards `training_args.resume_from_checkpoint` is the folder to resume from or None: hand it to
    `trainer.train(resume_from_checkpoint=...)`. The arguments are printed once (main process).

    Raises:
        InputError: the output folder holds another run, there is nothing to resume from (resolve_checkpoint), several
            processes were started but would train separately, or 4-bit weights without LoRA.
    """
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    # What these packages say at level info is little and worth reading, so it shows unless a log level is asked for.
    asked = training_args.log_level != "passive"
    level = training_args.get_process_log_level() if asked else logging.INFO
    for package in ("dllm", "memdlm"):
        logging.getLogger(package).setLevel(level if is_main_process() else max(level, logging.WARNING))
    if not is_main_process():
        datasets.disable_progress_bars()
    if model_args.load_in_4bit and not model_args.lora:
        raise InputError("4-bit weights cannot be trained themselves: add --lora True, or drop --load_in_4bit")
    # On CPU without use_cpu every process trains alone and reports success.
    if training_args.world_size != world_size():
        raise InputError(
            f"{world_size()} processes were started but training would use {training_args.world_size}: "
            "on CPU pass --use_cpu True"
        )
    assert training_args.output_dir is not None  # transformers fills it in
    training_args.resume_from_checkpoint = resolve_for_all(
        training_args.output_dir, training_args.resume_from_checkpoint
    )
    if training_args.full_determinism:
        transformers.enable_full_determinism(training_args.seed)
    else:
        transformers.set_seed(training_args.seed)
    print_args_main(model_args, data_args, training_args)
