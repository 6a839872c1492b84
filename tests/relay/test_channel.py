"""The channel: what is added, where, and what is read."""

import pytest
import torch
import torch.nn.functional as F

from dllm.core.carry import carrying
from dllm.core.split import at_layer
from dllm.models.relay_norm import RelayKeys
from dllm.utils.parsing import InputError
from memdlm.relay import RelayChannel, RelayConfig, RelayState

MASK = 39


def state_of(hidden, is_set=True, **more):
    return RelayState(hidden, torch.full((len(hidden),), is_set), **more)


def naive_input(channel, model, ids, hidden, positions):
    """embedding + LayerNorm(h) by position, in a loop."""
    embedded = model.backbone.embedding(ids).clone()
    norm = channel.norm
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1]):
            if positions == "all" or ids[row, column] == MASK:
                value = F.layer_norm(hidden[row, column], (channel.size,), norm.weight, norm.bias, norm.eps)
                embedded[row, column] += value
    return embedded


@pytest.mark.parametrize("family", ["llada", "llada_moe", "llada2_moe"])
@pytest.mark.parametrize("positions", ["mask", "all"])
def test_a_forward_gets_embedding_plus_norm_of_the_state(relay_model, draw, ids, family, positions):
    model, channel = relay_model(family, positions=positions)
    hidden = draw(3, 8, channel.size)
    with channel.passing(state_of(hidden)):
        logits = model(ids).logits
    expected = model(inputs_embeds=naive_input(channel, model, ids, hidden, positions)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llada", "llada_moe", "llada2_moe", "fast_dllm_v2"])
def test_a_zero_gate_is_the_base_model_bitwise_for_any_state(make_model, draw, ids, family):
    model = make_model(family)
    base = model(ids).logits
    channel = RelayChannel.attach(model, RelayConfig(), block_size=4)
    for hidden in (draw(3, 8, channel.size).float() * 1e4, torch.zeros(3, 8, channel.size)):
        with channel.passing(state_of(hidden)):
            assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(ids).logits, base)


@pytest.mark.parametrize("read", ["after", "before", 1])
def test_where_the_state_is_read(relay_model, draw, ids, read):
    settings = {"layer": read} if read == 1 else {"read": read}
    model, channel = relay_model(**settings)
    with channel.passing(channel.first(3, 8)):
        output = model(ids, output_hidden_states=True)
    # Entry i of hidden_states is the input of layer i; the last is the state after the final norm.
    if read == "after":
        expected = output.hidden_states[-1]
    elif read == 1:
        expected = output.hidden_states[2]
    else:
        expected = None
        assert torch.equal(model.backbone.final_norm(channel.taken), output.hidden_states[-1])
    if expected is not None:
        assert torch.equal(channel.taken, expected)


def test_the_first_state_is_the_bias_or_nothing(relay_model, ids):
    model, channel = relay_model(first_state="zeros")
    with channel.passing(channel.first(3, 8)):
        logits = model(ids).logits
    embedded = model.backbone.embedding(ids) + torch.where((ids == MASK)[..., None], channel.norm.bias, 0)
    torch.testing.assert_close(logits, model(inputs_embeds=embedded).logits, rtol=1e-10, atol=1e-10)

    model, channel = relay_model(first_state="none")
    with channel.passing(channel.first(3, 8)):
        with_first = model(ids).logits
    assert torch.equal(with_first, model(ids).logits)


