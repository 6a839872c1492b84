"""What memory costs: a plain and a MemDLM training step on random weights, in turns, in one process.

    python scripts/bench/training_step.py                                   # a 46 M LLaDA-MoE, one CPU thread
    python scripts/bench/training_step.py --lora True --mem_num_inner_steps 4
    python scripts/bench/training_step.py --family llada2 --objective bd3lm # block diffusion on [x_t ; x_0]
    python scripts/bench/training_step.py --device cuda --dtype bfloat16

A step is what Trainer does in one: training_step (forward, loss, backward), gradient clipping, AdamW, zero_grad. All
kinds of step train one model with one optimizer on rows with the same masks; which kind goes first alternates.
"""

import itertools
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, make_dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from bench_model import (
    ModelOptions,
    describe_machine,
    make_model,
    make_tokenizer,
    option,
    print_machine,
    ratio_to,
    spec_of_family,
    synchronize,
    write_json,
)
from rich.console import Console
from rich.table import Table
from step_parts import OPTIMIZER, OTHER, PARTS, PartClock, marking

from dllm import utils
from dllm.core.losses import loss_weights
from dllm.core.noising import draw_times, make_generator
from dllm.core.trainers import BD3LMConfig, BD3LMTrainer, MDLMConfig, MDLMTrainer
from dllm.core.trainers.meters import peak_memory_mib
from dllm.data.collators import IGNORE_INDEX, Batch
from dllm.models.lora import LoraSettings, add_lora
from memdlm import MemBD3LMConfig, MemBD3LMTrainer, MemDLMConfig, MemDLMTrainer
from memdlm.memory.config import flag_fields

MAX_GRAD_NORM = 1.0
TIME_TOLERANCE = 0.005  # rows are chosen whose own draw of t comes this close to --time
NUM_OBSERVED_STEPS = 3  # instrumented steps of each kind
NUM_PEAK_STEPS = 3  # steps before peak memory is read
PLAIN, MEMDLM, FULL_VOCABULARY = "plain", "memdlm", "full-vocabulary plain"
# Memory is always on here, so the switch is no flag.
MemoryFlags = make_dataclass("MemoryFlags", [flag for flag in flag_fields() if flag[0] != "mem_enabled"])
console = Console()


@dataclass
class Options(ModelOptions):
    """The model, the batch and the measurement; the settings of the memory are flags of their own (`--mem_*`)."""

    batch_size: int = option(2, "Rows, at least 1.")
    length: int = option(512, "Tokens of a row.")
    prompt_length: int = option(256, "Tokens of a row without label, at least 0 and below length.")
    time: float = option(0.5, f"Diffusion time t of every row (within {TIME_TOLERANCE}), in [0.01, 0.99].")
    lora: bool = option(False, "Train LoRA (r 32, alpha 64, every linear of the layers) instead of all weights.")
    gradient_checkpointing: bool = option(False, "Recompute activations in backward.")
    objective: Literal["mdlm", "bd3lm"] = option("mdlm", "Masked diffusion, or block diffusion on [x_t ; x_0].")
    block_size: int | None = option(None, "Tokens of a block, at least 1. None: the family's own, or 32; for bd3lm.")
    compare_full_vocabulary: bool = option(
        False, "Also time a plain step with logits and cross-entropy at all positions, masked afterwards."
    )
    peak_memory: bool = option(True, "Also measure peak memory (on a CPU in two fresh processes).")
    peak_memory_of: Literal["plain", "memdlm"] | None = option(
        None, "Only print the peak memory of a process that takes three such steps (the script calls itself so)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_length >= self.length:
            raise utils.InputError(f"--prompt_length must be below --length {self.length}, got {self.prompt_length}")
        if not 0.01 <= self.time <= 0.99:
            raise utils.InputError(f"--time must lie in [0.01, 0.99], got {self.time}")
        if self.objective == "mdlm" and self.block_size is not None:
            raise utils.InputError("--block_size has no effect without --objective bd3lm: drop it")
        if self.objective == "bd3lm" and self.compare_full_vocabulary:
            raise utils.InputError("--compare_full_vocabulary is for --objective mdlm: drop one of them")


class FullVocabularyTrainer(MDLMTrainer):
    """The plain step as public code does it: logits and cross-entropy at every position, masked afterwards."""

    def loss_and_outputs(self, model, inputs: Batch):
        """The loss of MDLMTrainer (token normaliser), without picking the masked positions before the head."""
        outputs = model(input_ids=inputs["noised_ids"], attention_mask=inputs.get("attention_mask"))
        nll = F.cross_entropy(outputs.logits.transpose(1, 2), inputs["input_ids"], reduction="none")  # [B, L]
        weights = loss_weights(inputs["t"], self.scheduler_alpha, self.args.loss_weight_type)
        nll = torch.where(inputs["is_masked"], nll * weights[:, None], torch.zeros_like(nll))
        return nll.sum() / inputs["num_maskable"].sum(), outputs


# (trainer, its settings) of each kind, by objective.
TRAINERS: dict[str, dict[str, tuple[type[MDLMTrainer], type[MDLMConfig]]]] = {
    "mdlm": {
        PLAIN: (MDLMTrainer, MDLMConfig),
        MEMDLM: (MemDLMTrainer, MemDLMConfig),
        FULL_VOCABULARY: (FullVocabularyTrainer, MDLMConfig),
    },
    "bd3lm": {PLAIN: (BD3LMTrainer, BD3LMConfig), MEMDLM: (MemBD3LMTrainer, MemBD3LMConfig)},
}


def make_settings(options: Options, memory_flags: dict[str, Any], folder: str) -> dict[str, MDLMConfig]:
    """The settings of each kind's trainer."""
    common: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": options.device == "cpu",
        "seed": options.seed,
        "logging_strategy": "no",
        "save_strategy": "no",
    }
    if options.objective == "bd3lm":  # one time per row, so that --time says how much is masked
        common |= {"block_size": options.block_size, "time_per": "row"}
    own: dict[str, dict[str, Any]] = {PLAIN: {}, MEMDLM: {"mem_enabled": True, **memory_flags}}
    if options.compare_full_vocabulary:
        own[FULL_VOCABULARY] = {}
    return {kind: TRAINERS[options.objective][kind][1](**common, **flags) for kind, flags in own.items()}


