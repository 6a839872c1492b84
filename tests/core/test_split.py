"""The split point equals the plain forward, in value, gradient and number of calls."""

import pytest
import torch

from dllm.core.split import at_layer
from dllm.models import DiffusionLM, LLaDAConfig, LLaDAModelLM, LLaDAMoEConfig, LLaDAMoEModelLM

NUM_LAYERS = 3


@pytest.fixture(params=["llada", "llada_moe"])
def model(request) -> DiffusionLM:
    if request.param == "llada":
        config = LLaDAConfig(
            vocab_size=19,
            d_model=16,
            n_heads=2,
            n_layers=NUM_LAYERS,
            mlp_hidden_size=12,
            init_std=0.3,
            attention_dropout=0.0,
            residual_dropout=0.0,
            embedding_dropout=0.0,
        )
        return LLaDAModelLM(config)
    config = LLaDAMoEConfig(
        vocab_size=19,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=NUM_LAYERS,
        num_experts=4,
        num_experts_per_tok=2,
        expert_intermediate_size=8,
        initializer_range=0.3,
    )
    return LLaDAMoEModelLM(config)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(0, 19, (3, 7)), "attention_mask": mask}


def gradients(model, loss) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def equal(left, right) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("layer", range(NUM_LAYERS + 1))
def test_prefix_then_suffix_is_the_forward(model, batch, layer):
    expected = model.backbone(**batch).last_hidden_state
    state = model.backbone(**batch, stop_at=layer)
    for checkpoint in (False, True):
        got = model.backbone.run_layers(state.hidden, state.layer_inputs, layer, checkpoint=checkpoint)
        assert torch.equal(got, expected)
        weight = torch.linspace(-1, 1, got.numel()).view_as(got)
        left = gradients(model, (model.backbone(**batch).last_hidden_state * weight).sum())
        again = model.backbone(**batch, stop_at=layer)
        replayed = model.backbone.run_layers(again.hidden, again.layer_inputs, layer, checkpoint=checkpoint)
        assert equal(left, gradients(model, (replayed * weight).sum()))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("shape", [(1, 6), (3, 2)])
@pytest.mark.parametrize("layer", range(NUM_LAYERS + 1))
def test_the_last_layer_may_run_on_wanted_positions_alone(model, batch, layer, shape, checkpoint):
    model.double()
    wanted = torch.tensor([0, 3, 8, 9, 17, 20]).view(shape)
    states = [model.backbone(**batch, stop_at=layer) for _ in range(2)]
    whole = model.backbone.run_layers(states[0].hidden, states[0].layer_inputs, layer).flatten(0, 1)[wanted]
    got = model.backbone.run_layers(states[1].hidden, states[1].layer_inputs, layer, checkpoint, wanted)
    assert got.shape == (*shape, whole.shape[-1])
    # float64; a product over fewer rows may round in another way.
    assert torch.allclose(got, whole, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    expected, actual = (gradients(model, (value * weight).sum()) for value in (whole, got))
    for left, right in zip(expected, actual, strict=True):
        left = torch.zeros(()) if left is None else left
        right = torch.zeros(()) if right is None else right
        assert torch.allclose(left, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_callback_that_returns_its_input_changes_nothing(model, batch, layer, checkpointing):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []

    def callback(hidden, layer_inputs):
        calls.append(set(layer_inputs))
        assert layer_inputs["past_key_values"] is None and layer_inputs["recorder"] is None
        return hidden

    plain = model(**batch).logits
    expected = gradients(model, plain.square().sum())
    with at_layer(model.backbone, layer, callback):
        logits = model(**batch).logits
        got = gradients(model, logits.square().sum())
    assert torch.equal(logits, plain)
    assert equal(expected, got)
    assert len(calls) == 1  # backward recomputes layers, but not the callback
    model(**batch)
    assert len(calls) == 1


def test_the_forward_goes_on_with_what_the_callback_returns(model, batch):
    state = model.backbone(**batch, stop_at=1)
    expected = model.backbone.run_layers(state.hidden * 2, state.layer_inputs, 1)
    with at_layer(model.backbone, 1, lambda hidden, _: hidden * 2):
        assert torch.equal(model.backbone(**batch).last_hidden_state, expected)


def test_forwards_inside_the_callback_are_plain(model, batch):
    plain = model(**batch).logits.detach()
    seen = []

    def callback(hidden, layer_inputs):
        seen.append(model(**batch).logits.detach())
        model.backbone.run_layers(hidden, layer_inputs, 2, checkpoint=True)
        return hidden

    with at_layer(model.backbone, 2, callback):
        model(**batch)
    assert len(seen) == 1 and torch.equal(seen[0], plain)


def test_a_forward_stopped_at_the_layer_does_not_call(model, batch):
    def callback(hidden, _):
        raise AssertionError("called")

    with at_layer(model.backbone, 1, callback):
        model.backbone(**batch, stop_at=1)


@pytest.mark.parametrize("own_checkpointing", [False, True])
def test_replays_recompute_only_if_asked(model, batch, own_checkpointing):
    """A layer runs once, and once more in backward with checkpoint=True, whatever the model's own setting."""
    model.train()
    if own_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    state = model.backbone(**batch, stop_at=1)
    runs = []
    norm = model.backbone.layers[1].get_submodule(
        "ff_norm" if "llada." in type(model).__module__ + "." else "input_layernorm"
    )
    handle = norm.register_forward_hook(lambda *_: runs.append(1))
    for checkpoint, expected in ((False, 1), (True, 2)):
        runs.clear()
        hidden = state.hidden.detach().requires_grad_()
        output = model.backbone.run_layers(hidden, state.layer_inputs, 1, checkpoint=checkpoint)
        torch.autograd.grad(output.sum(), hidden)
        assert len(runs) == expected
    handle.remove()
    assert all(layer.gradient_checkpointing == own_checkpointing for layer in model.backbone.layers)


def test_dropping_out_of_the_block(model, batch):
    plain = model(**batch).logits

    def fail(hidden, _):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), at_layer(model.backbone, 1, fail):
        model(**batch)
    assert torch.equal(model(**batch).logits, plain)


def test_refusals(model, batch):
    backbone = model.backbone

    def same(hidden, _):
        return hidden

    with pytest.raises(ValueError, match="0 to 2"), at_layer(backbone, NUM_LAYERS, same):
        pass
    with (
        at_layer(backbone, 1, same),
        pytest.raises(RuntimeError, match="already set"),
        at_layer(backbone, 2, same),
    ):
        pass
    with pytest.raises(ValueError, match="0 to 3"):
        backbone(**batch, stop_at=4)
    with pytest.raises(ValueError, match="KV cache"):
        backbone(**batch, stop_at=1, use_cache=True)
    with at_layer(backbone, 1, same), pytest.raises(ValueError, match="KV cache"):
        backbone(**batch, use_cache=True)
    with pytest.raises(ValueError, match="stop_at"):
        backbone(**batch, stop_at=1, output_hidden_states=True)
