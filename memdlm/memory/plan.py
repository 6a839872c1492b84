"""What the inner loop is to do with a batch: the states, their masks and loss positions, made before the forward.

A plan is made on the CPU (by the collator, or by `plan_prompts` outside training), so that no step waits for the device
to count. Shapes: B rows, L positions of the states (under block diffusion both halves together), N loss positions of a
step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from dllm.core.attention import in_two_halves, two_halves_inputs
from dllm.core.noising import apply_mask, derive_seed, draw_noise, flat_positions, make_generator
from dllm.core.packing import Layout, packed_inputs, packed_positions
from dllm.utils.parsing import InputError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.objectives import OBJECTIVES
from memdlm.memory.trajectory import TRAJECTORIES, InnerState, disjoint, loss_mask


@dataclass(frozen=True)
class InnerStep:
    """What one inner step needs; `student` and `teacher` are indices into the states of the plan."""

    student: int
    teacher: int | None  # None: the objective has no teacher
    loss_positions: torch.Tensor  # [N] int64, flat indices into [B * L]
    targets: torch.Tensor  # [N] int64, true tokens at the loss positions
    t: torch.Tensor  # [B] float32


@dataclass(frozen=True)
class InnerPlan:
    """The inner loop of one batch."""

    states: Sequence[torch.Tensor]  # token ids of each distinct input, int64 [B, L]
    steps: Sequence[InnerStep]
    anchor: int | None  # index of the state that is the outer one, if any is
    attention_mask: torch.Tensor | None  # padding that holds for every state, [B, L], or of one half, [B, L / 2]
    apart: bool  # rows of their own (the prompt alone): the states have neither length nor mask of the outer state
    row_seeds: Sequence[int]  # seeds of the rows' initial fast weights, used by scope row
    block_size: int | None = (
        None  # the states are [state ; clean tokens] in blocks of so many; None: without clean half
    )
    packing: Layout | None = (
        None  # where the network sees the rows side by side (`dllm.core.packing`); None: it does not
    )

    @property
    def num_rows(self) -> int:
        """B."""
        return self.states[0].shape[0]

    @property
    def length(self) -> int:
        """L."""
        return self.states[0].shape[1]

    @property
    def num_network_rows(self) -> int:
        """Rows that one state has in the network: B, or fewer where they are packed."""
        return self.num_rows if self.packing is None else len(self.packing["source"])

    def as_batch(self) -> dict[str, Any]:
        """The plan as nested dicts and lists, which trainers and data loaders know how to move."""
        return {**_as_dict(self), "steps": [_as_dict(step) for step in self.steps]}

    @classmethod
    def from_batch(cls, values: dict[str, Any]) -> InnerPlan:
        """The plan that `as_batch` took apart, wherever its tensors have been moved."""
        return cls(**{**values, "steps": [InnerStep(**step) for step in values["steps"]]})

    def network_inputs(self, states: Sequence[torch.Tensor], implementation: str | None) -> dict[str, Any]:
        """What a backbone is called with to look at `states`, one below the other.

        Args:
            states: some of the plan's, [B, L] each.
            implementation: attention implementation of the model.
        """
        if self.packing is not None:
            return packed_inputs(implementation, self.packing, states)
        ids = torch.cat(list(states))
        mask = None if self.attention_mask is None else torch.cat([self.attention_mask] * len(states))
        if self.block_size is None:
            return {"input_ids": ids, "attention_mask": mask}
        half = self.length // 2
        return {"input_ids": ids, **two_halves_inputs(implementation, half, self.block_size, mask, ids.device)}

    def network_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Where the flat `positions` [N] into [B * L] stand in the rows that `network_inputs` makes of one state."""
        return positions if self.packing is None else packed_positions(self.packing, positions)

    def with_clean_half(self, input_ids: torch.Tensor, block_size: int) -> InnerPlan:
        """The same plan for block diffusion: each state with the clean tokens behind it.

        Args:
            input_ids: true tokens, int64 [B, L] as the states now are.
            block_size: positions of a block.
        """
        length = self.length
        steps = [replace(step, loss_positions=in_two_halves(step.loss_positions, length)) for step in self.steps]
        states = [torch.cat([state, input_ids], dim=1) for state in self.states]
        return replace(self, states=states, steps=steps, block_size=block_size)

    def to(self, device: torch.device | str) -> InnerPlan:
        """The plan with its tensors on `device`."""
        return InnerPlan.from_batch(_move(self.as_batch(), device))


