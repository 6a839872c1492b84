"""What eval_run.sh, eval_ruler.sh, ... of each family and their twins under mem/ run: flags -> one call of lm-eval.

    python examples/_eval.py ADAPTER SCRIPT DEFAULT_FLAGS -- FLAGS

Only light modules are imported here, so that a wrong flag is told at once; the evaluation is a process of its own.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lm_eval._cli.utils import handle_cli_value_string, split_top_level

MODELS = {"llada": "inclusionAI/LLaDA-MoE-7B-A1B-Base", "llada21": "inclusionAI/LLaDA2.1-mini"}
# What a flag means to each adapter.
STEPS = {
    "llada": "denoising steps of an answer; else one per token",
    "llada21": "denoising steps of a block; else one per token",
}
BLOCK_SIZE = {
    "llada": "tokens decoded before the next are begun; else the whole answer",
    "llada21": "tokens of a block; else the model's own",
}
CFG = {
    "llada": "scale of the classifier-free guidance; else none",
    "llada21": "must be 0: block decoding has no classifier-free guidance",
}
# Flags that go to the model as they are, under the names of the adapter's arguments.
MODEL_FLAGS = (
    *("adapter_model_name_or_path", "base_model_name_or_path"),
    *("max_length", "max_new_tokens", "steps", "block_size", "cfg"),
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line; that of an unknown flag lists the known ones."""

    def error(self, message: str) -> NoReturn:
        hint = "--help explains the flags"
        if message.startswith("unrecognized"):
            names = [word for action in self._actions for word in action.option_strings if word.startswith("--")]
            hint = f"the flags are {' '.join(names)}"
        print(f"{self.prog}: {message}; {hint}", file=sys.stderr)
        raise SystemExit(2)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are set."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def whole(least: int):
    """An argparse type: whole numbers from `least` on."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
        return value

    parse.__name__ = "whole number"
    return parse


def positive(text: str) -> float:
    """An argparse type: numbers above 0; a whole one stays an int."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return int(value) if value.is_integer() else value


def settings(text: str) -> dict[str, Any]:
    """An argparse type: `key=value,...` or a JSON object, typed as lm-eval does it; {} for an empty text."""
    if text.lstrip().startswith("{"):
        return json_object(text)
    found = {}
    for entry in split_top_level(text):
        key, given, value = (part.strip() for part in entry.partition("="))
        if not key or not given:
            raise argparse.ArgumentTypeError(f"{entry!r} is not KEY=VALUE (put a value with commas in quotes)")
        found[key] = handle_cli_value_string(value)
    return found


def json_object(text: str) -> dict[str, Any]:
    """An argparse type: a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def make_parser(adapter: str, script: str) -> Parser:
    parser = Parser(
        prog=f"bash {script}",
        description="Evaluate a model with lm-eval; ends with lm-eval's table. Paths are relative to the repository.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model_name_or_path",
        default=MODELS[adapter],
        help="checkpoint folder or Hub name, also that of a PEFT adapter",
    )
    add("--adapter_model_name_or_path", help="PEFT adapter to put on the model")
    add("--base_model_name_or_path", help="base of the adapter that --model_name_or_path is; else the one it names")
    add("--num_gpu", type=whole(0), default=1, help="processes, one per GPU; 0 is the CPU")
    add("--max_length", type=whole(2), help="most tokens of prompt and answer; else the model's own limit")
    add("--max_new_tokens", type=whole(1), help="tokens of an answer; else what each task asks for")
    add("--steps", type=whole(1), help=STEPS[adapter])
    add("--block_size", type=whole(1), help=BLOCK_SIZE[adapter])
    add("--cfg", type=float, help=CFG[adapter])
    add("--tasks", help="lm-eval tasks, separated by commas; memdlm_babilong and memdlm_ruler need no network")
    add("--metadata", type=settings, help="settings of the tasks, JSON; the default goes with the default tasks alone")
    add(
        "--extra_model_args",
        type=settings,
        action="append",
        default=[],
        help="further arguments of the model, key=value,... or JSON; repeatable, later ones win, also over flags",
    )
    add("--output_path", help="folder of the results, and of the answers that an interrupted run goes on from")
    add("--limit", type=positive, help="only so many documents of each task; below 1 a share of them")
    add("--batch_size", type=whole(1), default=8, help="prompts decoded at a time")
    return parser


def parse(adapter: str, script: str, words: Sequence[str]) -> argparse.Namespace:
    """The settings: defaults of the script before the first `--`, behind it what the user typed."""
    middle = list(words).index("--")
    parser = make_parser(adapter, script)
    defaults = vars(parser.parse_args(words[:middle]))
    parser.set_defaults(**defaults)  # of the repeatable flag too: what the user gives comes behind it
    options = parser.parse_args(words[middle + 1 :])
    if options.tasks != defaults["tasks"] and options.metadata == defaults["metadata"]:
        options.metadata = None  # made for other tasks
    return options


def command(adapter: str, options: argparse.Namespace) -> list[str]:
    """The call of lm-eval with the adapter."""
    arguments: dict[str, Any] = {"pretrained": options.model_name_or_path}
    # An empty value counts as none: scripts pass unset variables on.
    arguments |= {name: vars(options)[name] for name in MODEL_FLAGS if vars(options)[name] not in (None, "")}
    arguments["answers_dir"] = os.path.join(options.output_path, "answers")
    for extra in options.extra_model_args:
        arguments |= extra
    words = ["--model", adapter, "--tasks", options.tasks, "--model_args", json.dumps(arguments)]
    words += ["--batch_size", str(options.batch_size), "--output_path", options.output_path]
    if options.metadata:
        words += ["--metadata", json.dumps(options.metadata)]
    if options.limit is not None:
        words += ["--limit", str(options.limit)]
    if options.num_gpu == 0:
        return ["python", "-m", f"memdlm.eval.{adapter}", "run", *words, "--device", "cpu"]
    launch = ["accelerate", "launch", "--num_processes", str(options.num_gpu), "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if options.num_gpu > 1:
        # Port 0 is whichever is free, so that several evaluations can run side by side.
        launch += ["--multi_gpu", "--main_process_port", "0"]
    return [*launch, f"memdlm/eval/{adapter}.py", "run", *words]


def check_gpus(adapter: str, script: str, wanted: int) -> None:
    """Ends the program where torch sees fewer GPUs than processes are asked for."""
    import torch  # slow, and not needed before

    if torch.cuda.device_count() < wanted:
        make_parser(adapter, script).error(
            f"--num_gpu {wanted}, but torch finds {torch.cuda.device_count()} CUDA devices: lower it (0 is the CPU)"
        )


def main() -> None:
    adapter, script, *given = sys.argv[1:]
    options = parse(adapter, script, given)
    check_gpus(adapter, script, options.num_gpu)
    words = command(adapter, options)
    print(f"$ {shlex.join(words)}", flush=True)
    os.execvp(words[0], words)


if __name__ == "__main__":
    main()
