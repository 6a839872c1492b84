"""What a relay costs: K denoising forwards of a training step, and a denoising forward in decoding, with and without.

    python scripts/bench/relay.py                                # a 46 M LLaDA-MoE, batch 2 x 512, one CPU thread
    python scripts/bench/relay.py --family fast_dllm_v2          # block diffusion: [x ; x_0], decoding by blocks
    python scripts/bench/relay.py --device cuda --dtype bfloat16

Training: K forwards with their losses and one backward over them. `plain` does it K times on the same masked states and
reveals nothing; `rollout` also chooses what to reveal; `relay` also carries the state, with gradient through it.
Decoding: the same number of forwards by the plain sampler and by the one with a relay. All sides in turns.
"""

import statistics
import time
from collections.abc import Callable
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

from dllm import utils
from dllm.core.attention import in_two_halves, two_halves_inputs
from dllm.core.losses import normalise, token_nll
from dllm.core.noising import apply_mask, flat_positions, make_generator
from dllm.core.samplers import BlockSampler, BlockSamplerConfig, MDLMSampler, MDLMSamplerConfig
from dllm.models.spec import block_size_of
from memdlm.relay import (
    RelayBlockSampler,
    RelayChannel,
    RelayConfig,
    RelayMDLMSampler,
    RelayState,
    RevealRule,
    unroll,
)

PLAIN, ROLLOUT, RELAY = "plain", "rollout", "relay"


@dataclass
class Options(ModelOptions):
    """The model, the batch and the measurement."""

    batch_size: int = option(2, "Rows, at least 1.")
    length: int = option(512, "Tokens of a row.")
    num_steps: int = option(2, "K, forwards of a training step, at least 1.")
    mask_ratio: float = option(0.5, "Share of the positions that the first forward sees masked, in (0, 1).")
    prompt_length: int = option(448, "Tokens of the prompt that is decoded.")
    max_new_tokens: int = option(64, "Tokens of its answer; as many forwards are taken.")


class Training:
    """One model with a relay, one batch, and the three ways of K forwards."""

    def __init__(self, options: Options, model: Any, channel: RelayChannel, first_token: int) -> None:
        self.options, self.model, self.channel = options, model, channel
        self.spec = spec_of_family(options)
        self.block_size = block_size_of(model)
        generator = make_generator(options.seed, "rows")
        shape = (options.batch_size, options.length)
        ids = torch.randint(first_token, options.vocab_size, shape, generator=generator)
        is_masked = torch.rand(shape, generator=generator) < options.mask_ratio
        is_masked[:, : self.spec.logit_shift] = False
        self.input_ids, self.is_masked = ids.to(options.device), is_masked.to(options.device)
        hidden = torch.randn(*shape, channel.size, generator=generator).to(options.device)
        self.state = RelayState(hidden, torch.ones(len(ids), dtype=torch.bool, device=options.device))
        config = self.model.config
        self.layout: dict[str, Any] = {}
        if self.spec.attention == "block_causal":
            device = self.input_ids.device
            self.layout = two_halves_inputs(config._attn_implementation, options.length, self.block_size, None, device)

    def network(self, step: int, noised_ids: torch.Tensor, is_masked: torch.Tensor, positions: torch.Tensor) -> Any:
        """A forward; under block diffusion on [x ; x_0]."""
        if self.layout:
            noised_ids = torch.cat([noised_ids, self.input_ids], dim=1)
            positions = in_two_halves(positions, self.options.length)
        return self.model(noised_ids, logit_positions=positions - self.spec.logit_shift, **self.layout)

    def plain(self) -> None:
        """K independent forwards on the first state, their losses, one backward."""
        positions = flat_positions(self.is_masked)
        noised_ids = apply_mask(self.input_ids, self.is_masked, self.channel.mask_token_id or 0)
        ones = torch.ones(len(self.input_ids), device=self.input_ids.device)
        losses = []
        for step in range(self.options.num_steps):
            output = self.network(step, noised_ids, self.is_masked, positions)
            nll = token_nll(output.logits, self.input_ids.flatten()[positions])
            losses.append(normalise(nll, positions, self.options.length, ones, self.is_masked.sum(1), "token"))
        self.finish(torch.stack(losses).sum())

    def unrolled(self, carries: bool) -> None:
        """`memdlm.relay.unroll` and one backward."""
        config = RelayConfig.for_arm("relay" if carries else "rollout", num_steps=self.options.num_steps)
        made = unroll(
            self.network,
            self.input_ids,
            torch.ones_like(self.is_masked),
            self.is_masked,
            config,
            RevealRule(config, self.block_size, self.channel.mask_token_id or 0),
            self.channel if carries else None,
            self.state if carries else None,
            watch_gradient=carries,
        )
        self.finish(made.loss)

    def finish(self, loss: torch.Tensor) -> None:
        """Backward, and gradients away."""
        loss.backward()
        self.model.zero_grad(set_to_none=True)

    def sides(self) -> dict[str, Callable[[], None]]:
        """What is timed."""
        return {PLAIN: self.plain, ROLLOUT: lambda: self.unrolled(False), RELAY: lambda: self.unrolled(True)}