class Bench:
    """One model and one optimizer, a trainer of each kind and its batch."""

    def __init__(self, options: Options, settings: dict[str, MDLMConfig]) -> None:
        tokenizer = make_tokenizer(spec_of_family(options))
        self.model = make_model(options)
        if options.lora:
            self.model = add_lora(self.model, LoraSettings(r=32, alpha=64, dropout=0.0), options.seed)
        self.trainers = {
            kind: TRAINERS[options.objective][kind][0](model=self.model, args=args, processing_class=tokenizer)
            for kind, args in settings.items()
        }
        for trainer in self.trainers.values():
            trainer.current_gradient_accumulation_steps = 1  # train() sets it
        if options.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(settings[PLAIN].gradient_checkpointing_kwargs)
        rows = make_rows(options, self.trainers[PLAIN], first_token=len(tokenizer))
        self.batches = {kind: trainer.data_collator(rows) for kind, trainer in self.trainers.items()}
        self.device = settings[PLAIN].device
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.trainers[PLAIN].create_optimizer()

    def step(self, kind: str, before_optimizer: Callable[[], None] = lambda: None) -> torch.Tensor:
        """One optimizer step of a kind; the loss, on the device."""
        loss = self.trainers[kind].training_step(self.model, dict(self.batches[kind]))
        before_optimizer()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def make_rows(options: Options, trainer: MDLMTrainer, first_token: int) -> list[Batch]:
    """Rows of random tokens; their ids are such that the collator draws a t near `options.time` for each."""
    collator: Any = trainer.data_collator
    generator = make_generator(options.seed, "rows")
    rows: list[Batch] = []
    for example_id in itertools.count():
        draws = collator.row_generators(torch.tensor([example_id]), "outer")
        if abs(float(draw_times(draws, collator.time_epsilon)) - options.time) > TIME_TOLERANCE:
            continue
        tokens = torch.randint(first_token, options.vocab_size, (options.length,), generator=generator).tolist()
        labels = [IGNORE_INDEX] * options.prompt_length + tokens[options.prompt_length :]
        rows.append({"input_ids": tokens, "labels": labels, "example_id": example_id})
        if len(rows) == options.batch_size:
            break
    return rows


def time_steps(bench: Bench, rounds: int, warmup_rounds: int) -> dict[str, dict[str, list[float]]]:
    """{"seconds", "cpu_seconds" (of the whole process) and "losses": {kind: one value per round}}.

    Raises:
        RuntimeError: a loss is not finite.
    """
    names = ("seconds", "cpu_seconds", "losses")
    found: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in bench.trainers} for name in names}
    for number in range(-warmup_rounds, rounds):
        for kind in list(bench.trainers)[:: 1 if number % 2 else -1]:
            synchronize(bench.device)
            began, cpu_began = time.perf_counter(), time.process_time()
            loss = bench.step(kind)
            synchronize(bench.device)
            values = (time.perf_counter() - began, time.process_time() - cpu_began, float(loss))
            if not math.isfinite(values[-1]):
                raise RuntimeError(f"the loss of the {kind} step is {values[-1]}")
            if number >= 0:
                for name, value in zip(names, values, strict=True):
                    found[name][kind].append(value)
    return found


