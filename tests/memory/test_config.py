import dataclasses

import pytest

from memdlm.memory.config import MemoryConfig, flag_fields
from memdlm.trainer import MemDLMConfig

# Another valid value for every field, or the refusal that it gets beside the other defaults.
OTHER = {
    "enabled": True,
    "num_inner_steps": 3,
    "num_inner_epochs": 2,
    "masking_strategy": "pre_only",
    "mask_ratio_epsilon": 1e-2,
    "prompt_mask_ratio": 0.5,
    "progressive_consistent_start_scale": 2.0,
    "inner_loss_type": "distill",
    "distill_temperature": (2.0, "has no effect with mem_inner_loss_type=ce"),
    "distill_hidden_type": ("cosine", "no effect with mem_inner_loss_type=ce"),
    "inner_loss_mask_mode": "newly_revealed",
    "inner_lr": 0.5,
    "inner_grad_clip": 0.0,
    "inner_rank": 4,
    "inner_alpha": 8.0,
    "inner_dropout": (0.1, "must be 0"),
    "inner_layer_fraction": 0.5,
    "inner_target_modules": "up_proj",
    "inner_adapter_type": "full",
    "pad_unmask_mode": "both",
    "sync_inner": False,
    "inner_gradient_checkpointing": False,
    "scope": "row",
    "inner_target": "prompt",
    "clip_kind": "global",
    "seed": 7,
    "loss_weight_type": "scheduler",
    "loss_norm_type": "sequence",
}


def test_every_field_is_covered_here() -> None:
    assert set(OTHER) == {field.name for field in dataclasses.fields(MemoryConfig)}


@pytest.mark.parametrize("name", sorted(OTHER))
def test_every_field_takes_another_value_or_says_why_not(name: str) -> None:
    value = OTHER[name]
    if isinstance(value, tuple):
        with pytest.raises(ValueError, match=value[1]):
            MemoryConfig(**{name: value[0]})
    elif name == "mask_ratio_epsilon":
        with pytest.warns(UserWarning, match="no effect"):
            MemoryConfig(mask_ratio_epsilon=value)
    else:
        assert getattr(MemoryConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masking_strategy": "random"}, "choose one of pmc, progressive_memory_consistent"),
        ({"inner_loss_type": "mse"}, "choose one of ce, distill"),
        ({"inner_layer_fraction": 0.0}, r"in \(0, 1\]"),
        ({"inner_layer_fraction": -0.1}, r"in \(0, 1\]"),
        ({"inner_layer_fraction": 1.5}, r"in \(0, 1\]"),
        ({"num_inner_steps": 0}, "at least 1"),
        ({"inner_lr": -1.0}, "at least 0"),
        ({"inner_lr": float("inf")}, "finite"),
        ({"inner_loss_mask_mode": "newly_revealed", "num_inner_steps": 1}, "has no effect with mem_num_inner_steps=1"),
        ({"clip_kind": "global", "inner_grad_clip": 0.0}, "has no effect with mem_inner_grad_clip=0"),
        ({"inner_grad_clip": -1.0}, "at least 0"),
        ({"progressive_consistent_start_scale": 0.5}, "at least 1"),
        ({"progressive_consistent_start_scale": float("inf")}, "finite"),
        ({"inner_alpha": float("inf")}, "finite"),
        ({"num_inner_steps": 2.5}, "an integer"),
        ({"inner_rank": 1.5}, "an integer"),
        ({"inner_loss_type": "distill", "progressive_consistent_start_scale": 1.0}, "start_scale=1.0"),
        (
            {"inner_loss_type": "distill", "masking_strategy": "progressive_memory", "prompt_mask_ratio": 0.8},
            "no effect with mem_prompt_mask_ratio=0.8",
        ),
        ({"inner_grad_clip": float("nan")}, "finite"),
        ({"inner_loss_mask_mode": "newly_revealed", "progressive_consistent_start_scale": 1.0}, "start_scale=1.0"),
        ({"inner_target_modules": " , "}, "at least one role"),
        ({"distill_temperature": 2.0, "inner_loss_type": "distill_hidden"}, "no effect with mem_inner_loss_type=disti"),
        ({"distill_hidden_type": "cosine", "inner_loss_type": "distill"}, "no effect with mem_inner_loss_type=distill"),
        ({"inner_loss_mask_mode": "newly_revealed", "inner_target": "disjoint"}, "no effect with mem_inner_target=dis"),
        ({"inner_loss_mask_mode": "newly_revealed", "masking_strategy": "no_progressive"}, "masking_strategy=no_prog"),
        ({"num_inner_steps": 3, "masking_strategy": "pre_only"}, "no effect with mem_masking_strategy=pre_only"),
        ({"num_inner_steps": 3, "masking_strategy": "no_progressive"}, "no effect with mem_masking_strategy=no_prog"),
        ({"progressive_consistent_start_scale": 2.0, "masking_strategy": "progressive_memory"}, "=progressive_memory"),
        ({"progressive_consistent_start_scale": 2.0, "masking_strategy": "no_progressive"}, "=no_progressive"),
        ({"progressive_consistent_start_scale": 1.0, "inner_target": "disjoint"}, "masks a share of 1 - 1/s"),
        ({"masking_strategy": "pre_only", "inner_target": "disjoint"}, "no effect with mem_inner_target=disjoint"),
        ({"pad_unmask_mode": "inner", "inner_target": "prompt"}, "no effect with mem_inner_target=prompt"),
        ({"inner_rank": 4, "inner_adapter_type": "full"}, "no effect with mem_inner_adapter_type=full"),
        ({"inner_alpha": 8.0, "inner_adapter_type": "full"}, "no effect with mem_inner_adapter_type=full"),
        ({"prompt_mask_ratio": 0.9, "masking_strategy": "progressive_memory"}, "above 0.8"),
    ],
)
def test_bad_values_are_refused_in_one_line(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        MemoryConfig(**settings)
    assert "\n" not in str(error.value) and next(iter(settings)) in str(error.value)


def test_alias() -> None:
    assert MemoryConfig(masking_strategy="progressive_memory_consistent").masking_strategy == "pmc"


def test_flags_are_the_fields_with_a_prefix(tmp_path) -> None:
    names = {name for name, _, _ in flag_fields()}
    fields = {f.name for f in dataclasses.fields(MemoryConfig)} - {"loss_weight_type", "loss_norm_type"}
    assert names == {f"mem_{name}" for name in fields}
    assert names <= {f.name for f in dataclasses.fields(MemDLMConfig)}
    args = MemDLMConfig(
        output_dir=str(tmp_path), use_cpu=True, mem_enabled=True, mem_inner_lr=0.3, loss_weight_type="uniform"
    )  # pyright: ignore
    assert args.memory().inner_lr == 0.3 and args.memory().loss_weight_type == "uniform"
    with pytest.raises(ValueError, match="mem_inner_lr, mem_seed has no effect without --mem_enabled True"):
        MemDLMConfig(output_dir=str(tmp_path), use_cpu=True, mem_seed=3, mem_inner_lr=0.3)  # pyright: ignore
    with pytest.raises(ValueError, match="mem_inner_rank must be an integer of at least 1"):
        MemDLMConfig(output_dir=str(tmp_path), use_cpu=True, mem_inner_rank=0)
