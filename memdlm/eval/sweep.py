"""Accuracy over context length and needle depth, without and with memory: one table and one heat map.

    python -m memdlm.eval.sweep --model_name_or_path runs/tiny --device cpu --num_samples 10 \
        --tasks memdlm_babilong_qa1,memdlm_ruler_niah_single --lengths 1k,2k,4k --settings plain,memory

A cell is one task at one length in one setting. Finished cells are kept in OUTPUT_DIR/cells.json and not run again
unless something that decides their answers has changed; answers of an unfinished one are kept too.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from lm_eval._cli.utils import key_val_to_dict
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from rich.console import Console

from dllm.core.eval.answers import request_key
from dllm.core.eval.config import BaseEvalConfig, parse_model_args
from dllm.core.eval.launch import TASKS_DIR
from dllm.data.longcontext.settings import LongContextSettings, parse_lengths
from dllm.models.auto import find_family
from dllm.models.checkpoint import one_line
from dllm.models.stamp import checkpoint_stamp
from dllm.utils.parsing import InputError, one_line_errors, parse_args
from memdlm.eval.harness import MemoryBlockHarness, MemoryHarness, MemoryMDLMHarness
from memdlm.eval.sweep_report import Cell, draw, markdown
from memdlm.memory.config import FLAG_PREFIX

SETTINGS = ("plain", "memory")
# By the attention of the model's family.
HARNESSES: dict[str, type[MemoryHarness]] = {"bidirectional": MemoryMDLMHarness, "block_causal": MemoryBlockHarness}
_MODEL_FLAGS = (
    *("adapter_model_name_or_path", "base_model_name_or_path", "load_in_4bit"),
    *("max_length", "max_new_tokens", "steps", "block_size"),
)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class SweepOptions:
    """What is measured.

    Raises:
        InputError: an unknown setting, a length or depth that is none, a number out of its range.
    """

    model_name_or_path: str = field(metadata={"help": "Checkpoint folder or Hub name; or that of a PEFT adapter."})
    tasks: str = _option("memdlm_babilong_qa1,memdlm_ruler_niah_single", "Tasks of ours, separated by commas.")
    lengths: str = _option("1k,2k,4k", "Context lengths in tokens, separated by commas; 1k is 1,024.")
    settings: str = _option("plain,memory", "plain: without memory; memory: one written from each prompt.")
    depths: str = _option("0,0.25,0.5,0.75,1", "Needle depths in [0, 1], 0 at the beginning, separated by commas.")
    num_samples: int = _option(25, "Documents of each cell, at least 1; best a multiple of the number of depths.")
    limit: int | None = _option(None, "Only the first so many documents of each cell, at least 1. None: all.")
    batch_size: int = _option(8, "Prompts decoded at a time, at least 1.")
    adapter_model_name_or_path: str | None = _option(None, "PEFT adapter to put on the model. None: none.")
    base_model_name_or_path: str | None = _option(None, "Base of the adapter that the model is. None: as it says.")
    load_in_4bit: bool = _option(False, "Quantise the base weights to NF4 on loading (needs bitsandbytes).")
    max_length: int | None = _option(None, "Most tokens of prompt and answer, at least 2. None: the model's limit.")
    max_new_tokens: int | None = _option(None, "Tokens of an answer, at least 1. None: what the task asks for.")
    steps: int | None = _option(
        None,
        "Denoising steps of an answer, or of a block where the family decodes blocks, at least 1. None: one per token.",
    )
    block_size: int | None = _option(None, "Tokens decoded before the next ones, at least 1. None: all at once.")
    data_dir: str | None = _option(None, "Folder with babi/*.txt and text/*.txt. None: made on the spot.")
    extra_model_args: str | None = _option(
        None, "Further model arguments, key=value,... or JSON. Those with mem_ go to the setting memory alone."
    )
    output_dir: str = _option("runs/sweep", "Folder of cells.json, table.md, table.json, heatmap.png and the answers.")
    device: str | None = _option(None, "Where to run, e.g. cpu or cuda:1. None: the GPU if there is one.")

    def __post_init__(self) -> None:
        for name in ("num_samples", "limit", "batch_size"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, got {value}")
        unknown = [name for name in _listed(self.settings) if name not in SETTINGS]
        if unknown:
            raise InputError(f"--settings {unknown[0]!r} is unknown: choose from {', '.join(SETTINGS)}")
        for name in ("tasks", "settings"):
            if not _listed(vars(self)[name]):
                raise InputError(f"--{name} is empty: name at least one")
        self.metadata(parse_lengths(self.lengths)[0])  # checks depths and lengths
        memory = [name for name in self.extra() if name.startswith(FLAG_PREFIX)]
        if memory and "memory" not in _listed(self.settings):
            raise InputError(f"{memory[0]} has no effect with --settings {self.settings}: add memory, or drop it")

    def extra(self) -> dict[str, Any]:
        """`extra_model_args` as a dict."""
        text = (self.extra_model_args or "").strip()
        try:
            return json.loads(text) if text.startswith("{") else key_val_to_dict(text)
        except ValueError as error:
            raise InputError(f"--extra_model_args {text!r}: {error}; the form is key=value,key=value") from error

    def metadata(self, length: int) -> dict[str, Any]:
        """What the documents of a cell are made from, for lm-eval's task manager."""
        try:
            depths = [float(depth) for depth in _listed(self.depths)]
        except ValueError as error:
            raise InputError(f"--depths {self.depths!r}: {error}; the form is 0,0.5,1") from error
        # Every cell is a run of its own: this keeps the questions the same at all lengths.
        shortest = min((asked for asked in parse_lengths(self.lengths) if asked), default=None)
        values = {
            "lengths": [length],
            "num_samples": self.num_samples,
            "depths": depths,
            "data_dir": self.data_dir,
            "questions_fit": shortest,
        }
        LongContextSettings(lengths=(length,), num_samples=self.num_samples, depths=cast(Any, depths))
        return {name: value for name, value in values.items() if value is not None}

    def model_args(self, setting: str) -> dict[str, Any]:
        """Arguments of the adapter in one of SETTINGS."""
        given = {name: vars(self)[name] for name in _MODEL_FLAGS if vars(self)[name] not in (None, False)}
        extra = self.extra()
        if setting == "plain":
            extra = {name: value for name, value in extra.items() if not name.startswith(FLAG_PREFIX)}
        switch = {"mem_enabled": True} if setting == "memory" else {}
        return {"pretrained": self.model_name_or_path, **given, **switch, **extra}


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def sweep(options: SweepOptions, console: Console) -> list[Cell]:
    """All cells, in the order setting, task, length; those that are not in cells.json are run and kept there.

    Raises:
        InputError: an unknown task, wrong model arguments, or whatever the harness refuses.
    """
    tasks = _known_tasks(_listed(options.tasks))
    lengths = parse_lengths(options.lengths)
    folder = pathlib.Path(options.output_dir)
    store = CellStore(folder / "cells.json")
    family = find_family(options.model_name_or_path, options.base_model_name_or_path)
    harness_class = HARNESSES[family.attention]
    configs = {
        setting: parse_model_args(harness_class.config_class, options.model_args(setting))
        for setting in _listed(options.settings)
    }
    cells = []
    for setting, config in configs.items():
        harness: MemoryHarness | None = None  # loaded for the first cell that is not done
        for task, length in ((task, length) for task in tasks for length in lengths):
            identity = _identity(options, config, task, length)
            found = store.get(identity)
            if found is None:
                if harness is None:
                    arguments = {**options.model_args(setting), "answers_dir": str(folder / "answers")}
                    harness = harness_class(**arguments, batch_size=options.batch_size, device=options.device)
                console.print(f"[bold]{setting}[/bold] {task} at {length} tokens", highlight=False)
                found = run_cell(harness, options, setting, task, length)
                store.add(identity, found)
            cells.append(found)
        del harness
        gc.collect()  # two models need not fit side by side
    return cells


