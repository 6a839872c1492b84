"""MemDLMTrainer: what it adds to MDLMTrainer, and what it must not touch."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from dllm.core.trainers import MDLMConfig, MDLMTrainer
from memdlm import MemDLMConfig, MemDLMTrainer
from memdlm.memory.fast_weights import FastWeights

DEFAULTS = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "logging_steps": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 1,
}
MEMORY = {"mem_enabled": True, "mem_inner_rank": 4, "mem_inner_alpha": 8.0, "mem_inner_layer_fraction": 0.4}


def _memory_trainer(model, tokenizer, rows, folder, **settings) -> MemDLMTrainer:
    args = MemDLMConfig(output_dir=str(folder), **{**DEFAULTS, **settings})
    return MemDLMTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=rows, eval_dataset=rows)


def _plain_trainer(model, tokenizer, rows, folder, **settings) -> MDLMTrainer:
    args = MDLMConfig(output_dir=str(folder), **{**DEFAULTS, **settings})
    return MDLMTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=rows, eval_dataset=rows)


def _losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _assert_same_run(first, second) -> None:
    assert _losses(first) == _losses(second) and _losses(first)
    for name, value in first.lm.state_dict().items():
        assert torch.equal(value, second.lm.state_dict()[name]), name


@pytest.mark.parametrize("settings", [{"mem_enabled": False}, {**MEMORY, "mem_inner_lr": 0.0}], ids=["off", "lr0"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_off_or_learning_rate_zero_is_mdlm_bitwise(
    load, tokenizer, rows, tmp_path, settings: dict, checkpointing: bool
) -> None:
    plain = _plain_trainer(load(), tokenizer, rows, tmp_path / "plain", gradient_checkpointing=checkpointing)
    memory = _memory_trainer(
        load(), tokenizer, rows, tmp_path / "memory", gradient_checkpointing=checkpointing, **settings
    )
    plain.train()
    memory.train()
    _assert_same_run(plain, memory)
    assert plain.evaluate()["eval_loss"] == memory.evaluate()["eval_loss"]


def test_memory_trains_and_logs_both_losses(load, tokenizer, rows, tmp_path) -> None:
    plain = _plain_trainer(load(), tokenizer, rows, tmp_path / "plain", logging_steps=1)
    trainer = _memory_trainer(load(), tokenizer, rows, tmp_path / "memory", logging_steps=1, **MEMORY)
    plain.train()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # Same start, order and masks: taken without memory, the first batch has the plain run's loss (another kernel path:
    # float32).
    assert logs[0]["loss_without_memory"] == pytest.approx(_losses(plain)[0], rel=1e-5)
    for entry in logs:
        assert entry["loss_with_memory"] == pytest.approx(entry["loss"], rel=1e-5)  # one batch a step: the same number
        assert entry["memory_gap"] == entry["loss_without_memory"] - entry["loss_with_memory"] > 0
        assert entry["mem_change"] > 0 and entry["mem_inner_skipped_1"] == 0
        assert {"mem_inner_loss_1", "mem_inner_loss_2", "mem_inner_grad_norm_1", "mem_inner_grad_norm_2"} <= set(entry)
    metrics = trainer.evaluate()
    assert metrics["eval_memory_loss"] < metrics["eval_loss"]


def test_evaluation_loss_is_that_of_the_plain_model(load, tokenizer, rows, tmp_path) -> None:
    plain = _plain_trainer(load(), tokenizer, rows, tmp_path).evaluate()
    with_memory = _memory_trainer(load(), tokenizer, rows, tmp_path, **MEMORY).evaluate()
    assert plain["eval_loss"] == with_memory["eval_loss"] and plain["eval_nll"] == with_memory["eval_nll"]
    again = _memory_trainer(load(), tokenizer, rows, tmp_path, **MEMORY).evaluate()
    assert again["eval_memory_loss"] == with_memory["eval_memory_loss"]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_nothing_of_the_memory_is_trained_or_saved(load, tokenizer, rows, tmp_path, checkpoint, lora: bool) -> None:
    model = load()
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    names = [name for name, _ in model.named_parameters()]
    trainer = _memory_trainer(model, tokenizer, rows, tmp_path, **MEMORY)
    trainer.train()
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(module._forward_hooks for module in model.modules())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    trainer.save_model(str(tmp_path / "final"))
    if lora:
        with safe_open(tmp_path / "final" / "adapter_model.safetensors", "pt") as file:
            assert all("lora_" in key for key in file.keys())  # noqa: SIM118  (safe_open is no mapping)
        return
    with (
        safe_open(checkpoint / "model.safetensors", "pt") as base,
        safe_open(tmp_path / "final" / "model.safetensors", "pt") as saved,
    ):
        assert set(base.keys()) == set(saved.keys())
        assert all(base.get_slice(k).get_shape() == saved.get_slice(k).get_shape() for k in base.keys())  # noqa: SIM118
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, tmp_path / "final"))
    assert before == after
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "final").eval()(ids).logits, trainer.lm.eval()(ids).logits)


def test_activation_checkpointing_is_bitwise_neutral(load, tokenizer, rows, tmp_path) -> None:
    first = _memory_trainer(load(), tokenizer, rows, tmp_path / "a", **MEMORY)
    second = _memory_trainer(load(), tokenizer, rows, tmp_path / "b", gradient_checkpointing=True, **MEMORY)
    first.train()
    second.train()
    _assert_same_run(first, second)


def test_how_often_is_logged_changes_nothing(load, tokenizer, rows, tmp_path) -> None:
    often = _memory_trainer(load(), tokenizer, rows, tmp_path / "a", logging_steps=1, **MEMORY)
    rarely = _memory_trainer(load(), tokenizer, rows, tmp_path / "b", logging_steps=4, **MEMORY)
    often.train()
    rarely.train()
    for name, value in often.lm.state_dict().items():
        assert torch.equal(value, rarely.lm.state_dict()[name]), name


def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(load, tokenizer, rows, tmp_path) -> None:
    settings = {**MEMORY, "max_steps": 7, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    whole = _memory_trainer(load(), tokenizer, rows, tmp_path / "whole", **settings)
    whole.train()
    resumed = _memory_trainer(load(), tokenizer, rows, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    _assert_same_run(whole, resumed)


def test_accumulation_writes_once_per_micro_batch(load, tokenizer, rows, tmp_path, monkeypatch) -> None:
    attached = []
    original = FastWeights.attached
    monkeypatch.setattr(FastWeights, "attached", lambda self: (attached.append(1), original(self))[1])
    trainer = _memory_trainer(
        load(), tokenizer, rows, tmp_path, max_steps=2, gradient_accumulation_steps=3, logging_steps=1, **MEMORY
    )
    trainer.train()
    assert len(attached) == 6 and len(_losses(trainer)) == 2


def test_an_exception_in_a_step_leaves_the_model_clean(load, tokenizer, rows, tmp_path, monkeypatch) -> None:
    model = load()
    trainer = _memory_trainer(model, tokenizer, rows, tmp_path, **MEMORY)

    def explode(*_args, **_kwargs):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(trainer, "weighted_loss", explode)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert not any(module._forward_hooks for module in model.modules())
    assert model.backbone.split_callback is None


def test_a_launcher_that_compiles_is_refused(load, tokenizer, rows, tmp_path, monkeypatch) -> None:
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    AcceleratorState._reset_state()
    try:
        with pytest.raises(ValueError, match="dynamo_backend"):
            _memory_trainer(load(), tokenizer, rows, tmp_path, **MEMORY)
    finally:
        AcceleratorState._reset_state()


def test_combinations_that_cannot_work_are_refused(load, tokenizer, rows, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"torch\.compile cannot be combined"):
        _memory_trainer(load(), tokenizer, rows, tmp_path, torch_compile=True, **MEMORY)
    with pytest.raises(ValueError, match="use alpha_scheduler linear or loss_weight_type uniform"):
        _memory_trainer(load(), tokenizer, rows, tmp_path, alpha_scheduler="cosine", **MEMORY)
    with pytest.raises(ValueError, match=r"leaves none: use at least 0\.2"):
        _memory_trainer(load(), tokenizer, rows, tmp_path, **{**MEMORY, "mem_inner_layer_fraction": 1e-17})
    with pytest.raises(ValueError, match="mem_prompt_mask_ratio has no effect in training"):
        _memory_trainer(load(), tokenizer, rows, tmp_path, mem_prompt_mask_ratio=0.5, **MEMORY)
