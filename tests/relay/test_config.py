"""Settings: ranges, pairs, arms, presets, flags."""

import dataclasses

import pytest
from transformers import HfArgumentParser

from dllm.models.relay_norm import RelayKeys, relay_keys, with_present_names
from dllm.utils.parsing import InputError
from memdlm.relay import ARMS, PRESETS, RelayBD3LMConfig, RelayConfig, RelayTrainerConfig


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("num_steps", 0, "at least 1"),
        ("bptt_window", 3, "at most relay_num_steps=2"),
        ("bptt_window", 0, "at least 1"),
        ("threshold", 0.0, r"in \(0, 1\]"),
        ("layer", -2, "-1 or the number"),
        ("gate", "open", "choose one of zero, default"),
        ("positions", "some", "choose one of mask, all"),
        ("reveal", "top", "choose one of threshold, aligned, uncertainty"),
        ("block_size", 0, "at least 1"),
        ("num_steps", True, "at least 1"),
        ("layer", 1.5, "-1 or the number"),
        ("carry", "yes", "True or False"),
        ("tau", "a", "a number"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value, message):
    with pytest.raises(InputError, match=f"relay_{name} .*{message}"):
        RelayConfig(**{name: value})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"carry": False, "gate": "default"}, "relay_gate=default has no effect with relay_carry=False"),
        ({"carry": False, "bptt_window": 1}, "relay_bptt_window=1 has no effect with relay_carry=False"),
        ({"states": "uniform"}, "nothing|no earlier forward"),
        ({"states": "uniform", "carry": False}, "set relay_num_steps 1"),
        ({"tau": 0.2}, "relay_tau=0.2 has no effect with relay_reveal=threshold"),
        ({"reveal": "uncertainty", "threshold": 0.5}, "relay_threshold=0.5 has no effect"),
        ({"inner_block_size": 4}, "relay_inner_block_size=4 has no effect"),
        ({"read": "before", "layer": 1}, "relay_read=before has no effect with relay_layer=1"),
        ({"reveal": "uncertainty", "tau": 0.0}, "relay_tau must be above 0"),
        ({"reveal": "uncertainty", "tau_jitter": -1.0}, "relay_tau_jitter must be at least 0"),
        ({"reveal": "uncertainty", "block_size": 4}, "relay_block_size=4 has no effect"),
    ],
)
def test_a_setting_that_could_have_no_effect_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        RelayConfig(**settings)


def test_every_field_can_be_set_to_another_value_than_its_default():
    other = {
        "carry": True,
        "num_steps": 4,
        "bptt_window": 2,
        "states": "rollout",
        "gate": "default",
        "positions": "all",
        "read": "before",
        "layer": -1,
        "first_state": "none",
        "shift_within": "row",
        "reveal": "aligned",
        "threshold": 0.5,
        "block_size": 16,
        "inner_block_size": 4,
        "tau": 0.15,
        "tau_jitter": 0.0,
        "drop_rows": True,
    }
    config = RelayConfig(**other)
    assert dataclasses.asdict(config) == other
    assert config.keys(6) == RelayKeys(5, "all", "none", "row", "default")
    assert RelayConfig(layer=3).keys(6).layer == 3


