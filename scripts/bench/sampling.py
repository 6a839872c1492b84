"""What a decoding step costs: MDLMSampler beside a sampler that computes all logits, in turns, in one process.

    python scripts/bench/sampling.py                                     # a 46 M LLaDA-MoE, 448 + 64 tokens, 64 steps
    python scripts/bench/sampling.py --family llada --block_size 32 --caches none,prefix,dual
    python scripts/bench/sampling.py --device cuda --dtype bfloat16 --batch_size 8

The reference computes logits and probabilities at every position in every step and chooses row by row, as public code
does; both commit the same tokens, which is checked. "Overhead" is the time outside the model's forwards over the time
inside.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from bench_model import (
    ModelOptions,
    describe_machine,
    make_model,
    make_tokenizer,
    option,
    print_machine,
    ratio_to,
    synchronize,
    write_json,
)
from rich.console import Console
from rich.table import Table

from dllm import utils
from dllm.core.noising import make_generator
from dllm.core.samplers import MDLMSampler, MDLMSamplerConfig
from dllm.models import get_spec

REFERENCE = "all logits"
console = Console()


@dataclass
class Options(ModelOptions):
    """The model, the prompts and the measurement."""

    rounds: int = option(3, "Timed rounds (each side once), at least 1.")
    warmup_rounds: int = option(1, "Rounds before them that do not count, at least 0.")
    batch_size: int = option(1, "Prompts, at least 1.")
    prompt_length: int = option(448, "Tokens of a prompt, at least 1.")
    max_new_tokens: int = option(64, "Tokens of an answer, at least 1.")
    steps: int | None = option(None, "Denoising steps, at least 1. None: one per new token.")
    block_size: int | None = option(None, "Tokens of a block, at least 1. None: one block.")
    caches: str = option("none", "Caches of MDLMSampler to time, of none, prefix, dual, separated by commas.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_length < 1:
            raise utils.InputError("--prompt_length must be at least 1")
        self.settings()  # refuses what the sampler refuses

    def settings(self) -> dict[str, MDLMSamplerConfig]:
        """The settings of each cache."""
        return {
            kind: MDLMSamplerConfig(
                max_new_tokens=self.max_new_tokens,
                steps=self.steps or self.max_new_tokens,
                block_size=self.block_size,
                cache=kind,  # pyright: ignore
            )
            for kind in self.caches.split(",")
        }


@torch.no_grad()
def sample_with_all_logits(
    model: torch.nn.Module, prompts: torch.Tensor, mask_token_id: int, config: MDLMSamplerConfig
) -> torch.Tensor:
    """The same greedy decoding the plain way: logits and probabilities of all positions, a loop over rows."""
    ids = torch.nn.functional.pad(prompts, (0, config.max_new_tokens), value=mask_token_id)
    size = config.block_size or config.max_new_tokens
    starts = range(prompts.shape[1], ids.shape[1], size)
    assert config.steps is not None
    for number, start in enumerate(starts):
        end = min(start + size, ids.shape[1])
        steps = min(config.steps // len(starts) + (number < config.steps % len(starts)), end - start)
        for step in range(steps):
            logits = model(input_ids=ids).logits
            logits[..., mask_token_id] = -torch.inf
            tokens = logits.argmax(dim=-1)
            scores = torch.softmax(logits.float(), dim=-1).gather(-1, tokens[..., None])[..., 0]
            scores[:, :start] = scores[:, end:] = -torch.inf
            scores = torch.where(ids == mask_token_id, scores, -torch.inf)
            count = (end - start) // steps + (step < (end - start) % steps)
            for row in range(len(ids)):
                chosen = scores[row].topk(count).indices
                ids[row, chosen] = tokens[row, chosen]
    return ids


@contextlib.contextmanager
def timing_forwards(model: Any, device: torch.device) -> Iterator[list[float]]:
    """Seconds of every forward of `model` inside the block."""
    seconds: list[float] = []
    forward = model.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        synchronize(device)
        began = time.perf_counter()
        output = forward(*args, **kwargs)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
        return output

    model.forward = timed
    try:
        yield seconds
    finally:
        del model.forward


def measure(sides: dict[str, Callable[[], torch.Tensor]], options: Options, model: Any) -> dict[str, dict[str, Any]]:
    """{side: {"step_seconds", "overheads": one per round, "forwards", "ids": of one run}}; who begins alternates."""
    device = model.backbone.device
    found: dict[str, dict[str, Any]] = {name: {"step_seconds": [], "overheads": []} for name in sides}
    for number in range(-options.warmup_rounds, options.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            synchronize(device)
            with timing_forwards(model, device) as forwards:
                began = time.perf_counter()
                ids = sides[name]()
                synchronize(device)
                seconds = time.perf_counter() - began
            found[name].update(forwards=len(forwards), ids=ids)
            if number >= 0:
                found[name]["step_seconds"].append(seconds / len(forwards))
                found[name]["overheads"].append(seconds / sum(forwards) - 1)
    return found


def print_results(results: dict[str, Any]) -> None:
    """The table, the ratios on lines of their own."""
    print_machine(results["machine"])
    table = Table("sampler", title="Decoding")
    for heading in ("forwards", "ms per step", "min", "max", "overhead"):
        table.add_column(heading, justify="right")
    for name, side in results["sides"].items():
        milliseconds = [1000 * value for value in side["step_seconds"]]
        shown = (statistics.median(milliseconds), min(milliseconds), max(milliseconds))
        overhead = f"{100 * statistics.median(side['overheads']):.1f} %"
        table.add_row(name, str(side["forwards"]), *(f"{value:.1f}" for value in shown), overhead)
    console.print(table)
    for name, found in results["ratios"].items():
        print(f"ratio {name} / {REFERENCE}, time per step: {found['ratio']:.2f}")
        print(f"  single rounds {found['smallest']:.2f} to {found['largest']:.2f}")


def main() -> None:
    (options,) = utils.parse_args(Options)
    torch.set_num_threads(options.threads)
    tokenizer = make_tokenizer(get_spec(options.family))
    model = make_model(options).eval().to(options.device)
    sampler = MDLMSampler(model, tokenizer)
    prompts = torch.randint(
        len(tokenizer),
        options.vocab_size,
        (options.batch_size, options.prompt_length),
        generator=make_generator(options.seed, "prompts"),
    ).to(options.device)
    settings = options.settings()
    first = next(iter(settings.values()))
    sides: dict[str, Callable[[], torch.Tensor]] = {
        REFERENCE: lambda: sample_with_all_logits(model, prompts, sampler.mask_token_id, first)
    }
    for kind, config in settings.items():
        sides[f"cache {kind}"] = lambda config=config: sampler.sample(list(prompts), config).sequences
    found = measure(sides, options, model)
    same = {name: float((side.pop("ids") == found[REFERENCE]["ids"]).float().mean()) for name, side in found.items()
            if name != REFERENCE}  # fmt: skip
    del found[REFERENCE]["ids"]
    reference = found[REFERENCE]["step_seconds"]
    results = {
        "options": asdict(options),
        "machine": describe_machine(model, options.device),
        "sides": found,
        "ratios": {name: ratio_to(side["step_seconds"], reference) for name, side in found.items() if name in same},
        "share_of_equal_tokens": same,
    }
    print_results(results)
    for name, share in same.items():
        print(f"tokens equal to the reference's, prompt included: {name} {100 * share:.2f} %")
    write_json(options.json, results)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
