"""With inner target prompt or disjoint, phi does not depend on the tokens that the outer loss asks for."""

import pytest
import torch

from dllm.core.schedulers import LinearAlphaScheduler
from dllm.data.collators import PaddingCollator
from memdlm.memory.collator import MemoryCollator, inner_plan
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric import ParametricMemory

MASK = 39
EPOCH = 2  # whose masks leave something visible in every row
OBJECTIVES = {
    "ce": {},
    "distill": {"inner_loss_type": "distill"},
    "distill_reverse": {"inner_loss_type": "distill_reverse"},
    "hidden_mse": {"inner_loss_type": "distill_hidden"},
    "hidden_cosine": {"inner_loss_type": "distill_hidden", "distill_hidden_type": "cosine"},
}


def _rows() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for index, (length, prompt) in enumerate(((24, 5), (19, 3), (22, 6))):
        ids = torch.randint(3, 38, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "example_id": index})
    return made


def _with_other_answers(rows: list[dict], is_masked: torch.Tensor) -> list[dict]:
    """`rows` with another token at every outer-masked position that is not padding."""
    changed = []
    for row, mask in zip(rows, is_masked.tolist(), strict=True):
        ids = [(token - 3 + 17) % 35 + 3 if hit else token for token, hit in zip(row["input_ids"], mask, strict=False)]
        labels = [-100 if old == -100 else new for old, new in zip(row["labels"], ids, strict=True)]
        changed.append({**row, "input_ids": ids, "labels": labels})
    return changed


def _written(model, config: MemoryConfig, rows: list[dict]):
    """(batch, phi_K) of a write inside the outer forward, as in training."""
    collator = MemoryCollator(
        PaddingCollator(2), config=config, scheduler=LinearAlphaScheduler(), mask_token_id=MASK, time_epsilon=0.3
    )
    collator.set_epoch(EPOCH)
    batch = collator(rows)
    memory = ParametricMemory(model, config)
    plan = inner_plan(batch)
    with memory.attached(), memory.writing(plan, memory.prefixes(plan), memory.initial(plan, 0)):
        model(input_ids=batch["noised_ids"], logit_positions=batch["loss_positions"])
        assert memory.fast.value is not None and memory.report is not None
        assert float(memory.report.change.min()) > 0  # no row was left without positions
        return batch, memory.fast.value.clone()


@pytest.mark.parametrize("family", ["llada", "llada_moe"])
@pytest.mark.parametrize("scope", ["batch", "row"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("target", ["response", "prompt", "disjoint"])
def test_other_answers_leave_the_memory_bitwise_unchanged(
    make_model, target: str, objective: str, scope: str, family: str
) -> None:
    model = make_model(family)
    config = MemoryConfig(
        inner_rank=4,
        inner_alpha=8.0,
        inner_layer_fraction=0.5,
        inner_target=target,  # pyright: ignore[reportArgumentType]
        scope=scope,  # pyright: ignore[reportArgumentType]
        prompt_mask_ratio=0.5,
        **OBJECTIVES[objective],
    )
    batch, written = _written(model, config, _rows())
    other_batch, other = _written(model, config, _with_other_answers(_rows(), batch["is_masked"]))
    assert torch.equal(batch["noised_ids"], other_batch["noised_ids"])
    assert not torch.equal(batch["input_ids"], other_batch["input_ids"])
    # With response targets the answers do reach the memory: that is the leak.
    assert torch.equal(written, other) == (target != "response")


@pytest.mark.parametrize("mode", ["inner", "both"])
def test_padding_modes_of_disjoint_do_not_leak(make_model, mode: str) -> None:
    model = make_model("llada")
    config = MemoryConfig(
        inner_rank=4, inner_alpha=8.0, inner_layer_fraction=0.5, inner_target="disjoint", pad_unmask_mode=mode
    )  # pyright: ignore[reportArgumentType]
    batch, written = _written(model, config, _rows())
    plan = inner_plan(batch)
    assert all(bool((state[batch["is_masked"]] == MASK).all()) for state in plan.states)
    assert torch.equal(written, _written(model, config, _with_other_answers(_rows(), batch["is_masked"]))[1])