def observe_parts(bench: Bench, kind: str) -> dict[str, float]:
    """Seconds of each part of an instrumented step (the one of median length of a few), and "whole"."""
    steps = []
    for _ in range(NUM_OBSERVED_STEPS):
        clock = PartClock(PARTS[kind], lambda: synchronize(bench.device))
        with marking(bench.trainers[kind], clock):
            began = time.perf_counter()
            clock.mark(OTHER)
            bench.step(kind, before_optimizer=lambda clock=clock: clock.mark(OPTIMIZER))
            clock.mark("")
        steps.append({**clock.seconds, "whole": time.perf_counter() - began})
    return sorted(steps, key=lambda parts: parts["whole"])[NUM_OBSERVED_STEPS // 2]


def peak_of(bench: Bench, kind: str) -> float:
    """Peak memory in MiB of a few steps: of the process on a CPU, of the device on CUDA."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(NUM_PEAK_STEPS):
        bench.step(kind)
    synchronize(bench.device)
    return peak_memory_mib(bench.device)


def peaks_of_processes(arguments: list[str]) -> dict[str, float]:
    """Peak resident memory in MiB of a fresh process for each kind of step."""
    peaks = {}
    for kind in (PLAIN, MEMDLM):
        command = [sys.executable, __file__, *arguments, "--peak_memory_of", kind]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the process that measures peak memory failed:\n{done.stderr}")
        peaks[kind] = float(done.stdout.split()[-1])
    return peaks


def describe(bench: Bench) -> dict[str, Any]:
    """What ran, and on what."""
    return {
        **describe_machine(bench.model, bench.device),
        "trained_parameters": sum(p.numel() for p in bench.parameters),
        "loss_positions": len(bench.batches[PLAIN]["loss_positions"]),
        "inner_loss_positions": [len(s["loss_positions"]) for s in bench.batches[MEMDLM]["memory_plan"]["steps"]],
    }


def print_times(results: dict[str, Any]) -> None:
    """Medians of the timed steps."""
    table = Table("step", title="Seconds per training step")
    for heading in ("median", "min", "max", "median CPU time"):
        table.add_column(heading, justify="right")
    for kind, seconds in results["seconds"].items():
        values = [statistics.median(seconds), min(seconds), max(seconds)]
        values.append(statistics.median(results["cpu_seconds"][kind]))
        table.add_row(kind, *(f"{value:.4f}" for value in values))
    console.print(table)


def print_parts(parts: dict[str, float], kind: str) -> None:
    """Where the time of an instrumented step goes."""
    table = Table(f"part of a {kind} step", title="Instrumented step, not among the timed ones")
    for heading in ("ms", "share"):
        table.add_column(heading, justify="right")
    for part, seconds in parts.items():
        table.add_row(part, f"{1000 * seconds:.1f}", f"{100 * seconds / parts['whole']:.1f} %")
    console.print(table)


def print_results(results: dict[str, Any]) -> None:
    """Everything, the ratios on lines of their own."""
    print_machine(results["machine"])
    print_times(results)
    for kind, parts in results["parts"].items():
        print_parts(parts, kind)
    for kind, found in results["ratios"].items():
        print(f"ratio {kind}/plain: {found['ratio']:.2f}")
        cpu_time = statistics.median(results["cpu_seconds"][kind]) / statistics.median(results["cpu_seconds"][PLAIN])
        # CPU time tells when another process was in the way; on a GPU it says nothing.
        print(
            f"  single rounds {found['smallest']:.2f} to {found['largest']:.2f}, CPU time of the process {cpu_time:.2f}"
        )
    peaks = results["peak_memory_mib"]
    if peaks is not None:
        shown = f"plain {peaks[PLAIN]:.0f} MiB, memdlm {peaks[MEMDLM]:.0f} MiB"
        print(f"peak memory: {shown}, ratio {peaks[MEMDLM] / peaks[PLAIN]:.3f}")


def main() -> None:
    options, memory = utils.parse_args(Options, MemoryFlags)
    torch.set_num_threads(options.threads)
    peaks = None
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(options, asdict(memory), folder)
        if options.peak_memory_of is not None:
            print(peak_of(Bench(options, settings), options.peak_memory_of))
            return
        if options.peak_memory and options.device == "cpu":
            # Before there is a model here: a new process starts with the peak of the one that made it.
            peaks = peaks_of_processes(sys.argv[1:])
        bench = Bench(options, settings)
        times = time_steps(bench, options.rounds, options.warmup_rounds)
        parts = {kind: observe_parts(bench, kind) for kind in PARTS}
        if options.peak_memory and options.device == "cuda":
            peaks = {kind: peak_of(bench, kind) for kind in PARTS}
        results = {
            "options": {**asdict(options), **asdict(memory)},
            "machine": describe(bench),
            **times,
            "ratios": {
                kind: ratio_to(seconds, times["seconds"][PLAIN])
                for kind, seconds in times["seconds"].items()
                if kind != PLAIN
            },
            "parts": parts,
            "peak_memory_mib": peaks,
        }
    print_results(results)
    write_json(options.json, results)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
