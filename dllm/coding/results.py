"""Answers and verdicts of a code evaluation: kept in one JSON file, summed up in a table."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllm.utils.parsing import InputError


@dataclass
class Result:
    """One problem.

    answer: text of the model.
    program: what is run of it.
    nfe: denoising forwards.
    cache_forwards: forwards that only filled a cache.
    num_tokens: tokens of the answer, up to its end.
    seconds: of decoding, the batch's shared equally.
    passed: its tests; None: they were not run.
    reason: why not; None if it passed or was not run.
    passed_plus: of evalplus, the original tests and its further ones; None: not asked.
    """

    task_id: str
    answer: str
    program: str
    nfe: int
    cache_forwards: int
    num_tokens: int
    seconds: float
    passed: bool | None = None
    reason: str | None = None
    passed_plus: bool | None = None


class ResultFile:
    """Results by problem, in a file that is whole at any time.

    Args:
        path: JSON file; made with its folder where it is not there yet.
        config: all that decides an answer, as JSON.

    Raises:
        InputError: the file is damaged, of something else, or was made with another configuration.
    """

    def __init__(self, path: str | os.PathLike, config: Mapping[str, Any]) -> None:
        self.path, self.config = pathlib.Path(path), json.loads(json.dumps(config))
        self.execution: dict[str, Any] | None = None  # how programs were run; None: they were not
        self.results: dict[str, Result] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            config, self.execution = kept["config"], kept["execution"]
            self.results = {entry["task_id"]: Result(**entry) for entry in kept["results"]}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"--output {self.path} is no result file ({type(error).__name__}: {error}): give another"
            ) from None
        for name in sorted({*config, *self.config}):
            if config.get(name) != self.config.get(name):
                raise InputError(
                    f"--output {self.path} was made with another {name} ({_short(config.get(name))}, now "
                    f"{_short(self.config.get(name))}): give another --output, or delete it"
                )

    def add(self, results: Sequence[Result]) -> None:
        """Keeps results, in place of earlier ones of the same problems; at once on disk."""
        self.results.update({result.task_id: result for result in results})
        self.write()

    def write(self, **further: Any) -> None:
        """The file as it should be now, with `further` entries.

        Raises:
            InputError: it cannot be written.
        """
        entries = [dataclasses.asdict(result) for result in self.results.values()]
        content = {"config": self.config, "execution": self.execution, **further, "results": entries}
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            raise InputError(f"--output {self.path} cannot be written ({error}): give another") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def share(passed: Sequence[bool]) -> tuple[float, float]:
    """(mean, standard error sqrt(p (1 - p) / (n - 1)), 0 for one) of passes, both in percent."""
    mean = sum(passed) / len(passed)
    return 100 * mean, 100 * math.sqrt(mean * (1 - mean) / max(len(passed) - 1, 1))


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """Means over problems: pass@1 and its standard error in percent (None: not run), forwards, tokens per forward (all
    tokens over all denoising forwards), seconds in all.

    Args:
        results: at least one.
    """
    ran = [result.passed for result in results if result.passed is not None]
    plus = [result.passed_plus for result in results if result.passed_plus is not None]
    scores: dict[str, Any] = dict.fromkeys(("pass@1", "stderr", "plus_pass@1", "plus_stderr"))
    if len(ran) == len(results):
        scores["pass@1"], scores["stderr"] = share(ran)
    if len(plus) == len(results):
        scores["plus_pass@1"], scores["plus_stderr"] = share(plus)
    num_forwards = sum(result.nfe for result in results)
    return {
        "num_tasks": len(results),
        "num_run": len(ran),
        **scores,
        "mean_nfe": num_forwards / len(results),
        "mean_cache_forwards": sum(result.cache_forwards for result in results) / len(results),
        "tokens_per_forward": sum(result.num_tokens for result in results) / max(num_forwards, 1),
        "seconds": sum(result.seconds for result in results),
    }


def table(task: str, summary: Mapping[str, Any]) -> str:
    """The summary as a Markdown table of one row."""

    def scored(name: str, error: str) -> str:
        return "not run" if summary[name] is None else f"{summary[name]:.1f} +- {summary[error]:.1f}"

    columns = {
        "task": task,
        "tasks": str(summary["num_tasks"]),
        "pass@1 %": scored("pass@1", "stderr"),
        "NFE": f"{summary['mean_nfe']:.1f}",
        "cache forwards": f"{summary['mean_cache_forwards']:.1f}",
        "tokens per forward": f"{summary['tokens_per_forward']:.2f}",
        "decoding s": f"{summary['seconds']:.1f}",
    }
    if summary["plus_pass@1"] is not None:
        columns = {**columns, "plus pass@1 %": scored("plus_pass@1", "plus_stderr")}
    widths = [max(len(name), len(value)) for name, value in columns.items()]
    lines = [list(columns), ["-" * width for width in widths], list(columns.values())]
    return "".join("| " + " | ".join(map(str.ljust, line, widths)) + " |\n" for line in lines)