@dataclass(frozen=True)
class Rows:
    """What a plan is made from, on the CPU."""

    input_ids: torch.Tensor  # [B, L] int64, true tokens
    maskable: torch.Tensor  # [B, L] bool, what the outer loss may ask for
    is_masked: torch.Tensor  # [B, L] bool, the outer mask M
    noised_ids: torch.Tensor  # [B, L] int64, the outer state
    is_corrupted: torch.Tensor  # [B, L] bool, where the outer state will hold wrong tokens (`noised_ids` need not yet)
    is_asked: torch.Tensor  # [B, L] bool, what the outer loss asks for: M, and with editing more than M
    t: torch.Tensor  # [B] float32, the outer time
    is_padding: torch.Tensor  # [B, L] bool
    attention_mask: torch.Tensor | None  # [B, L]
    row_seeds: Sequence[int]
    generators: Callable[[str], Sequence[torch.Generator]]  # purpose -> one CPU generator per row
    mask_token_id: int
    logit_shift: int  # 1: the first position cannot be predicted


def plan_response(rows: Rows, config: MemoryConfig) -> InnerPlan:
    """The published inner loop: a trajectory of the labels, which the outer loss then asks for."""
    maskable = rows.maskable & ~rows.is_padding if config.pad_unmask_mode != "none" else rows.maskable
    anchor = rows.is_masked & maskable
    noise = draw_noise(rows.generators("trajectory"), rows.input_ids.shape[1])
    states = TRAJECTORIES[config.masking_strategy](maskable, anchor, rows.t, noise, config)
    asked = [loss_mask(state, config.inner_loss_mask_mode) for state in states]
    return _plan(rows, states, asked, config, hidden=None)


def plan_disjoint(rows: Rows, config: MemoryConfig) -> InnerPlan:
    """Labels that the outer loss does not ask for; tokens under the outer mask M are in no input and in no loss.

    A teacher's clean input is the outer state. Under the editing objective M includes what was replaced by wrong tokens
    and the right tokens that are to be kept: the outer loss asks for them too.
    """
    maskable, asked_for = rows.maskable, rows.is_asked
    if config.pad_unmask_mode != "none":
        # Padding under M stays masked all the same: showing it would tell where the answer ends.
        maskable = maskable & (~rows.is_padding | asked_for)
    length = rows.input_ids.shape[1]
    # Generators of their own for each state: the draws of the second must not depend on how far the row was padded.
    purposes = [f"trajectory {step}" for step in range(config.num_inner_steps)]
    noise = torch.stack([draw_noise(rows.generators(purpose), length) for purpose in purposes])  # [K, B, L]
    states = disjoint(maskable, asked_for, rows.t, noise, config)
    asked = [loss_mask(state, "newly_revealed") for state in states]
    return _plan(rows, states, asked, config, hidden=asked_for)


def plan_prompt(rows: Rows, config: MemoryConfig) -> InnerPlan:
    """The prompt alone, as at inference: what stands before a row's first maskable position.

    The states are cut to the longest prompt of the batch; what lies behind a shorter one is hidden by the attention
    mask, and its tokens are replaced by the mask token. The anchor masks each prompt position with probability
    `prompt_mask_ratio`.
    """
    return _plan_prompt_part(rows, (rows.maskable.cumsum(dim=1) == 0) & ~rows.is_padding, config)


