"""What writing a prompt's memory costs, and what a batch saves.

    python scripts/bench/adapt.py                                # a 46 M LLaDA-MoE, one prompt of 448 tokens
    python scripts/bench/adapt.py --batch_size 8 --hidden_size 64 --num_layers 4     # and 8 prompts against 8 singles
    python scripts/bench/adapt.py --device cuda --dtype bfloat16 --batch_size 8

The reference writes the same memory the plain way: for every state a pass through all layers, logits at all positions,
cross-entropy over them, masked afterwards. Both memories are compared. With --batch_size above 1 writing and decoding
all prompts in one batch is timed beside doing it one prompt at a time.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, make_dataclass
from statistics import median
from typing import Any

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

from dllm import utils
from dllm.core.noising import make_generator
from dllm.core.samplers import MDLMSampler, MDLMSamplerConfig
from memdlm.memory import MemoryConfig, ParametricMemory, WrittenMemory
from memdlm.memory.config import IDLE_WITHOUT_LABELS, decoding_fields
from memdlm.memory.inner_loop import clip_gradient
from memdlm.memory.plan import InnerPlan

OURS, REFERENCE = "write", "write, all logits"
BATCH, SINGLES = "one batch", "one by one"
# One memory per prompt and the mean cross-entropy is what is compared, so these are no flags.
FIXED = ("enabled", "scope", "sync_inner", "inner_loss_type", "loss_weight_type", "loss_norm_type")
# Without effect: knobs of the other inner losses, and what matters in training alone or not at all.
IDLE = (
    *("distill_temperature", "distill_hidden_type", "mask_ratio_epsilon", "inner_dropout"),
    *("inner_gradient_checkpointing", *IDLE_WITHOUT_LABELS),
)
MemoryFlags = make_dataclass(
    "MemoryFlags", [flag for flag in decoding_fields() if flag[0].removeprefix("mem_") not in (*FIXED, *IDLE)]
)
console = Console()


@dataclass
class Options(ModelOptions):
    """The model, the prompts and the measurement; the settings of the memory are flags of their own (`--mem_*`)."""

    batch_size: int = option(1, "Prompts; above 1 a batch is also timed against singles.")
    prompt_length: int = option(448, "Tokens of a prompt, at least 1.")
    max_new_tokens: int | None = option(
        None, "Tokens of an answer, at least 1. None: 64; only with --batch_size above 1."
    )
    steps: int | None = option(
        None, "Denoising steps, at least 1. None: one per new token; only with --batch_size above 1."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_length < 1:
            raise utils.InputError("--prompt_length must be at least 1")

    def fill_in_decoding(self) -> None:
        """Sets what was not said about decoding.

        Raises:
            InputError: something was said though one prompt is not decoded.
        """
        if self.batch_size == 1:
            if (self.max_new_tokens, self.steps) != (None, None):
                raise utils.InputError(
                    "--max_new_tokens and --steps have no effect with --batch_size 1, where nothing is decoded: drop "
                    "them, or give a larger --batch_size"
                )
            return
        self.max_new_tokens = self.max_new_tokens or 64
        self.steps = self.steps or self.max_new_tokens


def write_with_all_logits(memory: ParametricMemory, plan: InnerPlan, phi: torch.Tensor) -> torch.Tensor:
    """phi_K [1, P] of one prompt by the plain inner loop with cross-entropy."""
    config = memory.config
    for _ in range(config.num_inner_epochs):
        for step in plan.steps:
            phi = phi.detach().requires_grad_()
            memory.fast.set(phi)
            with torch.no_grad():
                state = memory.backbone(plan.states[step.student], plan.attention_mask, stop_at=memory.start)
            hidden = memory.backbone.run_layers(state.hidden, state.layer_inputs, memory.start)
            logits = memory.lm.head(hidden)
            asked = torch.zeros(plan.length, dtype=torch.bool, device=phi.device)
            asked[step.loss_positions] = True
            targets = torch.zeros(1, plan.length, dtype=torch.int64, device=phi.device)
            targets[0, step.loss_positions] = step.targets
            nll = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")  # [1, L]
            loss = (nll * asked).sum() / asked.sum()
            (gradient,) = torch.autograd.grad(loss, phi)
            clipped = clip_gradient(gradient, memory.fast.sizes, config.inner_grad_clip, config.clip_kind)
            phi = phi.detach() - config.inner_lr * clipped
    memory.reset()
    return phi


def time_in_turns(sides: dict[str, Callable[[], Any]], options: Options) -> tuple[dict[str, list[float]], dict]:
    """({side: seconds of every round}, {side: last result}); who begins alternates."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results = {}
    for number in range(-options.warmup_rounds, options.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            synchronize(options.device)
            began = time.perf_counter()
            results[name] = sides[name]()
            synchronize(options.device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds, results


def check_written(memories: list[WrittenMemory]) -> list[WrittenMemory]:
    """The memories, all of which were written.

    Raises:
        InputError: one could not be.
    """
    for one in memories:
        if one.failure is not None:
            raise utils.InputError(
                f"a prompt's memory could not be written: {one.failure}; change --prompt_length, --seed or the "
                "--mem_* settings"
            )
    return memories


def compare_writes(memory: ParametricMemory, prompt: list[int], options: Options) -> dict[str, Any]:
    """Times of writing one prompt's memory our way and the plain way, and how far the memories are apart."""

    def plain() -> torch.Tensor:
        plan = memory.plan_prompts([prompt], mask_token_id=memory.lm.config.mask_token_id)
        return write_with_all_logits(memory, plan, memory.initial(plan))[0]

    with memory.attached():
        sides = {REFERENCE: plain, OURS: lambda: check_written(memory.write_prompts([prompt]))[0].phi}
        seconds, written = time_in_turns(sides, options)
        plan = memory.plan_prompts([prompt], mask_token_id=memory.lm.config.mask_token_id)
        change = (written[REFERENCE].cpu() - memory.initial(plan)[0].cpu()).norm()
    apart = (written[OURS].cpu() - written[REFERENCE].cpu()).norm() / change
    return {"seconds": seconds, "difference_over_change": float(apart)}


def compare_batch(memory: ParametricMemory, prompts: list[list[int]], options: Options) -> dict[str, Any]:
    """Times of writing and decoding all prompts at once and one by one, and the share of equal tokens."""
    tokenizer = make_tokenizer(spec_of_family(options))
    sampler = MDLMSampler(memory.lm, tokenizer)
    assert options.max_new_tokens is not None
    config = MDLMSamplerConfig(max_new_tokens=options.max_new_tokens, steps=options.steps)

    def answer(group: list[list[int]]) -> torch.Tensor:
        check_written(memory.adapt(group, batch_size=len(group)))
        answers = sampler.sample(group, config).answers
        assert answers is not None
        return answers

    sides = {BATCH: lambda: answer(prompts), SINGLES: lambda: torch.cat([answer([prompt]) for prompt in prompts])}
    with memory.attached():
        seconds, answers = time_in_turns(sides, options)
    same = (answers[BATCH] == answers[SINGLES]).float().mean()
    return {"seconds": seconds, "share_of_equal_tokens": float(same)}


def print_seconds(seconds: dict[str, list[float]], title: str) -> None:
    """Medians of the timed rounds."""
    table = Table("side", title=title)
    for heading in ("median", "min", "max"):
        table.add_column(heading, justify="right")
    for name, values in seconds.items():
        table.add_row(name, *(f"{1000 * value:.1f}" for value in (median(values), min(values), max(values))))
    console.print(table)


def main() -> None:
    options, flags = utils.parse_args(Options, MemoryFlags)
    config = MemoryConfig.for_decoding(**{name.removeprefix("mem_"): value for name, value in asdict(flags).items()})
    options.fill_in_decoding()
    torch.set_num_threads(options.threads)
    tokenizer = make_tokenizer(spec_of_family(options))
    model = make_model(options).eval().to(options.device)
    memory = ParametricMemory(model, config)
    generator = make_generator(options.seed, "prompts")
    shape = (options.batch_size, options.prompt_length)
    prompts = torch.randint(len(tokenizer), options.vocab_size, shape, generator=generator).tolist()
    results: dict[str, Any] = {"options": {**asdict(options), **asdict(flags)}}
    results["machine"] = describe_machine(model, options.device)
    print_machine(results["machine"])
    found = results["write"] = compare_writes(memory, prompts[0], options)
    found["ratio"] = ratio_to(found["seconds"][OURS], found["seconds"][REFERENCE])
    print_seconds(found["seconds"], f"Writing the memory of {options.prompt_length} tokens, ms")
    print(f"ratio {OURS} / {REFERENCE}: {found['ratio']['ratio']:.2f}")
    print(f"  single rounds {found['ratio']['smallest']:.2f} to {found['ratio']['largest']:.2f}")
    print(f"  the two memories differ by {found['difference_over_change']:.1e} of what was written")
    if options.batch_size > 1:
        found = results["batch"] = compare_batch(memory, prompts, options)
        found["ratio"] = ratio_to(found["seconds"][SINGLES], found["seconds"][BATCH])
        print_seconds(found["seconds"], f"Writing and decoding {options.batch_size} prompts, ms")
        print(f"ratio {SINGLES} / {BATCH}: {found['ratio']['ratio']:.2f}")
        print(f"  single rounds {found['ratio']['smallest']:.2f} to {found['ratio']['largest']:.2f}")
        print(f"  {100 * found['share_of_equal_tokens']:.1f} % of the answers' tokens are equal")
    write_json(options.json, results)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
