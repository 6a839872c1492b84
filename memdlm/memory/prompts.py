"""Memories written from prompts, one per prompt, outside training.

Shapes: G prompts of one pass, S inner steps, P numbers in one memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError
from memdlm.memory.plan import InnerPlan, plan_prompts

if TYPE_CHECKING:
    from memdlm.memory.fast_weights import FastWeights
    from memdlm.memory.inner_loop import InnerReport
    from memdlm.memory.parametric import ParametricMemory

logger = get_default_logger(__name__)

Prompt = Sequence[int] | torch.Tensor


@dataclass(frozen=True, eq=False)
class WrittenMemory:
    """What the inner loop made of one prompt: plain values, bound to no model and to no `attached()` block."""

    phi: torch.Tensor  # float32 [P], laid out as FastWeights says; zeros, which add nothing, where nothing was written
    num_tokens: int  # of the prompt
    losses: torch.Tensor  # float32 [S] on the CPU, the inner losses (0: nothing to predict in that step); [0] if failed
    failure: str | None = None  # why nothing was written


def token_ids(prompt: Prompt) -> list[int]:
    """The prompt as a list of plain integers."""
    return prompt.tolist() if isinstance(prompt, torch.Tensor) else [int(token) for token in prompt]


def write_prompts(memory: ParametricMemory, prompts: Sequence[Prompt], batch_size: int) -> list[WrittenMemory]:
    """See `ParametricMemory.write_prompts`."""
    check_batch_size(memory, batch_size)
    if not memory.fast.is_attached:
        raise RuntimeError("a memory is written inside `with memory.attached():`")
    rows = [token_ids(prompt) for prompt in prompts]
    _check_vocabulary(rows, memory.backbone.embedding.num_embeddings)
    memory.reset()
    written = {index: _failed(memory, 0, "the prompt is empty") for index, row in enumerate(rows) if not row}
    # Rows of like length share a pass: less padding. The order changes no memory.
    order = sorted((index for index, row in enumerate(rows) if row), key=lambda index: len(rows[index]))
    with _deterministic(memory.backbone.device):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            written.update(zip(chosen, _write_pass(memory, [rows[index] for index in chosen]), strict=True))
    return [written[index] for index in range(len(rows))]


def check_batch_size(memory: ParametricMemory, batch_size: int) -> None:
    """Nothing, if that many prompts can be written in one pass.

    Raises:
        InputError: batch_size below 1, or above 1 with scope batch.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size} but must be at least 1 prompt per pass")
    if batch_size > 1 and not memory.fast.by_row:
        raise InputError(
            "several prompts in one pass would share one memory (mem_scope=batch): use mem_scope row, or batch_size 1"
        )


def stack_memories(memories: Sequence[WrittenMemory], fast: FastWeights, shared: bool) -> torch.Tensor | None:
    """What `ParametricMemory.place` puts in place, float32 [B, P] (one memory: a view of it); None if all failed."""
    if len(memories) != 1 and (shared or not fast.by_row or not memories):
        why = "shared by all rows" if shared else "of scope batch" if memories else "or more to put in place"
        raise InputError(f"got {len(memories)} memories, wanted one {why}: give one, or one per row with scope row")
    for one in memories:
        if one.phi.shape != (fast.numel,):
            raise InputError(
                f"a memory of {one.phi.numel():,} numbers does not fit the {fast.numel:,} fast weights of this model "
                "with these settings: write it again"
            )
    if all(one.failure is not None for one in memories):
        return None
    if len(memories) == 1:
        return memories[0].phi[None]
    return torch.stack([one.phi.to(memories[0].phi.device) for one in memories])


def _check_vocabulary(rows: Sequence[Sequence[int]], size: int) -> None:
    for index, row in enumerate(rows):
        if row and not 0 <= min(row) <= max(row) < size:
            raise InputError(
                f"prompt {index} holds token ids from {min(row)} to {max(row)}, the model knows 0 to {size - 1}: use "
                "the tokenizer that belongs to the model"
            )


def _failed(memory: ParametricMemory, num_tokens: int, reason: str) -> WrittenMemory:
    nothing = torch.zeros((), device=memory.backbone.device).expand(memory.fast.numel)  # takes no memory
    return WrittenMemory(nothing, num_tokens, torch.zeros(0), reason)


def _write_pass(memory: ParametricMemory, rows: Sequence[Sequence[int]]) -> list[WrittenMemory]:
    try:
        return _write_together(memory, rows)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        # Gone on with below: in here the error still holds the tensors of the failed pass.
    if len(rows) == 1:
        reason = f"the device ran out of memory over its {len(rows[0])} tokens"
        return [_failed(memory, len(rows[0]), reason)]
    logger.warning(
        f"{len(rows)} prompts of up to {max(map(len, rows))} tokens are too much for one pass of the inner loop: each "
        "gets a pass of its own; a smaller mem_batch_size saves the attempt"
    )
    return [one for row in rows for one in _write_pass(memory, [row])]


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The allocator of the CPU raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _write_together(memory: ParametricMemory, rows: Sequence[Sequence[int]]) -> list[WrittenMemory]:
    plan = plan_prompts(rows, memory.config, memory.mask_token_id, memory.spec.logit_shift)
    is_asked = _asked_rows(plan)
    plan = plan.to(memory.backbone.device)
    try:
        report = memory.write(plan, memory.initial(plan))
        value = memory.fast.value
    finally:
        memory.reset()
    assert value is not None
    losses, is_bad, is_finite = _read_back(report, value)
    written = []
    for index, row in enumerate(rows):
        reason = None
        if not is_asked[index]:
            reason = (
                f"no position of its {len(row)} tokens was drawn to be predicted "
                f"(mem_prompt_mask_ratio {memory.config.prompt_mask_ratio})"
            )
        elif is_bad[index]:
            reason = "its inner loss is not finite"
        elif not is_finite[index]:
            reason = "the gradient of its inner loss is not finite"
        good = WrittenMemory(value[index], len(row), losses[index])
        written.append(good if reason is None else _failed(memory, len(row), reason))
    return written


def _asked_rows(plan: InnerPlan) -> torch.Tensor:
    """Whether any step asks for a position of the row, bool [G]; counted before the plan leaves the CPU."""
    is_asked = torch.zeros(plan.num_rows, dtype=torch.bool)
    for step in plan.steps:
        is_asked[step.loss_positions // plan.length] = True
    return is_asked


def _read_back(report: InnerReport, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses [G, S], whether a loss was not finite [G], whether all gradients and the result are [G]) on the CPU.

    One copy for the whole pass: the only time that the host waits for it.
    """
    num_steps = len(report.losses)
    is_finite = report.grad_norms.isfinite().all(dim=0) & value.isfinite().all(dim=1)  # [G]
    columns = [report.losses.float(), report.left_out.float(), is_finite[None].float()]
    losses, left_out, finite = torch.cat(columns).cpu().split([num_steps, num_steps, 1])
    return losses.T.contiguous(), left_out.any(dim=0), finite[0] > 0


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """A block in which a GPU adds up in a fixed order where it can: the backward of fused attention, above all, is
    otherwise another one in every run, and with it the memory."""
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    fills = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # pyright: ignore[reportAttributeAccessIssue]
