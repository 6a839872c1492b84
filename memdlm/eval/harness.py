"""What an lm-eval adapter adds for Parametric Memory (a memory is written from each prompt before it is decoded) and
for Relay (a hidden state is carried from step to step)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from dllm.core.eval import BaseEvalHarness, BlockEvalConfig, BlockEvalHarness, MDLMEvalConfig, MDLMEvalHarness
from dllm.core.eval.config import argument
from dllm.core.eval.likelihood import Scorer
from dllm.core.samplers import BaseSampler
from dllm.utils.parsing import InputError
from memdlm.memory.config import FLAG_PREFIX, MemoryConfig, decoding_fields
from memdlm.memory.parametric import ParametricMemory
from memdlm.memory.store import MemoryStore
from memdlm.relay.likelihood import RelayScorer
from memdlm.relay.sampler import RelaySampler, make_sampler


def _argument_fields() -> list[tuple[str, Any, Any]]:
    """`decoding_fields` with the memory off, and the batch size of writing."""
    made = decoding_fields()
    for name, _, setting in made:
        if name == f"{FLAG_PREFIX}enabled":
            setting.default = False
    rows: Any = dataclasses.field(
        default=1,
        metadata={
            "help": "Prompts per pass of the inner loop, at least 1. With 1 a prompt gives bit for bit one memory "
            "whatever stands beside it; with more the same up to rounding, and faster on a GPU."
        },
    )
    return [*made, ("mem_batch_size", int, rows)]


# `mem_*`: one field per setting of MemoryConfig, so that an argument is declared once.
_MemoryFields = make_dataclass("_MemoryFields", _argument_fields(), kw_only=True)
_MemoryFields.__module__ = __name__


class MemoryArguments(_MemoryFields):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    """The settings of `MemoryConfig`, each with the prefix `mem_`, memory off by default; to be put before the model
    arguments of a harness: `@dataclass class Config(MemoryArguments, MDLMEvalConfig)`.

    Raises:
        InputError: a value out of range, or one that has no effect.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        memory = self.memory()  # checks the values, also of a memory that is off
        if self.mem_batch_size < 1:
            raise InputError(f"mem_batch_size must be at least 1, got {self.mem_batch_size}")
        defaults = {name: setting.default for name, _, setting in _argument_fields()}
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        if changed and memory is None:
            raise InputError(f"{', '.join(changed)} has no effect without mem_enabled=True")
        if memory is not None and memory.scope == "batch" and self.mem_batch_size > 1:
            raise InputError("mem_batch_size above 1 writes one memory per row: use mem_scope=row")

    def memory(self) -> MemoryConfig | None:
        """The memory's settings, None if it is off.

        Raises:
            InputError: see `MemoryConfig.for_decoding`.
        """
        names = [name for name, _, _ in decoding_fields()]
        config = MemoryConfig.for_decoding(**{name.removeprefix(FLAG_PREFIX): getattr(self, name) for name in names})
        return config if config.enabled else None


@dataclass
class MemoryEvalConfig(MemoryArguments, MDLMEvalConfig):  # pyright: ignore[reportGeneralTypeIssues]
    """`MDLMEvalConfig` with memory."""


@dataclass
class MemoryBlockEvalConfig(MemoryArguments, BlockEvalConfig):  # pyright: ignore[reportGeneralTypeIssues]
    """`BlockEvalConfig` with memory."""


class MemoryHarness(BaseEvalHarness):
    """A harness that writes a memory from each prompt, once per distinct one, and answers with it in place.

    To be put before another harness: `class Adapter(MemoryHarness, MDLMEvalHarness)`, with a `config_class` that has
    `MemoryArguments`. A prompt that no memory can be written from is answered without, counted and listed. With
    `mem_enabled` false nothing is changed.

    Raises:
        InputError: as `BaseEvalHarness` and `ParametricMemory`; scope batch with batches of more than one row.
    """

    config: Any  # an object of `config_class`

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        settings = self.config.memory()
        self.memory: ParametricMemory | None = None
        if settings is None:
            return
        if settings.scope == "batch" and self.batch_size > 1:
            raise InputError("mem_scope=batch is one memory for all rows: give --batch_size 1, or mem_scope=row")
        self.memory = ParametricMemory(self.model, settings, mask_token_id=self.sampler.mask_token_id)
        self.store = MemoryStore(self.memory, batch_size=self.config.mem_batch_size)
        self.one_context_per_batch = True

    @contextlib.contextmanager
    def context(self, prompts: Sequence[Sequence[int]], *, shared: bool = False) -> Iterator[list[str | None]]:
        """The memories of the prompts in place, one per row, or with `shared` that of one prompt for all rows."""
        if self.memory is None:
            yield [None] * len(prompts)
            return
        with self.memory.attached():
            written = self.store.get(prompts)
            self.memory.place(written, shared=shared)
            yield [one.failure for one in written]

    def forwards_per_write(self) -> float:
        """Forwards that writing a memory costs: with K states, E epochs and a share f of adapted layers

            K (1 - f) + 2 E K f        (2: forward, and backward without gradients of the base's weights)

        and with a teacher one more state through the lower layers and one more pass of the upper ones per step."""
        if self.memory is None:
            return 0.0
        config, layers = self.memory.config, len(self.lm.backbone.layers)
        share = 1 - self.memory.start / layers
        states = 1 if config.masking_strategy in ("pre_only", "no_progressive") else config.num_inner_steps
        teacher = 0 if config.inner_loss_type == "ce" else 1
        return (states + teacher) * (1 - share) + config.num_inner_epochs * states * (2 + teacher) * share

    def fingerprint_parts(self) -> dict[str, Any]:
        """Those of the harness, and the memory's settings."""
        settings = self.config.memory()
        return {**super().fingerprint_parts(), "memory": settings and dataclasses.asdict(settings)}

    def counters(self) -> dict[str, Any]:
        """Those of the harness, and what was written."""
        if self.memory is None:
            return super().counters()
        failures = [{"prompt": prompt, "reason": reason} for prompt, reason in self.store.failures]
        return {
            **super().counters(),
            "num_memories_written": self.store.num_written,
            "num_memories_reused": self.store.num_reused,
            "adaptation_seconds": self.store.seconds,
            "failed_adaptations": failures,
        }

    def get_model_info(self) -> dict[str, Any]:
        """As `BaseEvalHarness.get_model_info`, and what was written."""
        info = super().get_model_info()
        if self.memory is None:
            return info
        total = self.all_counters()
        names = ("num_memories_written", "num_memories_reused", "adaptation_seconds", "failed_adaptations")
        return {
            **info,
            **{name: total[name] for name in names},
            "num_failed_adaptations": len(total["failed_adaptations"]),
            "answered_without_memory": total["without_memory"],
            "num_answered_without_memory": len(total["without_memory"]),
            "num_fast_weights": self.memory.fast.numel,
        }