def run_cell(harness: MemoryHarness, options: SweepOptions, setting: str, task: str, length: int) -> Cell:
    """One task at one length, by lm-eval.

    Args:
        harness: the model in that setting.
        options: number of documents, depths, ...
        setting: name, for the cell.
        task: name of a task or group of ours.
        length: tokens of prompt and answer.
    """
    config = harness.config
    metadata = {
        "pretrained": config.pretrained,
        "base_model_name_or_path": config.base_model_name_or_path,
        "trust_remote_code": config.trust_remote_code,
        **options.metadata(length),
    }
    before = harness.counters()
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False, metadata=metadata)
    results = simple_evaluate(
        harness,
        tasks=[task],
        task_manager=manager,
        limit=options.limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert results is not None
    after = harness.counters()
    depths = options.metadata(length)["depths"]
    scores: dict[float | None, list[float]] = {}
    for sample in _samples(results):
        doc = sample["doc"]
        # The depth that was asked for: where the needle came to lie is a few tokens off.
        depth = None if doc["depth"] is None else depths[doc["index"] % len(depths)]
        scores.setdefault(depth, []).append(float(sample["acc"]))
    answers = max(after["num_answers"] - before["num_answers"], 1)
    return Cell(
        setting=setting,
        task=task,
        length=length,
        scores={depth: scores[depth] for depth in sorted(scores, key=lambda depth: -1.0 if depth is None else depth)},
        seconds=_seconds(after) - _seconds(before),
        mean_nfe=(after["nfe"] - before["nfe"]) / answers,
        num_without_memory=len(after["without_memory"]) - len(before["without_memory"]),
    )


def _seconds(counters: Mapping[str, Any]) -> float:
    return counters["seconds"] + counters.get("adaptation_seconds", 0.0)


def _samples(results: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for samples in results["samples"].values():
        yield from samples


def _known_tasks(names: Sequence[str]) -> list[str]:
    known = TaskManager(include_path=str(TASKS_DIR), include_defaults=False).all_tasks
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"--tasks {unknown[0]!r} is no task of ours: choose from {', '.join(known)}")
    return list(names)


def _identity(options: SweepOptions, config: BaseEvalConfig, task: str, length: int) -> str:
    """Digest of everything that decides the answers of a cell."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "answers_dir"}
    names = (config.pretrained, config.adapter_model_name_or_path, config.base_model_name_or_path)
    stamps = [None if name is None else checkpoint_stamp(name) for name in names]
    return request_key("cell", settings, stamps, task, options.metadata(length), options.limit)


class CellStore:
    """Cells by identity, in one JSON file that is whole at any time.

    Args:
        path: the file; its folder is made.

    Raises:
        InputError: the file is no such JSON.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._cells: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise InputError(f"{path} is damaged ({one_line(error)}): delete it, or give another folder") from error

    def get(self, identity: str) -> Cell | None:
        """The cell, or None if it has not been run."""
        kept = self._cells.get(identity)
        return None if kept is None else Cell.from_json(kept)

    def add(self, identity: str, cell: Cell) -> None:
        """Keeps a cell, at once on disk."""
        self._cells[identity] = cell.to_json()
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self._cells, indent=1) + "\n")
        partial.replace(self.path)


def main() -> None:
    """The command line."""
    (options,) = parse_args(SweepOptions)
    console = Console()
    cells = sweep(options, console)
    folder = pathlib.Path(options.output_dir)
    table = markdown(cells)
    (folder / "table.md").write_text(table)
    (folder / "table.json").write_text(json.dumps([cell.row() for cell in cells], indent=2) + "\n")
    draw(cells, folder / "heatmap.png")
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(f"table.md, table.json and heatmap.png are in {folder}/", highlight=False)


if __name__ == "__main__":
    try:
        with one_line_errors():
            main()
    except KeyboardInterrupt as interrupted:
        print(" ".join(str(interrupted).split()) or "interrupted", file=sys.stderr)
        raise SystemExit(130) from None
