"""Parametric Memory under block diffusion: what must not change, and B rows as B singles."""

import copy

import pytest
import torch

from dllm.core.attention import in_two_halves, two_halves_inputs
from dllm.core.schedulers import LinearAlphaScheduler
from dllm.data.collators import BlockPaddingCollator
from memdlm.memory.collator import MemoryCollator, inner_plan
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric import ParametricMemory

FAMILIES = ["llada", "llada2_moe", "fast_dllm_v2"]
MASK, BLOCK = 39, 4


def _rows(lengths) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, 38, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "example_id": index})
    return rows


def _batch(config: MemoryConfig, rows: list[dict] | None = None, block_size: int = BLOCK) -> dict:
    collator = MemoryCollator(
        BlockPaddingCollator(2, block_size),
        config=config,
        scheduler=LinearAlphaScheduler(),
        mask_token_id=MASK,
        time_epsilon=0.3,
        block_size=block_size,
        time_per="block",
    )
    return collator(_rows((13, 8, 11)) if rows is None else rows)


def _settings(**overrides) -> MemoryConfig:
    rank = {} if "inner_adapter_type" in overrides else {"inner_rank": 4, "inner_alpha": 8.0}
    return MemoryConfig(**{"inner_layer_fraction": 0.5, **rank, **overrides})


def _forward(model, batch: dict) -> torch.Tensor:
    length = batch["input_ids"].shape[1]
    layout = two_halves_inputs("sdpa", length, BLOCK, None, batch["input_ids"].device)
    ids = torch.cat([batch["noised_ids"], batch["input_ids"]], dim=1)
    return model(ids, **layout, logit_positions=in_two_halves(batch["loss_positions"], length)).logits


def _shared(model, memory: ParametricMemory, batch: dict) -> torch.Tensor:
    plan = inner_plan(batch)
    with memory.writing(plan, memory.prefixes(plan), memory.initial(plan, 0)):
        return _forward(model, batch)


def _two_passes(model, memory: ParametricMemory, batch: dict) -> torch.Tensor:
    plan = inner_plan(batch)
    memory.write(plan, memory.initial(plan, 0))
    return _forward(model, batch)


def _loss_and_gradients(model, memory: ParametricMemory, batch: dict, forward=_shared):
    model.zero_grad()
    with memory.attached():
        logits = forward(model, memory, batch)
        loss = torch.nn.functional.cross_entropy(logits, batch["input_ids"].reshape(-1)[batch["loss_positions"]])
        loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


VARIANTS = {
    "default": {},
    "row": {"scope": "row"},
    "four_steps": {"num_inner_steps": 4},
    "distill": {"inner_loss_type": "distill"},
    "distill_hidden_row": {"inner_loss_type": "distill_hidden", "scope": "row"},
    "no_progressive": {"masking_strategy": "no_progressive"},
    "progressive_memory": {"masking_strategy": "progressive_memory", "num_inner_steps": 3},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", VARIANTS)
def test_shared_prefix_is_two_passes(make_model, name: str, family: str) -> None:
    model = make_model(family).double().train()
    config = _settings(**VARIANTS[name])
    batch = _batch(config)
    memory = ParametricMemory(model, config)
    first = _loss_and_gradients(model, memory, batch)
    second = _loss_and_gradients(model, memory, batch, forward=_two_passes)
    # float64 products of other shapes differ in the last digits; phi itself is float32.
    torch.testing.assert_close(first[0], second[0], rtol=1e-6, atol=0)
    assert first[1].keys() == second[1].keys() and first[1]
    for key, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][key], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["default", "row"])
def test_activation_checkpointing_changes_nothing(make_model, name: str) -> None:
    model = make_model("llada2_moe").train()
    config = _settings(**VARIANTS[name])
    batch = _batch(config)
    memory = ParametricMemory(model, config)
    plain = _loss_and_gradients(model, memory, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = _loss_and_gradients(model, memory, batch)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(gradient, again[1][key]) for key, gradient in plain[1].items())


