"""What a second process costs: two processes under DDP against one, at the same batch per process, in turns.

    python scripts/bench/scaling.py                                   # a 46 M LLaDA-MoE, one CPU thread per process
    python scripts/bench/scaling.py --kinds plain --rounds 20
    python scripts/bench/scaling.py --family llada --ddp_bucket_cap_mb 50

Both sides are workers that stay: each runs Trainer.train() and waits, at the beginning of every turn, until it is told
to take some more optimizer steps. So the two never run at the same time, and whatever disturbs the machine meets both.
A side's time per step is that of its slowest process. Two processes on one machine share its memory and caches beside
the network: the ratio holds more than communication.
"""

import contextlib
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from bench_model import ModelOptions, describe_machine, make_model, option, print_machine, ratio_to, write_json
from rich.console import Console
from rich.table import Table

from dllm import utils

WORKER = pathlib.Path(__file__).with_name("scaling_worker.py")
KINDS = {
    "plain": "MDLM",
    "memory": "MemDLM, inner gradients averaged (mem_sync_inner)",
    "memory_alone": "MemDLM, each process its own memory",
}
SIDES = {"one": 1, "two": 2}  # processes
console = Console()


@dataclass
class Options(ModelOptions):
    """The model, the batch and the measurement."""

    batch_size: int = option(2, "Rows of each process, at least 1.")
    length: int = option(512, "Tokens of a row, at least 8.")
    kinds: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": f"What to time, of {', '.join(KINDS)}."}
    )
    steps_per_turn: int = option(2, "Optimizer steps of a turn, at least 1.")
    ddp_bucket_cap_mb: int | None = option(None, "DDP: megabytes of a bucket, at least 1. None: as torch does it.")
    ddp_find_unused_parameters: bool | None = option(None, "DDP: look for idle weights. None: as the trainer does it.")
    timeout: float = option(600, "Seconds that a turn may take, above 0; then the workers are ended.")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise utils.InputError(f"--kinds {' '.join(unknown)}: choose of {', '.join(KINDS)}")
        if self.length < 8:
            raise utils.InputError(f"--length must be at least 8, got {self.length}")
        if self.device != "cpu":
            raise utils.InputError("two processes are compared on the CPU: drop --device")
        if self.timeout <= 0:
            raise utils.InputError(f"--timeout must be above 0, got {self.timeout}")


class Side:
    """The workers of one side: as many processes as it has, each with its pipes.

    Args:
        number: processes.
        settings: what the workers are told (see scaling_worker.py).
        folder: for their errors and outputs.
    """

    def __init__(self, number: int, settings: dict[str, Any], folder: pathlib.Path) -> None:
        self.errors = [folder / f"{number}-{rank}.err" for rank in range(number)]
        port = _free_port()
        self.workers = []
        for rank, path in enumerate(self.errors):
            # Also one process alone is a process group's environment, so that nothing else differs.
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "MASTER_PORT": port}
            environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in ranks.items()}}
            environment["OMP_NUM_THREADS"] = str(settings["options"]["threads"])
            command = [sys.executable, str(WORKER), json.dumps({**settings, "output": str(folder / str(number))})]
            with path.open("w") as errors:
                self.workers.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                    )
                )

    def wait(self) -> list[Any]:
        """The next message of every worker.

        Raises:
            RuntimeError: a worker has ended.
        """
        messages = []
        for worker, errors in zip(self.workers, self.errors, strict=True):
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line:
                raise RuntimeError(f"a worker ended:\n{errors.read_text()[-3000:]}")
            messages.append(json.loads(line))
        return messages

    def turn(self) -> dict[str, Any]:
        """One turn: {"seconds" per step of the slowest process, "cpu_seconds" per step of all, "loss" of each}."""
        for worker in self.workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        messages = self.wait()
        return {
            "seconds": max(message["seconds"] for message in messages),
            "cpu_seconds": sum(message["cpu_seconds"] for message in messages),
            "loss": [message["loss"] for message in messages],
        }

    def end(self) -> None:
        """Ends the workers, whatever they do."""
        for worker in self.workers:
            with contextlib.suppress(BrokenPipeError):
                if worker.stdin is not None:
                    worker.stdin.close()
        for worker in self.workers:
            try:
                worker.wait(timeout=30)
            except subprocess.TimeoutExpired:
                worker.kill()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def started(settings: dict[str, Any]) -> Iterator[dict[str, Side]]:
    """The workers of both sides, ready; gone after the block."""
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Side] = {}
        try:
            for name, number in SIDES.items():
                sides[name] = Side(number, settings, pathlib.Path(folder))
                sides[name].wait()  # one side after the other: loading both at once would take the memory of both
            yield sides
        finally:
            for side in sides.values():
                side.end()


def time_kind(sides: dict[str, Side], rounds: int, warmup_rounds: int) -> dict[str, Any]:
    """{"seconds", "cpu_seconds", "losses": {side: one value per round}}; which side goes first alternates."""
    found: dict[str, Any] = {name: {side: [] for side in sides} for name in ("seconds", "cpu_seconds", "losses")}
    for number in range(-warmup_rounds, rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            seen = sides[name].turn()
            if number >= 0:
                found["seconds"][name].append(seen["seconds"])
                found["cpu_seconds"][name].append(seen["cpu_seconds"])
                found["losses"][name].append(seen["loss"])
    return found


def print_results(results: dict[str, Any]) -> None:
    """Medians, and the ratios on lines of their own."""
    print_machine(results["machine"])
    table = Table("steps", "processes", title="Seconds per optimizer step")
    for heading in ("median", "min", "max", "CPU time of all"):
        table.add_column(heading, justify="right")
    for kind, times in results["times"].items():
        for side, seconds in times["seconds"].items():
            values = [statistics.median(seconds), min(seconds), max(seconds)]
            values.append(statistics.median(times["cpu_seconds"][side]))
            table.add_row(kind, side, *(f"{value:.4f}" for value in values))
    console.print(table)
    for kind, ratio in results["ratios"].items():
        print(f"ratio two/one {kind}: {ratio['ratio']:.3f}")
        cpu = results["times"][kind]["cpu_seconds"]
        each = {side: statistics.median(seconds) / SIDES[side] for side, seconds in cpu.items()}
        # CPU time tells when another program was in the way; waiting for each other is not in it.
        print(
            f"  single rounds {ratio['smallest']:.3f} to {ratio['largest']:.3f}, CPU time of a process "
            f"{each['two'] / each['one']:.3f}"
        )


def main() -> None:
    (options,) = utils.parse_args(Options)
    torch.set_num_threads(options.threads)
    steps = options.steps_per_turn * (options.rounds + options.warmup_rounds)
    times = {}
    for kind in options.kinds:
        with started({"options": asdict(options), "kind": kind, "steps": steps}) as sides:
            times[kind] = time_kind(sides, options.rounds, options.warmup_rounds)
    results = {
        "options": asdict(options),
        "machine": describe_machine(make_model(options), "cpu"),
        "times": times,
        "ratios": {kind: ratio_to(found["seconds"]["two"], found["seconds"]["one"]) for kind, found in times.items()},
    }
    print_results(results)
    write_json(options.json, results)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
