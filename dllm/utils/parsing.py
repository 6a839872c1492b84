"""From text to settings: command lines, `name[key:value]` specs, and errors that fit on one line."""

import contextlib
import difflib
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, cast

from transformers import HfArgumentParser

from dllm.utils.distributed import is_main_process


class InputError(ValueError):
    """Something the user gave cannot be used: one line that says what is wrong and what to do."""


# Flags that published scripts still pass although transformers 5 (or this library) has another name for them.
REPLACED_FLAGS = {
    "warmup_ratio": "use --warmup_steps with a value below 1 (a share of all steps), e.g. --warmup_steps 0.1",
    "evaluation_strategy": "use --eval_strategy",
    "overwrite_output_dir": "give a new --output_dir, or --resume_from_checkpoint True to go on there",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR; the default is OUTPUT_DIR/runs",
    "save_safetensors": "drop it: checkpoints are always written as safetensors",
    "group_by_length": "use --train_sampling_strategy group_by_length",
    "no_cuda": "use --use_cpu True",
    "per_gpu_train_batch_size": "use --per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use --per_device_eval_batch_size",
    "adafactor": "use --optim adafactor",
    "fp16_backend": "drop it: use --bf16 True or --fp16 True alone",
    "half_precision_backend": "drop it: use --bf16 True or --fp16 True alone",
    "torch_dtype": "use --dtype",
    "torchdynamo": "use --torch_compile_backend",
    "push_to_hub_token": "use --hub_token",
    "push_to_hub_model_id": "use --hub_model_id",
    "dispatch_batches": "use --accelerator_config",
    "split_batches": "use --accelerator_config",
    "fsdp_min_num_params": "use --fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "use --fsdp_config",
    "include_inputs_for_metrics": "use --include_for_metrics inputs",
    "use_mps_device": "drop it: the device is found by itself",
    "r": "use --lora_r",
}


def _stop(message: str, everywhere: bool) -> NoReturn:
    # A wrong flag is wrong on every rank alike, so the main process speaks for all. A value may be wrong on
    # one rank only (a file that one node lacks), so there every rank speaks.
    if everywhere or is_main_process():
        print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


class _Parser(HfArgumentParser):
    """HfArgumentParser whose errors are one line (argparse prints the usage of every flag first)."""

    def error(self, message: str) -> NoReturn:
        _stop(f"{self.prog}: {message}; {self.prog} --help lists all flags", everywhere=False)


def _prog() -> str | None:
    """What to call the program: `python -m PACKAGE` where it is a package, else None, for the file's name."""
    spec = sys.modules["__main__"].__spec__
    if spec is None or pathlib.Path(sys.argv[0]).name != "__main__.py":
        return None
    return f"python -m {spec.parent}"


def _explain_unknown(argument: str, known: Sequence[str]) -> str:
    if not argument.startswith("-"):
        return f"value {argument!r} belongs to no flag; quote values that hold spaces"
    name = argument.split("=")[0].lstrip("-").replace("-", "_")
    if name in REPLACED_FLAGS:
        return f"--{name} no longer exists: {REPLACED_FLAGS[name]}"
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"unknown flag {argument.split('=')[0]}; the closest known one is --{closest[0]}"


def parse_args(*dataclasses: type, args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """One instance per dataclass, filled from the command line.

    Every field is a flag `--name value` (booleans also `--name` and, where the default is True, `--no_name`).
    Abbreviations are off. An unknown flag, a flag that transformers 5 removed, a missing one, or a value that
    a `__post_init__` refuses ends the program with exit code 2 and one line on stderr that names the fix.

    Args:
        dataclasses: one or more dataclass types; field names must not repeat.
        args: list of words; None reads sys.argv.
    """
    parser = _Parser(cast(Any, dataclasses), prog=_prog(), allow_abbrev=False)  # its annotation admits no plain type
    known = [word.lstrip("-") for word in parser._option_string_actions if word.startswith("--")]
    known = [name for name in known if "-" not in name]
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            args=None if args is None else list(args),
            return_remaining_strings=True,
            look_for_args_file=False,  # a forgotten script.args file must not add flags nobody typed
        )
    except ValueError as error:
        _stop(f"{parser.prog}: {error}", everywhere=True)
    if rest:
        flags = [word for word in rest if word.startswith("--")]
        _stop(f"{parser.prog}: {_explain_unknown((flags or rest)[0], known)}", everywhere=False)
    return tuple(parsed)


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Inside the block, an error of these kinds (InputError if none) becomes one line and exit code 2.

    An InputError that comes out of a worker process of a data loader is told in its own words too.

    For the outermost level of a script: `with one_line_errors(): main()`. Other errors keep their traceback.
    """
    caught = kinds or (InputError,)
    try:
        yield
    except caught as error:
        _stop(_own_words(str(error)), everywhere=True)


def _own_words(message: str) -> str:
    # torch raises a worker's error anew, with the worker's whole traceback as its message.
    if not message.startswith("Caught InputError in DataLoader worker"):
        return message
    return message.rpartition("InputError: ")[2]


_NAME_AND_BRACKET = re.compile(r"(?P<name>[^\[\]]*)(?P<bracket>\[(?P<body>[^\[\]]*)\])?")


def _value(text: str) -> str | int:
    digits = text.replace("_", "")
    return int(digits) if re.fullmatch(r"[+-]?[0-9]+", digits) else text


def _entries(body: str, separator: str, spec: str) -> dict[str, str | int | None]:
    found: dict[str, str | int | None] = {}
    for entry in body.split(","):
        key, given, value = (part.strip() for part in entry.partition(separator))
        if not key or (given and not value):
            raise InputError(f"{spec!r}: {entry!r} is not KEY or KEY{separator}VALUE")
        if key in found:
            raise InputError(f"{spec!r}: {key!r} is given twice")
        found[key] = _value(value) if given else None
    return found


def parse_spec(spec: str) -> tuple[str | None, dict[str, str | int | None]]:
    """(name, options) of `name`, `name[key:value,key]` or `key=value,key=value` (then the name is None).

    Values that are whole numbers become int (`5_000` too); a bare key has the value None. Everything before
    the bracket is the name, so `builtin:docstrings?context=600` and paths stay whole.

    Raises:
        InputError: an unclosed or misplaced bracket, an empty entry, a key given twice, no name.
    """
    text = spec.strip()
    if re.match(r"[A-Za-z_]\w*=", text) and "[" not in text:
        return None, _entries(text, "=", spec)
    match = _NAME_AND_BRACKET.fullmatch(text)
    if match is None:
        raise InputError(f"{spec!r}: the brackets do not match; the form is name[train:5000,test:500]")
    name = match["name"].strip()
    if not name:
        raise InputError(f"{spec!r}: a name must stand before the bracket; the form is name[train:5000,test:500]")
    if match["bracket"] is None:
        return name, {}
    return name, _entries(match["body"], ":", spec)