def test_the_states_are_those_of_full_attention_with_the_clean_half_behind() -> None:
    config = _settings(num_inner_steps=3, inner_loss_type="distill")
    batch = _batch(config)
    plan = inner_plan(batch)
    assert plan.block_size == BLOCK and plan.anchor is not None
    clean, length = batch["input_ids"], batch["input_ids"].shape[1]
    for state in plan.states:
        assert torch.equal(state[:, length:], clean)
        shown = state[:, :length] != MASK
        assert torch.equal(state[:, :length][shown], clean[shown])
    assert torch.equal(plan.states[plan.anchor][:, :length], batch["noised_ids"])
    for step in plan.steps:
        ids = plan.states[step.student].reshape(-1)[step.loss_positions]
        assert (ids == MASK).all() and (step.loss_positions % (2 * length) < length).all()
        assert torch.equal(clean[step.loss_positions // (2 * length), step.loss_positions % length], step.targets)


def test_rows_of_one_block_have_the_plan_of_full_attention() -> None:
    plan = inner_plan(_batch(_settings(), block_size=16))
    assert plan.block_size is None and plan.length == 16


@pytest.mark.parametrize("family", FAMILIES)
def test_detached_memory_is_the_base_model_bitwise(make_model, family: str) -> None:
    model = make_model(family)
    untouched = copy.deepcopy(model)
    batch = _batch(_settings())
    memory = ParametricMemory(model, _settings())
    with torch.no_grad():
        before = _forward(untouched, batch)
        with memory.attached():
            assert torch.equal(_forward(model, batch), before)
            assert not torch.equal(_shared(model, memory, batch), before)
            memory.reset()
            assert torch.equal(_forward(model, batch), before)
        assert torch.equal(_forward(model, batch), before)


@pytest.mark.parametrize("name", ["default", "row"])
def test_inner_learning_rate_zero_is_the_plain_model(make_model, name: str) -> None:
    model = make_model("llada2_moe").double()
    config = _settings(inner_lr=0.0, **VARIANTS[name])
    batch = _batch(config)
    with torch.no_grad():
        plain = _forward(model, batch)
        memory = ParametricMemory(model, config)
        with memory.attached():
            torch.testing.assert_close(_shared(model, memory, batch), plain, rtol=1e-11, atol=1e-11)  # float64


@pytest.mark.parametrize("family", FAMILIES)
def test_scope_row_makes_a_batch_its_rows(make_model, family: str) -> None:
    model = make_model(family).double()
    config = _settings(scope="row")
    rows = _rows((13, 8, 11))
    memory = ParametricMemory(model, config)

    def logits_of(chosen: list[dict]) -> list[torch.Tensor]:
        batch = _batch(config, chosen)
        with memory.attached(), torch.no_grad():
            logits = _shared(model, memory, batch)
        row_of = batch["loss_positions"] // batch["input_ids"].shape[1]
        return [logits[row_of == index] for index in range(len(chosen))]

    together = logits_of(rows)
    for row, expected in zip(rows, together, strict=True):
        # phi is float32, and the clip divides by norms summed in another order.
        torch.testing.assert_close(logits_of([row])[0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits_of([rows[1]])[0], _plain_logits(model, [rows[1]], config))


def _plain_logits(model, rows: list[dict], config: MemoryConfig) -> torch.Tensor:
    batch = _batch(config, rows)
    if batch["input_ids"].shape[1] <= BLOCK:
        return model(batch["noised_ids"], logit_positions=batch["loss_positions"]).logits
    with torch.no_grad():
        return _forward(model, batch)


def test_scope_batch_lets_rows_share_one_memory(make_model) -> None:
    model = make_model("llada2_moe").double()
    config = _settings()
    rows = _rows((13, 8))
    memory = ParametricMemory(model, config)
    with memory.attached(), torch.no_grad():
        _shared(model, memory, _batch(config, rows))
        together = memory.fast.value.clone()
        _shared(model, memory, _batch(config, rows[:1]))
        alone = memory.fast.value.clone()
    assert together.shape == alone.shape == (1, memory.fast.numel) and not torch.allclose(together, alone)