def decoding_sides(options: Options, model: Any, tokenizer: Any) -> dict[str, Callable[[], None]]:
    """A plain and a relay sampler on one prompt, one token per forward."""
    generator = make_generator(options.seed, "prompt")
    prompt = torch.randint(len(tokenizer), options.vocab_size, (options.prompt_length,), generator=generator).tolist()
    if spec_of_family(options).attention == "block_causal":
        config: Any = BlockSamplerConfig(max_new_tokens=options.max_new_tokens)
        samplers: Any = (BlockSampler(model, tokenizer), RelayBlockSampler(model, tokenizer))
    else:
        config = MDLMSamplerConfig(max_new_tokens=options.max_new_tokens)
        samplers = (MDLMSampler(model, tokenizer), RelayMDLMSampler(model, tokenizer))
    plain, relay = samplers
    return {PLAIN: lambda: plain.sample([prompt], config), RELAY: lambda: relay.sample([prompt], config)}


def measure(sides: dict[str, Callable[[], None]], options: Options) -> dict[str, list[float]]:
    """Seconds of every round, by side; which side goes first alternates."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.warmup_rounds + options.rounds):
        names = list(sides)[:: 1 if number % 2 else -1]
        for name in names:
            began = time.perf_counter()
            sides[name]()
            synchronize(options.device)
            if number >= options.warmup_rounds:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(title: str, seconds: dict[str, list[float]], per: int) -> dict[str, Any]:
    """Prints and returns medians in ms (of one `per`-th) and ratios to the plain side."""
    print(title)
    found: dict[str, Any] = {"seconds": seconds, "ratios": {}}
    for name, times in seconds.items():
        ratio = found["ratios"][name] = ratio_to(times, seconds[PLAIN])
        spread = f"ratio {ratio['ratio']:.3f} (rounds {ratio['smallest']:.3f} to {ratio['largest']:.3f})"
        print(f"  {name:8} {1000 * statistics.median(times) / per:9.2f} ms   {spread}")
    return found


def main() -> None:
    (options,) = utils.parse_args(Options)
    torch.set_num_threads(options.threads)
    tokenizer = make_tokenizer(spec_of_family(options))
    model = make_model(options).to(options.device)
    channel = RelayChannel.attach(model, RelayConfig(gate="default"), block_size=block_size_of(model))
    results: dict[str, Any] = {"options": asdict(options), "machine": describe_machine(model, options.device)}
    print_machine(results["machine"])
    training = Training(options, model.train(), channel, len(tokenizer))
    title = f"{options.num_steps} forwards with losses and backward, {options.batch_size} x {options.length}:"
    results["training"] = report(title, measure(training.sides(), options), 1)
    sides = decoding_sides(options, model.eval(), tokenizer)
    results["decoding"] = report("A denoising forward in decoding:", measure(sides, options), options.max_new_tokens)
    write_json(options.json, results)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