class MemoryMDLMHarness(MemoryHarness, MDLMEvalHarness):
    """`MDLMEvalHarness` with memory."""

    config_class = MemoryEvalConfig


class MemoryBlockHarness(MemoryHarness, BlockEvalHarness):
    """`BlockEvalHarness` with memory: written from a prompt before the cache of its finished blocks is filled."""

    config_class = MemoryBlockEvalConfig


@dataclass(kw_only=True)
class RelayArguments:
    """Whether the model's relay is used; to be put before the model arguments of a harness, like `MemoryArguments`.

    Raises:
        InputError: arguments that contradict each other.
    """

    relay: bool | None = argument(
        None, "Carry the hidden state from step to step (needs a checkpoint with a relay). None: if it has one."
    )
    relay_zeroed: bool = argument(
        False, "A control: the relay's weights without what it carries; every step gets what the first one does."
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue] (of the arguments that follow)
        if self.relay_zeroed and self.relay is False:
            raise InputError("relay_zeroed has no effect with relay=False: drop one of them")


@dataclass
class RelayEvalConfig(RelayArguments, MemoryEvalConfig):
    """`MemoryEvalConfig` with a relay."""


@dataclass
class RelayBlockEvalConfig(RelayArguments, MemoryBlockEvalConfig):
    """`MemoryBlockEvalConfig` with a relay."""


class RelayHarness(MemoryHarness):
    """A `MemoryHarness` that decodes a model with a relay by it, and scores likelihoods by `RelayScorer`.

    To be put before another harness, with a `config_class` that has `RelayArguments`. Memories are written with what a
    first denoising step gets. Without a relay nothing is changed.

    Raises:
        InputError: as `MemoryHarness` and `memdlm.relay.make_sampler`.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.memory is not None and isinstance(self.sampler, RelaySampler):
            self.memory.alone = self.sampler.channel.first_forwards

    def make_sampler(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> BaseSampler:
        """What decodes, with the relay unless it is off."""
        config = self.config
        return make_sampler(config.sampler_class, model, tokenizer, config.relay, config.relay_zeroed)

    def make_scorer(self) -> Scorer:
        """What likelihoods are computed with; with a relay two forwards over each state."""
        scorer = super().make_scorer()
        if not isinstance(self.sampler, RelaySampler):
            return scorer
        return RelayScorer(**vars(scorer), channel=self.sampler.channel, zeroed=self.sampler.zeroed)

    def relay_settings(self) -> dict[str, Any] | None:
        """How the relay is used, as JSON; None: it is off, or there is none."""
        if not isinstance(self.sampler, RelaySampler):
            return None
        return {**dataclasses.asdict(self.sampler.channel.keys), "zeroed": self.sampler.zeroed}

    def fingerprint_parts(self) -> dict[str, Any]:
        """Those of `MemoryHarness`, and the relay's settings."""
        return {**super().fingerprint_parts(), "relay": self.relay_settings()}

    def get_model_info(self) -> dict[str, Any]:
        """As `MemoryHarness.get_model_info`, and the relay's settings."""
        return {**super().get_model_info(), "relay": self.relay_settings()}


class RelayMDLMHarness(RelayHarness, MDLMEvalHarness):
    """`MDLMEvalHarness` with relay and memory."""

    config_class = RelayEvalConfig


class RelayBlockHarness(RelayHarness, BlockEvalHarness):
    """`BlockEvalHarness` with relay and memory."""

    config_class = RelayBlockEvalConfig
