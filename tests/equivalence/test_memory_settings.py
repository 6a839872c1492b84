"""Every setting of the inner loop takes effect, and the loop as a whole is the formula."""

import dataclasses

import pytest
import torch

from dllm.core.schedulers import LinearAlphaScheduler
from dllm.data.collators import PaddingCollator
from dllm.models.spec import get_spec, register_spec
from memdlm.memory.collator import MemoryCollator, inner_plan
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric import ParametricMemory

FAMILIES = ["llada", "llada_moe"]
MASK = 39


def _batch(config: MemoryConfig, lengths=(9, 6, 7)) -> dict:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, 38, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "example_id": index})
    collator = MemoryCollator(
        PaddingCollator(2), config=config, scheduler=LinearAlphaScheduler(), mask_token_id=MASK, time_epsilon=0.3
    )
    return collator(rows)


def _settings(**overrides) -> MemoryConfig:
    return MemoryConfig(**{"inner_rank": 4, "inner_alpha": 8.0, "inner_layer_fraction": 0.5, **overrides})


def _forward(model, batch: dict) -> torch.Tensor:
    return model(input_ids=batch["noised_ids"], logit_positions=batch["loss_positions"]).logits


def _record_phi(memory: ParametricMemory) -> list[torch.Tensor]:
    """A list that fills with every finished phi (not the leaves of the inner loop) that is put in place."""
    finished = []
    original = memory.fast.set

    def remember(flat) -> None:
        if flat is not None and not flat.requires_grad:
            finished.append(flat.clone())
        original(flat)

    memory.fast.set = remember
    return finished


def _write(model, batch: dict, config: MemoryConfig, **options) -> torch.Tensor:
    """phi_K of one write in a pass of its own."""
    memory = ParametricMemory(model, config)
    finished = _record_phi(memory)
    with memory.attached():
        plan = inner_plan(batch)
        memory.write(plan, memory.initial(plan, 0), **options)
    return finished[-1]


@pytest.mark.parametrize(
    ("name", "first", "second", "others"),
    [
        ("num_inner_epochs", 1, 2, {}),
        ("inner_lr", 0.1, 0.2, {}),
        ("inner_grad_clip", 0.02, 0.01, {}),
        ("clip_kind", "tensor", "global", {"inner_grad_clip": 0.02}),
        ("inner_alpha", 8.0, 16.0, {}),
        ("loss_norm_type", "token", "batch", {}),
        ("loss_norm_type", "token", "sequence", {}),
        ("loss_weight_type", "uniform", "scheduler", {}),
    ],
)
def test_a_setting_changes_the_fast_weights(make_model, name: str, first, second, others: dict) -> None:
    others = {"inner_grad_clip": 0.0, **others}
    batch = _batch(_settings())
    model = make_model("llada")
    one, two = (_write(model, batch, _settings(**{**others, name: value})) for value in (first, second))
    moved = one - ParametricMemory(model, _settings()).initial(inner_plan(batch), 0)
    # Far above float32 rounding (1e-7 of phi): the setting matters.
    assert float((one - two).norm()) > 1e-2 * float(moved.norm()) > 1e-6


@pytest.mark.parametrize("seed", [0, 7])
def test_the_seed_draws_the_initial_values(make_model, seed: int) -> None:
    model = make_model("llada")
    plan = inner_plan(_batch(_settings()))
    memories = [ParametricMemory(model, _settings(**kind)) for kind in ({}, {"seed": seed})]
    default, other = (memory.initial(plan, "train", 3) for memory in memories)
    assert not torch.equal(default, other)
    assert torch.equal(other, ParametricMemory(model, _settings(seed=seed)).initial(plan, "train", 3))