def plan_prompts(
    prompts: Sequence[Sequence[int]], config: MemoryConfig, mask_token_id: int, logit_shift: int = 0
) -> InnerPlan:
    """The plan for writing a memory from prompts outside training (on the CPU, see `InnerPlan.to`).

    All draws of a prompt depend on (config.seed, its tokens) alone, so that with scope row one prompt always gives one
    memory, whatever stands beside it; with scope batch all of them share one.

    Args:
        prompts: token ids of each prompt, of any length.
        config: the settings; `inner_target` does not matter here.
        mask_token_id: id of the mask token.
        logit_shift: see `ModelSpec`.

    Raises:
        InputError: no prompt, or an empty one.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise InputError("a memory is written from one or more prompts of at least one token: drop the empty ones")
    ids = pad_sequence([torch.as_tensor(prompt, dtype=torch.int64) for prompt in prompts], batch_first=True)  # [B, L]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    is_prompt = torch.arange(ids.shape[1]) < lengths[:, None]
    nothing = torch.zeros_like(is_prompt)
    seeds = [derive_seed(config.seed, *map(int, prompt)) for prompt in prompts]
    rows = Rows(
        input_ids=ids,
        maskable=nothing,
        is_masked=nothing,
        noised_ids=ids,
        is_corrupted=nothing,
        is_asked=nothing,
        t=torch.zeros(len(prompts)),
        is_padding=~is_prompt,
        attention_mask=None,
        row_seeds=seeds,
        generators=lambda purpose: [make_generator(seed, purpose) for seed in seeds],
        mask_token_id=mask_token_id,
        logit_shift=logit_shift,
    )
    return _plan_prompt_part(rows, is_prompt, config)


PLANS: dict[str, Callable[[Rows, MemoryConfig], InnerPlan]] = {
    "response": plan_response,
    "prompt": plan_prompt,
    "disjoint": plan_disjoint,
}


def _plan_prompt_part(rows: Rows, is_prompt: torch.Tensor, config: MemoryConfig) -> InnerPlan:
    if rows.attention_mask is not None:
        is_prompt = is_prompt & rows.attention_mask.bool()
    last = (is_prompt * torch.arange(1, is_prompt.shape[1] + 1)).max()  # number of the last prompt position
    length = max(1, int(last))
    is_prompt = is_prompt[:, :length]
    # A mask token that stands in the prompt itself has no true token to be asked for.
    maskable = is_prompt & (rows.input_ids[:, :length] != rows.mask_token_id)
    maskable[:, : rows.logit_shift] = False
    anchor = maskable & (draw_noise(rows.generators("prompt"), length) < config.prompt_mask_ratio)
    t = torch.full_like(rows.t, config.prompt_mask_ratio)
    noise = draw_noise(rows.generators("trajectory"), length)
    states = TRAJECTORIES[config.masking_strategy](maskable, anchor, t, noise, config)
    asked = [loss_mask(state, config.inner_loss_mask_mode) for state in states]
    visible = is_prompt.clone()
    visible[:, 0] |= ~is_prompt.any(dim=1)  # of a row without a prompt one mask token: attention needs something to see
    part = replace(
        rows,
        input_ids=rows.input_ids[:, :length],
        is_masked=anchor,
        attention_mask=None if bool(visible.all()) else visible.long(),
    )
    return _plan(part, states, asked, config, hidden=~is_prompt, apart=True)


def _plan(
    rows: Rows,
    states: Sequence[InnerState],
    asked: Sequence[torch.Tensor],
    config: MemoryConfig,
    hidden: torch.Tensor | None,
    apart: bool = False,
) -> InnerPlan:
    """Turns masks into inputs, each distinct one once.

    Args:
        asked: loss positions of each state, bool [B, L].
        hidden: positions whose true token no input may show, bool [B, L].
        apart: see `InnerPlan`.
    """
    clean = torch.zeros_like(rows.is_masked) if hidden is None else hidden  # masks of the least masked input
    inputs: list[torch.Tensor] = []

    def index_of(mask: torch.Tensor) -> int:
        ids = apply_mask(rows.input_ids, mask | clean, rows.mask_token_id)
        for index, known in enumerate(inputs):
            if torch.equal(known, ids):
                return index
        inputs.append(ids)
        return len(inputs) - 1

    uses_teacher = OBJECTIVES[config.inner_loss_type].uses_teacher
    steps = []
    for state, chosen in zip(states, asked, strict=True):
        positions = flat_positions(chosen)
        following = clean if state.next_is_masked is None else state.next_is_masked
        student = index_of(state.is_masked)
        teacher = index_of(following) if uses_teacher else None
        steps.append(InnerStep(student, teacher, positions, rows.input_ids.reshape(-1)[positions], state.t))
    # States show true tokens, so one that looks like an outer state with wrong tokens is another state all the same.
    has_outer = not apart and not bool(rows.is_corrupted.any())
    outer = [i for i, ids in enumerate(inputs) if has_outer and torch.equal(ids, rows.noised_ids)]
    return InnerPlan(
        states=inputs,
        steps=steps,
        anchor=outer[0] if outer else None,
        attention_mask=rows.attention_mask,
        apart=apart,
        row_seeds=rows.row_seeds,
    )


def _as_dict(instance: Any) -> dict[str, Any]:
    return {field.name: getattr(instance, field.name) for field in fields(instance)}


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _move(part, device) for key, part in value.items()}
    return [_move(part, device) for part in value] if isinstance(value, (list, tuple)) else value
