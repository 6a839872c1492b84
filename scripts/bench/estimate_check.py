"""Estimates of dllm.tools.estimate against measured peak memory: training steps in fresh processes, on the CPU.

    python scripts/bench/estimate_check.py                                # dense; one process, then DDP and ZeRO with 2
    python scripts/bench/estimate_check.py --family llada_moe --engines single ddp

Measured is the largest resident memory of the main process less that of a process that trains a far smaller model in
the same way (what Python, libraries and the engine take without a model). Memory is given back to the system as soon as
it is free (MALLOC_MMAP_THRESHOLD_), so that the peak is what was in use. FSDP2 is not among the engines: on a CPU
accelerate runs plain DDP in its place.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from bench_model import ModelOptions, make_model, make_tokenizer, option, spec_of_family, write_json
from rich.console import Console
from rich.table import Table
from training_step import make_rows

from dllm import utils
from dllm.core.trainers import MDLMConfig, MDLMTrainer
from dllm.core.trainers.meters import peak_memory_mib
from dllm.models.lora import LoraSettings, add_lora
from dllm.tools.estimate.memory import Recipe, estimate_memory
from dllm.tools.estimate.shape import shape_of

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "accelerate_configs"
NUM_STEPS = 3
LORA_RANK = 32
ENGINES = {"single": None, **{name: f"cpu_{name}.yaml" for name in ("ddp", "zero1", "zero2", "zero3")}}
CASES = {
    "full": {"lora": False, "gradient_checkpointing": False},
    "full, checkpointing": {"lora": False, "gradient_checkpointing": True},
    "LoRA": {"lora": True, "gradient_checkpointing": False},
    "LoRA, checkpointing": {"lora": True, "gradient_checkpointing": True},
}
console = Console()


@dataclass
class Options(ModelOptions):
    """The model and what is trained."""

    batch_size: int = option(2, "Rows of each process, at least 1.")
    length: int = option(512, "Tokens of a row, at least 8.")
    prompt_length: int = option(0, "Tokens of a row without label.")
    time: float = option(0.5, "Diffusion time of the rows, hence the share of loss positions, in [0.01, 0.99].")
    lora: bool = option(False, "Used by the processes that are measured.")
    gradient_checkpointing: bool = option(False, "Used by the processes that are measured.")
    engines: list[str] = field(default_factory=lambda: list(ENGINES), metadata={"help": f"Of {', '.join(ENGINES)}."})
    cases: list[str] = field(default_factory=lambda: list(CASES), metadata={"help": f"Of {'; '.join(CASES)}."})
    measure: bool = option(False, "Only train and print the peak (the script calls itself so).")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("engines", ENGINES), ("cases", CASES)):
            unknown = [word for word in getattr(self, name) if word not in known]
            if unknown:
                raise utils.InputError(f"--{name} {' '.join(unknown)} is unknown; allowed: {', '.join(known)}")


def train(options: Options) -> None:
    """A few steps; the main process prints {"peak_mib"}."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        args = MDLMConfig(
            output_dir=folder,
            use_cpu=True,
            seed=options.seed,
            per_device_train_batch_size=options.batch_size,
            max_steps=NUM_STEPS,
            gradient_checkpointing=options.gradient_checkpointing,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        tokenizer = make_tokenizer(spec_of_family(options))
        model = make_model(options)
        if options.lora:
            model = add_lora(model, LoraSettings(r=LORA_RANK, dropout=0.0), options.seed)
        trainer: Any = MDLMTrainer(model=model, args=args, processing_class=tokenizer)
        number = NUM_STEPS * args.world_size * options.batch_size
        trainer.train_dataset = make_rows(
            replace(options, batch_size=number),  # pyright: ignore[reportArgumentType] (the same fields)
            trainer,
            first_token=len(tokenizer),
        )
        trainer.train()
    if utils.is_main_process():
        print(json.dumps({"peak_mib": peak_memory_mib(args.device), "processes": args.world_size}))
    if dist.is_initialized():
        # Leaving without this aborts at random.
        dist.barrier()
        dist.destroy_process_group()


def measure(options: Options, engine: str) -> float:
    """Peak resident MiB of the main process of a fresh run.

    Raises:
        RuntimeError: the run failed.
    """
    words = [str(pathlib.Path(__file__)), "--measure", "True"]
    for name, value in asdict(options).items():
        if name not in ("engines", "cases", "measure", "json") and value is not None:
            words += [f"--{name}", str(value)]
    config = ENGINES[engine]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)] if config else []
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": str(options.threads),
        # The package as this process has it, whoever starts the script.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run([sys.executable, *launch, *words], env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"peak_mib"')]
    if done.returncode or not lines:
        raise RuntimeError(f"the run under {engine} failed:\n{done.stderr[-3000:]}")
    found = json.loads(lines[0])
    assert found["processes"] == (1 if config is None else 2), found
    return found["peak_mib"]


def small(options: Options) -> Options:
    """A model that takes next to nothing."""
    dense = None if options.mlp_hidden_size is None else 32
    routed = None if options.expert_intermediate_size is None else 16
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 300, "length": 16, "batch_size": 1}
    return replace(options, **sizes, mlp_hidden_size=dense, expert_intermediate_size=routed)


def estimated_mib(options: Options, engine: str) -> float:
    """What the tool says of the same run, without its overhead."""
    recipe = Recipe(
        engine="ddp" if engine == "single" else engine,  # pyright: ignore[reportArgumentType]
        num_gpus=1 if engine == "single" else 2,
        length=options.length,
        batch_size=options.batch_size,
        dtype="float32",
        lora_rank=LORA_RANK if options.lora else 0,
        checkpointing=options.gradient_checkpointing,
        loss_share=options.time,
    )
    with torch.device("meta"):
        shape = shape_of(make_model(options), "all-linear" if options.lora else None)
    return estimate_memory(shape, recipe).peak / 2**20


def main() -> None:
    (options,) = utils.parse_args(Options)
    if options.measure:
        train(options)
        return
    results = []
    table = Table("engine", "trained", title="Peak memory of the main process, MiB")
    for heading in ("estimate", "measured", "without a model", "estimate / measured"):
        table.add_column(heading, justify="right")
    for engine in options.engines:
        base = measure(small(options), engine)
        for case in options.cases:
            chosen = replace(options, **CASES[case])
            estimate, peak = estimated_mib(chosen, engine), measure(chosen, engine) - base
            results.append({"engine": engine, "case": case, "estimate": estimate, "measured": peak, "base": base})
            print(f"{engine}, {case}: estimate {estimate:.0f}, measured {peak:.0f}, ratio {estimate / peak:.2f}")
            table.add_row(engine, case, f"{estimate:.0f}", f"{peak:.0f}", f"{base:.0f}", f"{estimate / peak:.2f}")
    console.print(table)
    write_json(options.json, {"options": asdict(options), "results": results})


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
