"""Decode from flags: which model (with its relay or without), how it samples, which memory. What the programs that talk
to a model have in common.

load_flags, sampler_flags, memory_flags = parse_args(LoadFlags, SamplerFlags, MemoryFlags)
sampler_class = find_sampler(load_flags, sampler_flags)
config = sampler_config(sampler_flags, sampler_class)
decoder = Decoder.from_flags(load_flags, memory_flags, sampler_class)
decoded = decoder.answer([token_ids], config, with_memory=True)
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal, get_type_hints

import torch
from transformers import PreTrainedTokenizerBase

from dllm.core.samplers import BaseSampler, BaseSamplerConfig, BaseSamplerOutput, BlockSampler, MDLMSampler
from dllm.models.auto import find_family, load_model, load_tokenizer
from dllm.models.backbone import unwrap
from dllm.models.spec import ModelSpec, spec_of
from dllm.utils.args import ModelArguments
from dllm.utils.parsing import InputError
from memdlm.memory import WrittenMemory
from memdlm.memory.config import FLAG_PREFIX, IDLE_WITHOUT_LABELS, MemoryConfig, decoding_fields
from memdlm.memory.parametric import ParametricMemory
from memdlm.relay.sampler import RelaySampler, make_sampler

Observer = Callable[[torch.Tensor], None]
SAMPLERS: dict[str, type[BaseSampler]] = {"mdlm": MDLMSampler, "block": BlockSampler}
_LOAD_FIELDS = (
    *("model_name_or_path", "adapter_model_name_or_path", "base_model_name_or_path", "dtype", "attn_implementation"),
    *("load_in_4bit", "trust_remote_code"),
)
# One memory per prompt is what is decoded with; the others do nothing outside training, or nothing at all.
_NO_FLAGS = {
    *("enabled", "scope", "sync_inner", "inner_gradient_checkpointing", "mask_ratio_epsilon", "inner_dropout"),
    *IDLE_WITHOUT_LABELS,
}


def _flag(name: str, hint: Any, default: Any, help: str) -> tuple[str, Any, Any]:
    """A flag that is None where it was not given, so that presets and switches can tell."""
    return name, hint | None, field(default=None, metadata={"help": f"{help} Default: {default}."})


def _load_fields() -> list[tuple[str, Any, Any]]:
    hints, known = get_type_hints(ModelArguments), ModelArguments.__dataclass_fields__
    shared = [
        (name, hints[name], field(default=known[name].default, metadata=dict(known[name].metadata)))
        for name in _LOAD_FIELDS
    ]
    device = "Where to run, e.g. cpu or cuda:1. None: the GPU if there is one."
    relay = "Carry the hidden state from step to step (needs a checkpoint with a relay). None: if it has one."
    zeroed = "A control: the relay's weights without what it carries; every step gets what the first one does."
    return [
        *shared,
        ("device", str | None, field(default=None, metadata={"help": device})),
        ("relay", bool | None, field(default=None, metadata={"help": relay})),
        ("relay_zeroed", bool, field(default=False, metadata={"help": zeroed})),
    ]


def _sampler_fields() -> list[tuple[str, Any, Any]]:
    """The settings of all samplers together: which one decodes is known only when the model is."""
    help = "mdlm, or block for models that decode block by block. None: by the family."
    presets = ", ".join(name for sampler in SAMPLERS.values() for name in sampler.presets)
    made = [
        _flag("sampler", Literal["mdlm", "block"], None, help),
        _flag("preset", str, None, f"Published settings: {presets}. Flags win over it."),
    ]
    owners: dict[str, list[type[BaseSamplerConfig]]] = {}
    for config in (sampler.config_class for sampler in SAMPLERS.values()):
        for setting in dataclasses.fields(config):
            owners.setdefault(setting.name, []).append(config)
    for name, classes in owners.items():
        hints = get_type_hints(classes[0])
        hint = list[int] if name == "suppress_tokens" else hints[name]  # what a command line can repeat
        where = " and ".join(config.__name__ for config in classes)
        made.append(_flag(name, hint, classes[0].__dataclass_fields__[name].default, f"As in {where}."))
    return made


def _memory_fields() -> list[tuple[str, Any, Any]]:
    help = "Write a memory from every prompt and decode with it in place."
    knobs = [
        _flag(name, hint, knob.default, knob.metadata["help"])
        for name, hint, knob in decoding_fields()
        if name.removeprefix(FLAG_PREFIX) not in _NO_FLAGS
    ]
    return [("mem_enabled", bool, field(default=False, metadata={"help": help})), *knobs]


# Flags are made from the classes that own the settings. Typed Any: pyright does not look into made classes.
LoadFlags: Any = make_dataclass("LoadFlags", _load_fields())
SamplerFlags: Any = make_dataclass("SamplerFlags", _sampler_fields())
MemoryFlags: Any = make_dataclass("MemoryFlags", _memory_fields())


def find_sampler(load_flags: Any, sampler_flags: Any) -> type[BaseSampler]:
    """The sampler for the model of `load_flags` (a LoadFlags): what `sampler_flags` (a SamplerFlags) name, else what
    its family decodes with. No weights are read.

    Raises:
        InputError: no such model; mdlm for a block-causal family; block for another one, without a block size.
    """
    family = find_family(load_flags.model_name_or_path, load_flags.base_model_name_or_path)
    if sampler_flags.sampler is None:
        return _own_sampler(family)
    chosen = SAMPLERS[sampler_flags.sampler]
    if chosen is MDLMSampler and family.attention == "block_causal":
        raise InputError(f"{family.name} decodes block by block: drop --sampler mdlm")
    is_asked_for = chosen is BlockSampler and family.attention != "block_causal"
    if is_asked_for and sampler_flags.block_size is None and sampler_flags.preset is None:
        raise InputError(
            f"{family.name} decodes block by block only if it was trained by block diffusion: give the --block_size of "
            "that training, or drop --sampler block"
        )
    return chosen


def _own_sampler(family: ModelSpec) -> type[BaseSampler]:
    return SAMPLERS["block" if family.attention == "block_causal" else "mdlm"]


def sampler_config(flags: Any, sampler_class: type[BaseSampler], **defaults: Any) -> BaseSamplerConfig:
    """The sampler's settings: `flags` (a SamplerFlags) over its preset, that over `defaults`, those over the class's.

    Raises:
        InputError: a preset or setting that the sampler does not have; those of its configuration.
    """
    given = {name: value for name, value in vars(flags).items() if value is not None and name != "sampler"}
    preset, presets = given.pop("preset", None), sampler_class.presets
    if preset is not None and preset not in presets:
        raise InputError(f"--preset {preset!r} is none of {sampler_class.__name__}: choose one of {', '.join(presets)}")
    known = {setting.name for setting in dataclasses.fields(sampler_class.config_class)}
    idle = [name for name in given if name not in known]
    if idle:
        raise InputError(f"--{idle[0]} has no effect on {sampler_class.__name__}, which decodes this model: drop it")
    if "suppress_tokens" in given:
        given["suppress_tokens"] = tuple(given["suppress_tokens"])
    return sampler_class.config_class(**{**defaults, **(presets[preset] if preset else {}), **given})


def memory_config(flags: Any) -> MemoryConfig:
    """The memory's settings from `flags` (a MemoryFlags), whether it is switched on or not.

    Raises:
        InputError: those of MemoryConfig.
    """
    given = {name.removeprefix(FLAG_PREFIX): value for name, value in vars(flags).items() if value is not None}
    return MemoryConfig.for_decoding(**{**given, "enabled": True})


def refuse_idle_memory(flags: Any) -> None:
    """Raises InputError where a setting of the memory is given and the memory is off."""
    idle = [name for name, value in vars(flags).items() if value is not None and name != FLAG_PREFIX + "enabled"]
    if idle and not flags.mem_enabled:
        raise InputError(f"--{idle[0]} has no effect without --mem_enabled True: give both, or drop it")


@dataclass(frozen=True)
class Decoded:
    """What a decoder made of a batch.

    output: of the sampler.
    written: memory of each prompt, in order; None: decoded without.
    seconds: of sampling.
    memory_seconds: of writing the memories.
    """

    output: BaseSamplerOutput
    written: list[WrittenMemory] | None
    seconds: float
    memory_seconds: float

    def summary(self, row: int) -> str:
        """One line about how a row was made: denoising forwards, tokens per such, forwards that fill a cache, its
        memory."""
        assert self.output.nfe is not None and self.output.cache_forwards is not None
        rate, others = float(self.output.tokens_per_forward[row]), int(self.output.cache_forwards[row])
        line = f"{int(self.output.nfe[row])} denoising forwards, {rate:.2f} tokens per forward"
        line += f", {others} more for the cache" if others else ""
        if self.written is None:
            return line
        memory = self.written[row]
        if memory.failure is not None:
            return f"{line}; without memory: {memory.failure}"
        losses = ", ".join(f"{loss:.3f}" for loss in memory.losses.tolist())
        return f"{line}; memory of {memory.num_tokens} tokens, inner losses {losses}"


class Decoder:
    """A model with its tokenizer and sampler, and a memory that can be written from each prompt.

    A model with a relay is decoded with it: the sampler is the counterpart of `sampler_class` that carries a state. A
    memory is then written with what a first denoising step gets, before the first one.

    Args:
        model: a model of `dllm.models` in eval mode, plain, quantised or with an adapter.
        tokenizer: the one that belongs to it.
        config: settings of the memory; None: `with_memory` cannot be asked for.
        sampler_class: what decodes; None: as the model's family does.
        relay, relay_zeroed: see `memdlm.relay.make_sampler`.

    Raises:
        InputError: see there; those of `ParametricMemory`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: MemoryConfig | None = None,
        sampler_class: type[BaseSampler] | None = None,
        *,
        relay: bool | None = None,
        relay_zeroed: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        kind = sampler_class or _own_sampler(spec_of(unwrap(model)))
        self.sampler = make_sampler(kind, model, tokenizer, relay, relay_zeroed)
        self.memory = None if config is None else self.make_memory(config)

    def make_memory(self, config: MemoryConfig) -> ParametricMemory:
        """A memory of the model with these settings, which goes together with what decodes.

        Raises:
            InputError: those of `ParametricMemory`.
        """
        memory = ParametricMemory(self.sampler.model, config, mask_token_id=self.sampler.mask_token_id)
        if isinstance(self.sampler, RelaySampler):
            memory.alone = self.sampler.channel.first_forwards
        return memory

    @classmethod
    def from_flags(cls, load_flags: Any, memory_flags: Any, sampler_class: type[BaseSampler] | None = None) -> Decoder:
        """A decoder of the model that `load_flags` (a LoadFlags) name; a memory can be asked for even if
        `memory_flags` (a MemoryFlags) switch it off. `sampler_class` as in the constructor (see `find_sampler`).

        Raises:
            InputError: those of load_model, MemoryConfig and the constructor; a device that is not there.
        """
        config = memory_config(memory_flags)
        options = dict(vars(load_flags))
        name, device = options.pop("model_name_or_path"), _device(options.pop("device"))
        relay, zeroed = options.pop("relay"), options.pop("relay_zeroed")
        model = load_model(name, **options, device=device)
        base, trust = options["base_model_name_or_path"], options["trust_remote_code"]
        tokenizer = load_tokenizer(name, base_model_name_or_path=base, model=model, trust_remote_code=trust)
        return cls(model, tokenizer, config, sampler_class, relay=relay, relay_zeroed=zeroed)

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        config: BaseSamplerConfig,
        *,
        with_memory: bool = False,
        on_step: Observer | None = None,
    ) -> Decoded:
        """Answers to `prompts`, in one batch; with_memory: each with the memory written from it.

        Args:
            prompts: token ids.
            config: of the sampler.
            with_memory: write a memory from every prompt first. It is gone afterwards, also after an exception.
            on_step: see `BaseSampler.sample`.

        Raises:
            InputError: a prompt that is empty, or leaves no room for the answer.
        """
        for prompt in prompts:
            self._check_length(len(prompt), config.max_new_tokens)
        with self._written(prompts, with_memory) as (written, memory_seconds):
            began = time.perf_counter()
            output = self.sampler.sample(prompts, config, on_step=on_step)
            return Decoded(output, written, self._seconds_since(began), memory_seconds)

    def infill(
        self,
        rows: Sequence[Sequence[int]],
        config: BaseSamplerConfig,
        *,
        with_memory: bool = False,
        on_step: Observer | None = None,
    ) -> Decoded:
        """`rows` with their masks filled in, in one batch; with_memory: each with the memory written from its other
        tokens. Arguments as in `answer`.

        Raises:
            InputError: a row without mask, or longer than the model's limit; with_memory: one of nothing but masks.
        """
        mask = self.sampler.mask_token_id
        known = [[token for token in row if token != mask] for row in rows]
        for row, rest in zip(rows, known, strict=True):
            self._check_length(len(row), 0)
            if len(rest) == len(row):
                raise InputError("a text to fill in holds no mask: there is nothing to do")
            if with_memory and not rest:
                raise InputError("a text of nothing but masks gives no memory: drop it, or turn the memory off")
        with self._written(known, with_memory) as (written, memory_seconds):
            began = time.perf_counter()
            ids, attention_mask = self._padded(rows)
            output = self.sampler.infill(ids, config, attention_mask, on_step=on_step)
            return Decoded(output, written, self._seconds_since(began), memory_seconds)

    def text(self, ids: Sequence[int]) -> str:
        """Text of an answer: up to the end of the text or of the turn, without special tokens."""
        ends = [index for index, token in enumerate(ids) if token in self.sampler.end_token_ids]
        return str(self.tokenizer.decode(list(ids)[: ends[0] if ends else None], skip_special_tokens=True))

    @contextlib.contextmanager
    def _written(
        self, prompts: Sequence[Sequence[int]], with_memory: bool
    ) -> Iterator[tuple[list[WrittenMemory] | None, float]]:
        """Memories of `prompts` in place, and the seconds that writing them took."""
        if not with_memory:
            yield None, 0.0
            return
        if self.memory is None:
            raise InputError("this decoder was made without settings of a memory: give it a MemoryConfig")
        with self.memory.attached():
            began = time.perf_counter()
            written = self.memory.adapt(prompts)
            yield written, self._seconds_since(began)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids [B, L], filled up on the right, and the attention mask [B, L] if something was filled up."""
        longest = max(map(len, rows))
        ids = [[*row, *[self.sampler.pad_token_id] * (longest - len(row))] for row in rows]
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        device = self.sampler.lm.backbone.device
        return torch.tensor(ids, device=device), None if bool(mask.all()) else mask.to(device)

    def _check_length(self, prompt: int, new: int) -> None:
        limit = self.sampler.lm.config.max_position_embeddings
        if prompt + new > limit:
            raise InputError(
                f"{prompt} tokens and {new} new ones are more than the model's {limit}: shorten the text or lower "
                "--max_new_tokens"
            )

    def _seconds_since(self, began: float) -> float:
        device = self.sampler.lm.backbone.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name!r} is no device: give cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device
