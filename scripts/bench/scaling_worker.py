"""One process of scaling.py: trains, and waits at the beginning of every turn for a line on its standard input."""

import json
import os
import sys
import time
from typing import Any, TextIO

import torch
import torch.distributed as dist
import transformers
from bench_model import make_model, make_tokenizer, spec_of_family

from dllm.core.noising import make_generator
from dllm.core.trainers import MDLMConfig, MDLMTrainer
from dllm.data.collators import IGNORE_INDEX, Batch
from memdlm import MemDLMConfig, MemDLMTrainer

MEMORY: dict[str, dict[str, Any]] = {
    "plain": {},
    "memory": {"mem_enabled": True, "mem_sync_inner": True},
    "memory_alone": {"mem_enabled": True, "mem_sync_inner": False},
}


class Turns(transformers.TrainerCallback):
    """Says how long the steps of a turn took, and waits for the next one.

    Args:
        steps: optimizer steps of a turn.
        pipe: where messages go, one JSON object per line.
    """

    def __init__(self, steps: int, pipe: TextIO) -> None:
        self.steps, self.pipe = steps, pipe
        self.loss: Any = float("nan")
        self._began, self._cpu_began = 0.0, 0.0

    def say(self, message: dict[str, Any]) -> None:
        """Sends a message."""
        self.pipe.write(json.dumps(message) + "\n")
        self.pipe.flush()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """At the beginning of a turn: waits."""
        if state.global_step % self.steps == 0:
            if state.global_step == 0:
                self.say({"ready": True})
            if not sys.stdin.readline():
                raise SystemExit("the benchmark has ended")
            self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """At the end of a turn: says its times."""
        if state.global_step % self.steps == 0:
            seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu_began
            self.say({"seconds": seconds / self.steps, "cpu_seconds": cpu / self.steps, "loss": float(self.loss)})


def make_rows(options: Any, first_token: int, number: int) -> list[Batch]:
    """Rows of random tokens, half of each a prompt."""
    generator = make_generator(options.seed, "rows")
    rows = []
    for example_id in range(number):
        tokens = torch.randint(first_token, options.vocab_size, (options.length,), generator=generator).tolist()
        half = options.length // 2
        rows.append({"input_ids": tokens, "labels": [IGNORE_INDEX] * half + tokens[half:], "example_id": example_id})
    return rows


def main() -> None:
    # Whatever prints must not land among the messages.
    pipe, sys.stdout = sys.stdout, sys.stderr
    from scaling import Options

    given = json.loads(sys.argv[1])
    options = Options(**given["options"])
    torch.set_num_threads(options.threads)
    kind = given["kind"]
    config, trainer_class = (MDLMConfig, MDLMTrainer) if kind == "plain" else (MemDLMConfig, MemDLMTrainer)
    chosen = {"ddp_bucket_cap_mb": options.ddp_bucket_cap_mb}
    if options.ddp_find_unused_parameters is not None:
        chosen["ddp_find_unused_parameters"] = options.ddp_find_unused_parameters
    args = config(
        output_dir=given["output"],
        use_cpu=True,
        seed=options.seed,
        per_device_train_batch_size=options.batch_size,
        max_steps=given["steps"],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        **chosen,
        **MEMORY[kind],
    )
    wanted = int(os.environ["WORLD_SIZE"])
    assert args.world_size == wanted, f"{args.world_size} processes instead of {wanted}"
    spec = spec_of_family(options)
    tokenizer = make_tokenizer(spec)
    turns = Turns(options.steps_per_turn, pipe)
    trainer = trainer_class(
        model=make_model(options),
        args=args,
        processing_class=tokenizer,
        train_dataset=make_rows(options, len(tokenizer), args.world_size * options.batch_size * given["steps"]),
        callbacks=[turns],
    )
    original = trainer.training_step

    def training_step(*inputs: Any, **named: Any) -> torch.Tensor:
        turns.loss = original(*inputs, **named)
        return turns.loss

    trainer.training_step = training_step
    trainer.train()
    if dist.is_initialized():
        # Leaving without this aborts at random.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
