"""What training takes per GPU, in memory and in communication, from a config.json alone.

    python -m dllm.tools.estimate --model_name_or_path MODEL --max_length 4096,32768 --num_gpus 1,8,64
    python -m dllm.tools.estimate --model_name_or_path MODEL --lora True --load_in_4bit True --engine ddp --terms True
    python -m dllm.tools.estimate --model_name_or_path MODEL --engine zero2,fsdp2 --fast_weight_rank 32

The model is built without weights, so that numbers of parameters are exact; the formulas are in
`dllm.tools.estimate.memory`. What no formula here knows (CUDA context, libraries, fragmentation) is one assumption,
`--overhead_gib`.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from dllm.models.spec import get_spec
from dllm.tools.estimate.memory import ENGINES, SHARDED, Memory, Recipe, estimate_memory, traffic, trained_numbers
from dllm.tools.estimate.shape import ModelShape, read_shape
from dllm.utils.parsing import InputError, one_line_errors, parse_args

GIB = 2**30
TERMS = ("weights", "gradients", "optimizer", "buffers", "fast", "activations", "head")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class EstimateArguments:
    """What is trained, how, and on what; flags that training scripts have mean what they mean there.

    Raises:
        InputError: a number out of its range, an unknown word, an option without effect.
    """

    model_name_or_path: str = field(metadata={"help": "Folder with config.json, the file itself, or a Hub name."})
    engine: str = _option("all", f"One or more of {', '.join(ENGINES)}, separated by commas; or all.")
    max_length: str = _option("4096,8192,16384,32768", "Tokens of a row, one or more numbers of at least 2.")
    num_gpus: str = _option("1,8,64", "GPUs, one or more numbers of at least 1.")
    per_device_train_batch_size: int = _option(1, "Rows of a micro-batch on one GPU, at least 1.")
    gradient_accumulation_steps: int = _option(1, "Micro-batches of an optimizer step, at least 1.")
    dtype: str = _option("bfloat16", "Of the weights: bfloat16 or float32.")
    bf16: bool = _option(
        True, "Mixed precision. False: weights, gradients and AdamW's moments are all of --dtype, as --bf16 False."
    )
    lora: bool = _option(False, "Train LoRA matrices instead of all weights.")
    lora_r: int = _option(32, "LoRA rank, at least 1. Needs --lora True.")
    lora_dropout: float = _option(0.05, "Dropout on the LoRA input, in [0, 1). Needs --lora True.")
    target_modules: str = _option("all-linear", "Linears that get LoRA. Needs --lora True.")
    load_in_4bit: bool = _option(False, "The linears of the layers are 4-bit NF4 with double quantisation.")
    optim: str = _option("adamw", "adamw, or adamw_8bit (as --optim adamw_bnb_8bit).")
    gradient_checkpointing: bool = _option(True, "Recompute the layers in backward.")
    loss_share: float = _option(0.5, "Share of a row's tokens that are masked and have logits, in (0, 1].")
    fast_weight_rank: int = _option(0, "Rank of a memory's fast weights (--mem_inner_rank), at least 0. 0: no memory.")
    fast_weight_fraction: float = _option(0.1, "Share of the layers with fast weights, in (0, 1].")
    inner_steps: int = _option(2, "States of the inner loop (--mem_num_inner_steps), at least 1.")
    gpu_memory_gib: float = _option(80.0, "Memory of a GPU in GiB, above 0.")
    overhead_gib: float = _option(
        2.0, "Assumed for CUDA context, libraries' workspaces and fragmentation, in GiB, at least 0."
    )
    terms: bool = _option(False, "One line per case, with every term.")
    markdown: bool = _option(False, "Print Markdown.")

    def __post_init__(self) -> None:
        engines = list(ENGINES) if self.engine == "all" else self.engine.split(",")
        self.engines = engines
        self.lengths, self.gpus = _numbers("max_length", self.max_length, 2), _numbers("num_gpus", self.num_gpus, 1)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "lora_r", "inner_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in ("bfloat16", "float32"):
            raise InputError(f"--dtype {self.dtype!r} is unknown; allowed: bfloat16, float32")
        if self.optim not in ("adamw", "adamw_8bit"):
            raise InputError(f"--optim {self.optim!r} is unknown; allowed: adamw, adamw_8bit")
        for name in ("loss_share", "fast_weight_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"--{name} must lie in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout must lie in [0, 1), got {self.lora_dropout}")
        for name in ("overhead_gib", "gpu_memory_gib"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"--{name} must be a finite number, got {getattr(self, name)}")
        if self.fast_weight_rank < 0 or self.overhead_gib < 0 or self.gpu_memory_gib <= 0:
            raise InputError("--fast_weight_rank and --overhead_gib must be at least 0, --gpu_memory_gib above 0")
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        needs = {"lora_r": "lora", "lora_dropout": "lora", "target_modules": "lora"}
        needs |= {"fast_weight_fraction": "fast_weight_rank", "inner_steps": "fast_weight_rank"}
        for knob in dataclasses.fields(self):
            switch = needs.get(knob.name)
            if switch is not None and not getattr(self, switch) and getattr(self, knob.name) != knob.default:
                raise InputError(f"--{knob.name} has no effect without --{switch}")

    def recipe(self, engine: str, num_gpus: int, length: int) -> Recipe:
        """One case.

        Raises:
            InputError: see `Recipe`.
        """
        return Recipe(
            engine=engine,  # pyright: ignore[reportArgumentType] (checked by Recipe)
            num_gpus=num_gpus,
            length=length,
            batch_size=self.per_device_train_batch_size,
            accumulation=self.gradient_accumulation_steps,
            dtype=self.dtype,
            bf16=self.bf16,
            lora_rank=self.lora_r if self.lora else 0,
            lora_dropout=self.lora_dropout if self.lora else 0.0,
            load_in_4bit=self.load_in_4bit,
            optim_8bit=self.optim == "adamw_8bit",
            checkpointing=self.gradient_checkpointing,
            loss_share=self.loss_share,
            fast_weight_rank=self.fast_weight_rank,
            fast_weight_fraction=self.fast_weight_fraction,
            inner_steps=self.inner_steps,
        )

    def recipes(self) -> list[Recipe]:
        """All cases, engine by engine; with --engine all those engines are left out that cannot do what is asked.

        Raises:
            InputError: see `Recipe`; no case at all.
        """
        engines = self.engines
        if self.engine == "all":
            engines = [name for name in engines if not (self.load_in_4bit and name in SHARDED)]
            engines = [name for name in engines if self.optim == "adamw" or name == "ddp"]
        return [self.recipe(name, gpus, length) for name in engines for gpus in self.gpus for length in self.lengths]


def _numbers(flag: str, text: str, least: int) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise InputError(f"--{flag} {text!r}: give whole numbers of at least {least}, separated by commas")
    return [int(word) for word in words]


@dataclass(frozen=True)
class Case:
    """A recipe and what it takes: memory in bytes without the overhead, bytes sent per optimizer step."""

    recipe: Recipe
    memory: Memory
    sent: float


def estimate(args: EstimateArguments) -> tuple[ModelShape, list[Case]]:
    """(the model's sizes, all cases).

    Raises:
        InputError: see `read_shape` and `Recipe`.
    """
    recipes = args.recipes()
    shape = read_shape(args.model_name_or_path, args.target_modules if args.lora else None)
    roles = get_spec(shape.name).fast_weight_targets
    return shape, [Case(r, estimate_memory(shape, r, roles), traffic(shape, r, roles)) for r in recipes]


def matrix(args: EstimateArguments, cases: list[Case]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): an engine on so many GPUs per row, GiB per length; a star where it does not fit."""
    headings = ["engine", "GPUs", *(f"{length:,}" for length in args.lengths), "GiB sent per step"]
    rows = []
    for index in range(0, len(cases), len(args.lengths)):
        part = cases[index : index + len(args.lengths)]
        cells = []
        for case in part:
            total = case.memory.peak / GIB + args.overhead_gib
            cells.append(f"{total:.1f}" + ("" if total <= args.gpu_memory_gib else " *"))
        first = part[0]
        rows.append([first.recipe.engine, str(first.recipe.num_gpus), *cells, f"{first.sent / GIB:.2f}"])
    return headings, rows


def term_rows(args: EstimateArguments, cases: list[Case]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): every term of every case in GiB."""
    headings = ["engine", "GPUs", "length", *TERMS, "peak + overhead", "fits", "GiB sent per step"]
    rows = []
    for case in cases:
        total = case.memory.peak / GIB + args.overhead_gib
        parts = [f"{getattr(case.memory, name) / GIB:.2f}" for name in TERMS]
        fits = "yes" if total <= args.gpu_memory_gib else "no"
        head = [case.recipe.engine, str(case.recipe.num_gpus), f"{case.recipe.length:,}"]
        rows.append([*head, *parts, f"{total:.1f}", fits, f"{case.sent / GIB:.2f}"])
    return headings, rows


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> None:
    """Prints a table."""
    if markdown:
        print(f"{title}\n")
        print(f"| {' | '.join(headings)} |")
        print(f"|{'|'.join('---:' if i else '---' for i in range(len(headings)))}|")
        for row in rows:
            print(f"| {' | '.join(row)} |")
        return
    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    """The command line."""
    (args,) = parse_args(EstimateArguments)
    with one_line_errors():
        shape, cases = estimate(args)
        trained = trained_numbers(shape, cases[0].recipe)
        title = (
            f"{shape.name}: {shape.num_parameters / 1e9:.2f} billion parameters, {trained / 1e9:.3f} trained; "
            f"GiB per GPU, {args.overhead_gib:g} of them assumed overhead; * exceeds {args.gpu_memory_gib:g}"
        )
        headings, rows = (term_rows if args.terms else matrix)(args, cases)
        show(title, headings, rows, args.markdown)


if __name__ == "__main__":
    main()
