"""lm-eval's command line with a model class of ours: what the adapters' `__main__` runs."""

from __future__ import annotations

import difflib
import pathlib
import sys
import traceback
from collections.abc import Iterator, Sequence

import requests
import yaml
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager

from dllm.core.eval.processes import leave_processes
from dllm.data.longcontext.offline import find_offline_twin
from dllm.models.checkpoint import one_line
from dllm.utils.distributed import is_main_process
from dllm.utils.parsing import InputError

# Our own task files, where the package lies in its repository.
TASKS_DIR = pathlib.Path(__file__).resolve().parents[3] / "lm-evaluation-harness" / "tasks"
_SUBCOMMANDS = ("run", "ls", "validate")
_NOT_FOUND = "Tasks not found: "
_NETWORK_ERRORS = (
    ConnectionError,
    requests.RequestException,
    DatasetNotFoundError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
# How libraries say it that raise a plain OSError.
_NETWORK_WORDS = ("couldn't connect to", "doesn't exist on the hugging face hub", "urlopen error")


def launch(model: str, arguments: Sequence[str] | None = None) -> int:
    """Runs lm-eval's command line and returns the exit status.

    `run` may be left out, `--model` is `model` and `--include_path` the folder of our tasks unless they are given. What
    the user can put right is one line and status 2: wrong model arguments, metadata or tasks, an adapter of another
    base, a task that needs the network where there is none. Ctrl-C is status 130. Other errors keep their traceback.

    Args:
        model: name under which the model class is registered with lm-eval.
        arguments: words behind the program's name; None: those of this process.
    """
    words = with_defaults(sys.argv[1:] if arguments is None else arguments, model)
    program, *_ = sys.argv
    sys.argv = [program, *words]  # what lm-eval reads
    try:
        cli_evaluate()
    except KeyboardInterrupt as error:
        return _stop(" ".join(str(error).split()) or "interrupted", 130)
    except InputError as error:
        return _stop(one_line(error), 2, everywhere=True)
    except Exception as error:
        line = _explained(error, words)
        if line is not None:
            return _stop(line, 2)
        raise
    leave_processes()
    return 0


def with_defaults(words: Sequence[str], model: str) -> list[str]:
    """The words of a command line with `run`, `--model` and `--include_path` filled in."""
    if not words or words[0] in ("-h", "--help"):
        return list(words)
    if words[0] in _SUBCOMMANDS:
        command, rest = words[0], list(words[1:])
    else:
        command, rest = "run", list(words)
    given = {word.split("=")[0] for word in rest} | _keys_of_file(rest)
    filled = []
    if command == "run" and not given & {"--model", "-M", "model"}:
        filled += ["--model", model]
    if not given & {"--include_path", "include_path"} and TASKS_DIR.is_dir():
        filled += ["--include_path", str(TASKS_DIR)]
    return [command, *filled, *rest]


def _keys_of_file(words: Sequence[str]) -> set[str]:
    """Settings that a file given with --config holds."""
    files = [words[index + 1] for index, word in enumerate(words[:-1]) if word in ("--config", "-C")]
    keys: set[str] = set()
    for file in files:
        path = pathlib.Path(file)
        content = yaml.safe_load(path.read_text()) if path.is_file() else None
        keys |= set(content) if isinstance(content, dict) else set()
    return keys


def _stop(line: str, status: int, everywhere: bool = False) -> int:
    # A wrong task is wrong on every process, and the main one speaks for all. A prompt may be too long on one only.
    if everywhere or is_main_process():
        print(line, file=sys.stderr)
    return status


def _explained(error: Exception, words: Sequence[str]) -> str | None:
    """One line for what the user can put right, else None."""
    if isinstance(error, ValueError) and str(error).startswith(_NOT_FOUND):
        return _unknown_tasks(str(error).removeprefix(_NOT_FOUND).split(", "), words)
    loading = any(
        "lm_eval/tasks" in frame.filename or frame.filename.endswith("lm_eval/api/task.py")
        for frame in traceback.extract_tb(error.__traceback__)
    )
    if not loading:
        return None
    given = next((cause for cause in _chain(error) if isinstance(cause, InputError)), None)
    if given is not None:
        return one_line(given)
    if any(_is_network_error(cause) for cause in _chain(error)):
        return _needs_network(error, words)
    return None


def _unknown_tasks(missing: Sequence[str], words: Sequence[str]) -> str:
    include = _value_of("--include_path", words)
    known = TaskManager(include_path=include).all_tasks
    told = []
    for name in missing:
        closest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        told.append(f"unknown task {name}" + (f"; the closest known one is {closest[0]}" if closest else ""))
    return f"{'; '.join(told)} (`ls tasks` lists all)"


def _needs_network(error: Exception, words: Sequence[str]) -> str:
    reason = one_line(error)
    found = [(name, twin) for name in _task_names(words) if (twin := find_offline_twin(name)) is not None]
    if not found:
        tasks = ", ".join(_task_names(words)) or "a task"
        return f"{tasks}: a file cannot be fetched from here, and no task of ours does the same offline ({reason})"
    told = [
        f"{name} needs {twin.resource}: "
        + (f"use {twin.task}, which does the same offline" if twin.task else "no task of ours does the same offline")
        for name, twin in found
    ]
    return f"{'; '.join(told)} ({reason})"


def _task_names(words: Sequence[str]) -> list[str]:
    names: list[str] = []
    for index, word in enumerate(words):
        if word in ("--tasks", "-t"):
            for value in words[index + 1 :]:
                if value.startswith("-"):
                    break
                names += [name for name in value.split(",") if name]
        elif word.startswith("--tasks="):
            names += [name for name in word.removeprefix("--tasks=").split(",") if name]
    return names


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    for index, word in enumerate(words[:-1]):
        if word == flag:
            return words[index + 1]
    joined = [word for word in words if word.startswith(f"{flag}=")]
    return joined[0].partition("=")[2] if joined else None


def _is_network_error(error: BaseException) -> bool:
    if isinstance(error, _NETWORK_ERRORS):
        return True
    return isinstance(error, OSError) and any(words in str(error).lower() for words in _NETWORK_WORDS)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