def test_the_arms():
    arms = {arm: RelayConfig.for_arm(arm) for arm in ARMS}
    assert [(c.carry, c.states, c.num_steps, c.window) for c in arms.values()] == [
        (False, "uniform", 1, 1),
        (False, "rollout", 2, 2),
        (True, "rollout", 2, 1),
        (True, "rollout", 2, 2),
    ]
    for preset in PRESETS:
        for arm in ARMS:
            RelayConfig.for_arm(arm, preset)
    sudoku = RelayConfig.for_arm("relay", "sudoku")
    assert (sudoku.gate, sudoku.positions, sudoku.read) == ("default", "all", "before")
    assert (sudoku.reveal, sudoku.tau, sudoku.tau_jitter) == ("uncertainty", 0.15, 0.1)
    assert RelayConfig.for_arm("rollout", "sudoku").tau_jitter == 0.1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: RelayConfig.for_arm("other"), "relay_arm is 'other': choose one of mask_uniform"),
        (lambda: RelayConfig.for_arm("relay", "x"), "relay_preset is 'x': choose one of llm, sudoku"),
        (lambda: RelayConfig.for_arm("relay", windows=2), "unknown relay setting windows; allowed: carry"),
    ],
)
def test_unknown_names_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    "arm, settings", [("relay", {"reveal": "threshold"}), ("relay", {"layer": 1}), ("relay_sg", {"carry": False})]
)
def test_what_a_preset_says_gives_way_to_what_leaves_it_no_effect(arm, settings):
    if "carry" in settings:
        with pytest.raises(InputError, match="relay_bptt_window=1 has no effect"):
            RelayConfig.for_arm(arm, "sudoku", **settings)
        return
    config = RelayConfig.for_arm(arm, "sudoku", **settings)
    assert all(getattr(config, name) == value for name, value in settings.items())


def parse(tmp_path, *flags, cls=RelayTrainerConfig):
    (config,) = HfArgumentParser(cls).parse_args_into_dataclasses(["--output_dir", str(tmp_path), *flags])
    return config


def test_flags_refine_arm_and_preset(tmp_path):
    config = parse(tmp_path, "--relay_arm", "relay_sg", "--relay_preset", "sudoku", "--relay_num_steps", "3")
    assert config.relay() == RelayConfig.for_arm("relay_sg", "sudoku", num_steps=3)
    assert parse(tmp_path, "--relay_preset", "sudoku", "--relay_tau_jitter", "0").relay().tau_jitter == 0
    assert parse(tmp_path).relay() == RelayConfig()
    assert parse(tmp_path).loss_weight_type == "uniform"


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--relay_arm", "rollout", "--relay_carry", "True"), "relay_carry=True contradicts relay_arm=rollout"),
        (("--relay_arm", "relay_sg", "--relay_bptt_window", "2"), "relay_bptt_window=2 contradicts relay_arm=relay_sg"),
        (("--loss_weight_type", "scheduler"), "loss_weight_type=scheduler has no effect on the relay's loss"),
        (("--loss_norm_type", "batch"), "loss_norm_type=batch has no effect"),
        (("--edit_ratio", "0.1"), "edit_ratio=0.1 has no effect"),
    ],
)
def test_flags_that_cannot_hold_together_are_refused(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        parse(tmp_path, *flags)


def test_block_diffusion_has_its_own_block_size(tmp_path):
    with pytest.raises(InputError, match="relay_block_size has no effect under block diffusion: give --block_size"):
        parse(tmp_path, "--relay_block_size", "8", cls=RelayBD3LMConfig)
    with pytest.raises(InputError, match="complementary_masks belongs to random masks"):
        parse(tmp_path, "--complementary_masks", "True", cls=RelayBD3LMConfig)


def test_keys_of_the_released_layout():
    assert relay_keys({"use_relay": True, "relay_layer": -1}) == RelayKeys()
    assert relay_keys({"use_relay": False, "relay_layer": -1}) is None
    assert relay_keys({}) is None
    with pytest.raises(ValueError, match="relay_positions is 'few'"):
        relay_keys({"use_relay": True, "relay_positions": "few"})
    for raw, message in (
        ({"use_relay": "false"}, "use_relay is 'false'"),
        ({"use_relay": True, "relay_layer": "13"}, "relay_layer is '13'"),
        ({"use_relay": True, "relay_layer": None}, "relay_layer is None"),
    ):
        with pytest.raises(ValueError, match=message):
            relay_keys(raw)
    both = {"use_loopholing": False, "use_relay": True}
    assert with_present_names(both) == with_present_names(dict(reversed(both.items()))) == {"use_relay": True}
