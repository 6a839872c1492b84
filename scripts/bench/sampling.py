"""What a decoding step costs: MDLMSampler beside a sampler that computes all logits, in turns, in one process.

    python scripts/bench/sampling.py                                     # a 46 M LLaDA-MoE, 448 + 64 tokens, 64 steps
    python scripts/bench/sampling.py --family llada --block_size 32 --caches none,prefix,dual
    python scripts/bench/sampling.py --family llada2 --num_layers 10     # exact cache on and off, 2048 + 128 tokens
    python scripts/bench/sampling.py --device cuda --dtype bfloat16 --batch_size 8

The reference computes logits and probabilities at every position in every step and chooses row by row, as public code
does; for llada2 it is BlockSampler without its cache. How many tokens come out the same is printed. "Overhead" is the
time outside the model's forwards over the time inside.
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
    spec_of_family,
    synchronize,
    write_json,
)
from rich.console import Console
from rich.table import Table

from dllm import utils
from dllm.core.noising import make_generator
from dllm.core.samplers import BlockSampler, BlockSamplerConfig, MDLMSampler, MDLMSamplerConfig

console = Console()


@dataclass
class Options(ModelOptions):
    """The model, the prompts and the measurement."""

    rounds: int = option(3, "Timed rounds (each side once), at least 1.")
    warmup_rounds: int = option(1, "Rounds before them that do not count, at least 0.")
    batch_size: int = option(1, "Prompts, at least 1.")
    prompt_length: int | None = option(None, "Tokens of a prompt, at least 1. None: 448 (llada2: 2048).")
    max_new_tokens: int | None = option(None, "Tokens of an answer, at least 1. None: 64 (llada2: 128).")
    steps: int | None = option(None, "Denoising steps, at least 1. None: one per new token; not for llada2.")
    block_size: int | None = option(None, "Tokens of a block, at least 1. None: one block (llada2: 32).")
    caches: str | None = option(None, "Caches to time, of none, prefix, dual. None: none; not for llada2.")

    def __post_init__(self) -> None:
        super().__post_init__()
        is_block = self.family == "llada2"
        if is_block and (self.steps, self.caches) != (None, None):
            raise utils.InputError("--steps and --caches have no effect with --family llada2: drop them")
        self.prompt_length = self.prompt_length or (2048 if is_block else 448)
        self.max_new_tokens = self.max_new_tokens or (128 if is_block else 64)
        if not is_block:
            self.settings()  # refuses what the sampler refuses

    def settings(self) -> dict[str, MDLMSamplerConfig]:
        """The settings of each cache."""
        new = self.max_new_tokens
        return {
            kind: MDLMSamplerConfig(max_new_tokens=new, steps=self.steps or new, block_size=self.block_size, cache=kind)
            for kind in map(str.strip, (self.caches or "none").split(","))
        }


Sides = dict[str, Callable[[], torch.Tensor]]


def make_sides(options: Options, model: Any, tokenizer: Any, prompts: torch.Tensor) -> Sides:
    """What is timed, the reference first; each gives the tokens [B, L]."""
    rows = list(prompts)
    if options.family == "llada2":
        block = BlockSampler(model, tokenizer)
        configs = {
            name: BlockSamplerConfig(
                max_new_tokens=options.max_new_tokens, block_size=options.block_size, use_cache=use_cache
            )
            for name, use_cache in (("cache off", False), ("cache on", True))
        }
        return {name: lambda config=config: block.sample(rows, config).sequences for name, config in configs.items()}
    sampler, settings = MDLMSampler(model, tokenizer), options.settings()
    first = next(iter(settings.values()))
    sides: Sides = {"all logits": lambda: sample_with_all_logits(model, prompts, sampler.mask_token_id, first)}
    for kind, config in settings.items():
        sides[f"cache {kind}"] = lambda config=config: sampler.sample(rows, config).sequences
    return sides


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


def measure(sides: Sides, options: Options, model: Any) -> dict[str, dict[str, Any]]:
    """{side: {"seconds", "step_seconds", "overheads": one per round; "forwards", "ids": of one run}}.

    Who begins alternates.
    """
    device = model.backbone.device
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "step_seconds": [], "overheads": []} for name in sides}
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
                found[name]["seconds"].append(seconds)
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
    for name, ratios in results["ratios"].items():
        for which, shown in (("step_seconds", "time per step"), ("seconds", "whole answers")):
            found = ratios[which]
            print(f"ratio {name} / {results['reference']}, {shown}: {found['ratio']:.3f}")
            print(f"  single rounds {found['smallest']:.3f} to {found['largest']:.3f}")


def main() -> None:
    (options,) = utils.parse_args(Options)
    torch.set_num_threads(options.threads)
    tokenizer = make_tokenizer(spec_of_family(options))
    model = make_model(options).eval().to(options.device)
    prompts = torch.randint(
        len(tokenizer),
        options.vocab_size,
        (options.batch_size, options.prompt_length or 1),
        generator=make_generator(options.seed, "prompts"),
    ).to(options.device)
    sides = make_sides(options, model, tokenizer, prompts)
    reference = next(iter(sides))
    found = measure(sides, options, model)
    tokens = {name: side.pop("ids") for name, side in found.items()}
    others = [name for name in sides if name != reference]
    results = {
        "options": asdict(options),
        "machine": describe_machine(model, options.device),
        "sides": found,
        "reference": reference,
        "ratios": {
            name: {
                which: ratio_to(found[name][which], found[reference][which]) for which in ("step_seconds", "seconds")
            }
            for name in others
        },
        "share_of_equal_tokens": {name: float((tokens[name] == tokens[reference]).float().mean()) for name in others},
    }
    print_results(results)
    for name, share in results["share_of_equal_tokens"].items():
        print(f"tokens equal to those of {reference}, prompt included: {name} {100 * share:.2f} %")
    write_json(options.json, results)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
