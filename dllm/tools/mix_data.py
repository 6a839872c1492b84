"""Mix fine-tuning data from several sources: so many rows of each, filtered, no prompt twice, no benchmark problem.

    python -m dllm.tools.mix_data --source "code.jsonl?contains=def :400" --source "gsm8k.jsonl:600" \
        --benchmarks HumanEval.jsonl.gz mbpp.jsonl --seed 1 --output mix.jsonl
    python -m dllm.tools.mix_data --preset c40m60 --model_name_or_path MODEL --shuffle_buffer 100000 \
        --benchmarks HumanEval.jsonl.gz mbpp.jsonl --output runs/c40m60

A source is FILE:NUMBER, with options FILE?key=value&key=value:NUMBER (see `dllm.data.mixture`). The result, a .jsonl
file or a folder, is what `--dataset_args` of the training scripts reads; OUTPUT.report.json says what came from where.
"""

import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dllm.data.datasets import load_raw_dataset
from dllm.data.files import read_jsonl
from dllm.data.mixture import MIXTURE_PRESETS, Mixer, MixtureSettings, parse_source
from dllm.data.overlap import LeakFilter
from dllm.models.auto import load_tokenizer
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError, one_line_errors, parse_args

logger = get_default_logger("dllm.tools.mix_data")

# Columns that hold the text of a problem; the first that is there is taken.
PROMPT_COLUMNS = ("prompt", "text", "problem", "question", "instruction")


def _several(help: str) -> Any:
    return field(default_factory=list, metadata={"help": help, "action": "extend"})


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class MixArguments:
    """What to mix, and where to.

    Raises:
        InputError: neither sources nor a preset, an unknown preset, a number out of its range.
    """

    output: str = field(metadata={"help": "New file (.jsonl), or new folder (any other name) for train.jsonl."})
    source: list[str] = _several("FILE:NUMBER, one or more; the flag may be repeated. None: those of the preset.")
    preset: str | None = _option(None, f"Published settings: {', '.join(MIXTURE_PRESETS)}. Flags win over it.")
    benchmarks: list[str] = _several("Files of benchmarks whose problems must not be among the rows, one or more.")
    seed: int | None = _option(None, "Of the order of rows. None: the preset's, else 0.")
    shuffle_buffer: int | None = _option(
        None, "Stream the sources and shuffle within so many rows, at least 1. None: read whole sources, shuffle all."
    )
    system: str | None = _option(None, "System message of rows without one. None: the preset's, else no message.")
    model_name_or_path: str | None = _option(None, "Model whose tokenizer and chat template count tokens.")
    max_tokens: int | None = _option(None, "Most tokens of a row, at least 1. None: the preset's, else any number.")
    num_test: int = _option(0, "Rows that go to test.jsonl of the folder instead, at least 0.")
    trust_remote_code: bool = _option(False, "Run code that comes with the tokenizer.")

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in MIXTURE_PRESETS:
            raise InputError(f"--preset {self.preset!r} is unknown; choose one of {', '.join(MIXTURE_PRESETS)}")
        if not self.source and self.preset is None:
            raise InputError("nothing to mix: give --source FILE:NUMBER, or --preset c40m60")
        if self.num_test < 0:
            raise InputError(f"--num_test must be at least 0, got {self.num_test}")
        if self.num_test and self._is_file():
            raise InputError("--num_test needs a folder: give an --output that does not end with .jsonl")

    def _is_file(self) -> bool:
        return self.output.endswith(".jsonl")

    def chosen(self, name: str, default: Any = None) -> Any:
        """A setting: what was given, else the preset's, else `default`."""
        given = vars(self)[name]
        if given is not None:
            return given
        return MIXTURE_PRESETS[self.preset].settings.get(name, default) if self.preset else default


def benchmark_prompts(paths: Iterable[str]) -> Iterator[str]:
    """The problem texts of benchmark files (JSON lines, .gz too, or whatever `--dataset_args` reads), of all splits.

    Raises:
        InputError: a file cannot be read, or a row has none of PROMPT_COLUMNS.
    """
    for path in paths:
        # Read by hand where possible: columns of benchmarks often mix types, which tables refuse.
        plain = path.removesuffix(".gz").endswith(".jsonl") and pathlib.Path(path).is_file()
        rows = read_jsonl(path) if plain else (row for split in load_raw_dataset(path).values() for row in split)
        for number, row in enumerate(rows, 1):
            column = next((name for name in PROMPT_COLUMNS if isinstance(row.get(name), str)), None)
            if column is None:
                raise InputError(
                    f"benchmark {path}, row {number}: none of the columns {', '.join(PROMPT_COLUMNS)} holds text; "
                    f"columns found: {', '.join(row)}"
                )
            yield row[column]


def _report_path(output: pathlib.Path) -> pathlib.Path:
    # Beside a folder, not in it: a .json there would be read as data.
    return output.with_name(f"{output.name}.report.json")


def _check_free(output: pathlib.Path) -> None:
    for path in (output, _report_path(output)):
        if path.exists():
            raise InputError(f"{path} is there already: delete it, or give another --output")


def _write_lines(path: pathlib.Path, rows: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def write_mixture(output: pathlib.Path, rows: Sequence[Any], num_test: int, report: dict[str, Any]) -> None:
    """The rows at `output` and the report beside it; both whole, or not there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f"{output.name}.partial-", dir=output.parent))
    try:
        made, written = partial / "data", partial / "report.json"
        written.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if output.suffix == ".jsonl":
            _write_lines(made, rows)
        else:
            made.mkdir()
            _write_lines(made / "train.jsonl", rows[num_test:])
            if num_test:
                _write_lines(made / "test.jsonl", rows[:num_test])
        made.rename(output)
        written.rename(_report_path(output))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def mix_data(args: MixArguments) -> pathlib.Path:
    """Mix, write, and return the path of the data.

    Raises:
        InputError: the output is there already; a source, benchmark or tokenizer cannot be read or used.
    """
    output = pathlib.Path(args.output)
    _check_free(output)
    preset = MIXTURE_PRESETS[args.preset] if args.preset else None
    sources = [parse_source(spec) for spec in args.source or (preset.sources if preset else ())]
    max_tokens = args.chosen("max_tokens")
    if args.model_name_or_path is not None and max_tokens is None:
        raise InputError("--model_name_or_path has no effect without --max_tokens: give both, or drop it")
    tokenizer = None
    if args.model_name_or_path is not None:
        tokenizer = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    leaks = LeakFilter(benchmark_prompts(args.benchmarks)) if args.benchmarks else None
    settings = MixtureSettings(
        seed=args.chosen("seed", 0),
        shuffle_buffer=args.shuffle_buffer,
        system=args.chosen("system"),
        max_tokens=max_tokens,
        tokenizer=tokenizer,
        leaks=leaks,
    )
    mixer = Mixer(settings, preset.options if preset else None)
    rows = mixer.mix(sources)
    if args.num_test >= len(rows):
        raise InputError(f"--num_test {args.num_test} leaves nothing of {len(rows):,} rows to train on: lower it")
    report = {
        "arguments": vars(args),
        "seed": settings.seed,
        "max_tokens": max_tokens,
        "benchmark_prompts": 0 if leaks is None else leaks.num_prompts,
        "rows": len(rows),
        "sources": mixer.report,
    }
    write_mixture(output, rows, args.num_test, report)
    logger.info(f"{output}: {len(rows):,} rows; what came from where is in {_report_path(output)}")
    return output


def main() -> None:
    """The command line."""
    (args,) = parse_args(MixArguments)
    with one_line_errors():
        mix_data(args)


if __name__ == "__main__":
    main()
