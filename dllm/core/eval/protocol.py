"""What lm-eval wants of any model beside its answers: chat templates, and talking between processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import LM
from transformers import PreTrainedTokenizerBase

from dllm.core.eval.processes import barrier, gather_objects, gather_tensors
from dllm.utils.distributed import rank, world_size
from dllm.utils.parsing import InputError


class ProcessLM(LM):
    """An lm-eval model with a tokenizer, one replica per process. Each process counts what it does (`counters`)."""

    tokenizer: PreTrainedTokenizerBase

    def __init__(self) -> None:
        super().__init__()
        self._all_counters: list[dict[str, Any]] | None = None

    def _join(self, device: torch.device) -> None:
        self._device = device
        self._rank, self._world_size = rank(), world_size()

    def counters(self) -> dict[str, Any]:
        """What this process did: numbers that add up over processes, and lists."""
        return {}

    def all_counters(self) -> dict[str, Any]:
        """`counters` of all processes together; complete once lm-eval has gathered the results."""
        return add_up(self._all_counters if self._all_counters is not None else [self.counters()])

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks behind each other."""
        return tensor if self.world_size == 1 else gather_tensors(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all ranks on rank `dst`, None on the others."""
        if self.world_size == 1:
            return [obj]
        # The counters ride along: lm-eval asks rank 0 alone for them, when the others may have left.
        found = gather_objects((obj, self.counters()), dst)
        if found is None:
            return None
        self._all_counters = [counters for _, counters in found]
        return [thing for thing, _ in found]

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world_size > 1:
            barrier()

    @property
    def tokenizer_name(self) -> str:
        """Name that lm-eval's cache of prompts with a chat template goes by."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's chat template; of several, the one called `chat_template` (True: default).

        Raises:
            InputError: there is none, or none of that name.
        """
        if chat_template is False or chat_template is None:
            return None
        templates: Any = self.tokenizer.chat_template
        if not templates:
            raise InputError("the tokenizer has no chat template: drop --apply_chat_template")
        if isinstance(templates, str):
            if chat_template is not True:
                raise InputError(f"the tokenizer has one chat template without a name: drop {chat_template!r}")
            return templates
        name = "default" if chat_template is True else chat_template
        if name not in templates:
            raise InputError(f"the tokenizer has no chat template {name!r}: choose one of {', '.join(templates)}")
        return templates[name]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one prompt, with the header of an answer, or with its beginning left open."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )


def add_up(counters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers added, lists joined."""
    total: dict[str, Any] = dict(counters[0])
    for other in counters[1:]:
        total = {name: total[name] + value for name, value in other.items()}
    return total