@pytest.mark.parametrize("model_recomputes", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_the_inner_loop_recomputes_where_model_and_flag_say_so(make_model, model_recomputes: bool, flag: bool) -> None:
    model = make_model("llada").train()
    if model_recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = _settings(inner_gradient_checkpointing=flag)
    batch = _batch(config)
    calls = []
    # Before the forward: the recomputation may stop early, as soon as it has what backward needs.
    model.backbone.layers[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    _write(model, batch, config)
    # Two inner steps, each runs the last layer once, or once more in backward.
    assert len(calls) == (4 if flag and model_recomputes else 2)


def _with_and_without_dropout(make_model):
    rates = {"attention_dropout": 0.5, "residual_dropout": 0.5, "embedding_dropout": 0.5}
    return make_model("llada", **rates).train(), make_model("llada")


def test_prefixes_run_without_dropout(make_model) -> None:
    noisy, quiet = _with_and_without_dropout(make_model)
    config = _settings(num_inner_steps=3)
    plan = inner_plan(_batch(config))
    state = torch.random.get_rng_state()
    prefixes = ParametricMemory(noisy, config).prefixes(plan).hidden
    assert torch.equal(state, torch.random.get_rng_state())
    expected = ParametricMemory(quiet, config).prefixes(plan).hidden
    assert prefixes[-1] is None and expected[-1] is None
    for hidden, wanted in zip(prefixes[:-1], expected[:-1], strict=True):
        assert hidden is not None and torch.equal(hidden, wanted)
    assert all(part.training for part in noisy.modules())


def test_dropout_of_the_outer_forward_does_not_reach_the_memory(make_model) -> None:
    # One step: its state is not the anchor, so nothing of the outer forward goes into the memory.
    config = _settings(num_inner_steps=1)
    batch = _batch(config)
    written = []
    for model in _with_and_without_dropout(make_model):
        memory = ParametricMemory(model, config)
        finished = _record_phi(memory)
        plan = inner_plan(batch)
        with memory.attached(), memory.writing(plan, memory.prefixes(plan), memory.initial(plan, 0)):
            _forward(model, batch)
        written.append(finished[-1])
    assert torch.equal(*written)


def test_writing_draws_no_random_numbers(make_model) -> None:
    noisy, _ = _with_and_without_dropout(make_model)
    config = _settings()
    batch = _batch(config)
    memory = ParametricMemory(noisy, config)
    plan = inner_plan(batch)
    torch.manual_seed(5)
    _forward(noisy, batch)
    expected = torch.random.get_rng_state()
    torch.manual_seed(5)
    with memory.attached(), memory.writing(plan, memory.prefixes(plan), memory.initial(plan, 0)):
        _forward(noisy, batch)
    # The outer forward's own dropout has been drawn, and nothing else.
    assert torch.equal(torch.random.get_rng_state(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_before_write_sees_the_base_model_even_after_an_earlier_write(make_model, family: str) -> None:
    model = make_model(family)
    config = _settings(inner_lr=1.0)
    batch = _batch(config)
    memory = ParametricMemory(model, config)
    plan = inner_plan(batch)
    seen = []

    def observe(hidden, layer_inputs) -> None:
        seen.append(memory.readout(hidden, layer_inputs, batch["loss_positions"]))

    with torch.no_grad():
        base = _forward(model, batch)
        with memory.attached():
            memory.write(plan, memory.initial(plan, 0))
            assert not torch.equal(_forward(model, batch), base)  # a memory is in place
            with memory.writing(plan, memory.prefixes(plan), memory.initial(plan, 1), before_write=observe):
                _forward(model, batch)
    # The replay runs the last experts on the loss positions alone, and float32 products vary with shape.
    assert len(seen) == 1 and torch.allclose(seen[0], base, rtol=1e-5, atol=1e-5)


def test_a_later_step_that_is_not_finite_keeps_the_earlier_ones(make_model) -> None:
    model = make_model("llada")
    config = _settings()
    batch = _batch(config)
    gradients = []

    def spoil_the_second(gradient: torch.Tensor) -> torch.Tensor:
        gradients.append(gradient)
        return gradient * float("nan") if len(gradients) == 2 else gradient

    spoiled = _write(model, batch, config, reduce_gradient=spoil_the_second)
    plan = batch["memory_plan"]
    first_only = {**batch, "memory_plan": {**plan, "steps": plan["steps"][:1]}}
    initial = ParametricMemory(model, config).initial(inner_plan(batch), 0)
    assert len(gradients) == 2 and not torch.equal(spoiled, initial)
    assert torch.equal(spoiled, _write(model, first_only, config))


def test_one_gradient_entry_that_is_not_finite_skips_the_whole_step(make_model) -> None:
    model = make_model("llada")
    config = _settings(num_inner_steps=1)

    def spoil_one(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.index_fill(1, torch.tensor([3]), float("inf"))

    batch = _batch(config)
    written = _write(model, batch, config, reduce_gradient=spoil_one)
    assert torch.equal(written, ParametricMemory(model, config).initial(inner_plan(batch), 0))


@pytest.fixture
def shifted_llada():
    """The table of families with LLaDA as one whose logit at p - 1 predicts token p."""
    original = get_spec("llada")
    register_spec(dataclasses.replace(original, logit_shift=1))
    yield
    register_spec(original)


def test_readout_follows_the_logit_shift(make_model, shifted_llada) -> None:
    model = make_model("llada")
    memory = ParametricMemory(model, _settings())
    ids = torch.randint(3, 38, (3, 7))
    positions = torch.tensor([1, 5, 9, 20])
    with torch.no_grad():
        split = model.backbone(input_ids=ids, stop_at=memory.start)
        last = model.backbone.run_layers(split.hidden, split.layer_inputs, memory.start)
        logits = memory.readout(split.hidden, split.layer_inputs, positions)
    flat = last.flatten(0, 1)
    assert torch.equal(logits, model.head(flat[positions - 1]))
    assert not torch.equal(logits, model.head(flat[positions]))