def test_rows_that_have_no_state_yet_get_nothing_with_first_state_none(relay_model, draw, ids):
    model, channel = relay_model(first_state="none")
    hidden = draw(3, 8, channel.size)
    with channel.passing(RelayState(hidden, torch.tensor([True, False, True]))):
        logits = model(ids).logits
    plain = model(ids).logits
    torch.testing.assert_close(logits[1], plain[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(logits[0], plain[0])


@pytest.mark.parametrize("shift_within, kept", [("block", {0, 4}), ("row", {0})])
def test_with_a_logit_shift_each_position_gets_the_state_before_it(relay_model, draw, ids, shift_within, kept):
    model, channel = relay_model("fast_dllm_v2", block_size=4, shift_within=shift_within)
    hidden = draw(3, 8, channel.size)
    with channel.passing(state_of(hidden)):
        logits = model(ids).logits
    moved = torch.stack([hidden[:, c if c in kept else c - 1] for c in range(8)], dim=1)
    expected = model(inputs_embeds=naive_input(channel, model, ids, moved, "mask")).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_nothing_is_added_behind_the_state(relay_model, draw, ids):
    """Block diffusion puts the clean tokens behind the noised ones, and masks may stand there too."""
    model, channel = relay_model(positions="all")
    hidden = draw(3, 8, channel.size)
    twice = torch.cat([ids, ids], dim=1)
    with channel.passing(state_of(hidden)):
        logits = model(twice).logits
    embedded = torch.cat([naive_input(channel, model, ids, hidden, "all"), model.backbone.embedding(ids)], dim=1)
    torch.testing.assert_close(logits, model(inputs_embeds=embedded).logits, rtol=1e-10, atol=1e-10)


def test_each_group_of_rows_gets_the_state(relay_model, draw, ids):
    model, channel = relay_model()
    state = state_of(draw(3, 8, channel.size))
    other = ids.flip(1)
    with channel.passing(state):
        both = model(torch.cat([ids, other])).logits
        first, second = model(ids).logits, model(other).logits
    torch.testing.assert_close(both, torch.cat([first, second]), rtol=1e-10, atol=1e-10)


def test_only_allowed_positions_get_it(relay_model, draw, ids):
    model, channel = relay_model(positions="all")
    hidden, allowed = draw(3, 8, channel.size), torch.zeros(3, 8, dtype=torch.bool)
    with channel.passing(state_of(hidden, allowed=allowed)):
        nothing = model(ids).logits
    assert torch.equal(nothing, model(ids).logits)


def test_replays_show_nothing_and_prefixes_get_the_state(relay_model, draw, ids):
    model, channel = relay_model()
    seen = []

    def callback(hidden, layer_inputs):
        model.backbone.run_layers(hidden, layer_inputs, 1)
        seen.append(channel.taken)
        return hidden

    state = state_of(draw(3, 8, channel.size))
    with channel.passing(state), at_layer(model.backbone, 1, callback):
        model(ids)
    assert seen == [None] and channel.taken is not None
    with channel.passing(state):
        prefix = model.backbone(ids, stop_at=1)
        assert channel.taken is None
        after = model.backbone.final_norm(model.backbone.run_layers(prefix.hidden, prefix.layer_inputs, 1))
        model(ids)
    assert after.shape == channel.taken.shape


def test_first_forwards_inside_a_passing_neither_get_nor_change_the_state(relay_model, draw, ids):
    model, channel = relay_model()
    with channel.passing(channel.first(2, 5)):
        expected = model(ids[:2, :5]).logits
    with channel.passing(state_of(draw(3, 8, channel.size))):
        model(ids)
        before = channel.taken
        with channel.first_forwards():
            inside = model(ids[:2, :5]).logits
        assert channel.taken is before
    with channel.first_forwards():
        outside = model(ids[:2, :5]).logits
    torch.testing.assert_close(inside, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(inside, outside)
    assert model.backbone.carry is None


def test_an_error_leaves_the_model_as_it_was(relay_model, ids):
    model, channel = relay_model()
    before = model(ids).logits
    with pytest.raises(RuntimeError, match="stop"), channel.passing(channel.first(3, 8)):
        raise RuntimeError("stop")
    assert model.backbone.carry is None
    assert torch.equal(model(ids).logits, before)


def test_one_state_at_a_time(relay_model):
    model, channel = relay_model()
    with (
        channel.passing(channel.first(3, 8)),
        pytest.raises(RuntimeError, match="carries a state already"),
        carrying(model.backbone, channel),
    ):
        pass


def test_a_model_without_a_relay_is_refused_by_the_name_of_the_tensor(make_model):
    with pytest.raises(InputError, match=r"model\.relay_layer_norm\.weight"):
        RelayChannel(make_model())


def test_a_state_or_a_norm_of_another_width_is_refused(relay_model, draw):
    model, channel = relay_model()
    with pytest.raises(InputError, match="17 wide and the model 16"), channel.passing(state_of(draw(3, 8, 17))):
        pass
    model.backbone.relay_layer_norm = torch.nn.LayerNorm(17)
    with pytest.raises(InputError, match="17 wide and the model 16"):
        RelayChannel(model)


def test_settings_that_contradict_the_checkpoint_are_refused(relay_model):
    model, channel = relay_model(positions="all", read="before")
    again = RelayChannel.attach(model, RelayConfig())  # defaults take what the checkpoint has
    assert again.keys == channel.keys == RelayKeys(layer=2, positions="all", gate="zero")
    with pytest.raises(InputError, match="relay_first_state=none contradicts the checkpoint"):
        RelayChannel.attach(model, RelayConfig(first_state="none"))


@pytest.mark.parametrize("preset, asked", [("llm", {"positions": "mask"}), ("llm", {"gate": "zero"})])
def test_a_default_that_was_asked_for_by_name_is_not_overruled(relay_model, preset, asked):
    model, _ = relay_model(positions="all", gate="default")
    with pytest.raises(InputError, match="contradicts the checkpoint"):
        RelayChannel.attach(model, RelayConfig.for_arm("relay", preset, **asked))


def test_a_state_of_other_rows_or_columns_is_refused(relay_model, draw, ids):
    model, channel = relay_model()
    for rows, columns in ((2, 8), (3, 9)):
        with (
            pytest.raises(InputError, match=r"columns, the input has \[3, 8\]"),
            channel.passing(state_of(draw(rows, columns, channel.size))),
        ):
            model(ids)


def test_no_such_layer(make_model):
    with pytest.raises(InputError, match="relay_layer=3: the model has layers 0 to 2"):
        RelayChannel.attach(make_model(), RelayConfig(layer=3))
