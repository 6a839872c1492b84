"""Training with every inner target and scope, and what the log and the warnings say."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dllm.core.trainers import MDLMConfig, MDLMTrainer
from memdlm import MemDLMConfig, MemDLMTrainer

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


def _trainer(model, tokenizer, rows, folder, **settings) -> MemDLMTrainer:
    args = MemDLMConfig(output_dir=str(folder), **{**DEFAULTS, **MEMORY, **settings})
    return MemDLMTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=rows, eval_dataset=rows)


def _logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("scope", ["batch", "row"])
@pytest.mark.parametrize("target", ["response", "prompt", "disjoint"])
def test_every_target_and_scope_trains_and_says_what_it_did(
    load, tokenizer, rows, tmp_path, target: str, scope: str
) -> None:
    settings = {"mem_inner_target": target, "mem_scope": scope, "gradient_accumulation_steps": 2, "mem_inner_lr": 3.0}
    trainer = _trainer(load(), tokenizer, rows, tmp_path, **settings)
    before = {name: value.clone() for name, value in trainer.lm.state_dict().items()}
    args = MDLMConfig(output_dir=str(tmp_path / "plain"), **DEFAULTS)
    plain = MDLMTrainer(model=load(), args=args, processing_class=tokenizer, train_dataset=rows, eval_dataset=rows)
    expected, metrics = plain.evaluate(), trainer.evaluate()
    # Evaluation is without memory, whatever the target; beside it stands the loss with one.
    assert metrics["eval_loss"] == expected["eval_loss"] and metrics["eval_nll"] == expected["eval_nll"]
    assert metrics["eval_memory_loss"] != metrics["eval_loss"]
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.lm.state_dict().items())
    assert len(_logs(trainer)) == 2
    for entry in _logs(trainer):
        assert entry["memory_gap"] == entry["loss_without_memory"] - entry["loss_with_memory"] != 0
        assert 0 < entry["mem_time_share"] < 1
        for step in (1, 2):
            names = ("mem_inner_loss", "mem_inner_grad_norm", "mem_inner_change")
            assert all(entry[f"{name}_{step}"] > 0 for name in names) and entry[f"mem_inner_skipped_{step}"] < 1


@pytest.mark.parametrize("objective", ["distill", "distill_reverse", "distill_hidden"])
def test_every_objective_trains(load, tokenizer, rows, tmp_path, objective: str) -> None:
    trainer = _trainer(load(), tokenizer, rows, tmp_path, mem_inner_loss_type=objective)
    trainer.train()
    assert all(entry["mem_change"] > 0 for entry in _logs(trainer))


def test_row_scope_on_response_targets_warns(load, tokenizer, rows, tmp_path, caplog) -> None:
    def warnings(**settings) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="memdlm"):
            _trainer(load(), tokenizer, rows, tmp_path, **settings)
        return [record.getMessage() for record in caplog.records if "mem_scope=row" in record.getMessage()]

    (message,) = warnings(mem_scope="row")
    assert "docs/memory.md" in message and "\n" not in message
    assert not warnings() and not warnings(mem_scope="row", mem_inner_target="disjoint")
    assert not warnings(mem_scope="row", mem_inner_target="prompt")


def test_a_loss_without_memory_that_rises_is_told_once(load, tokenizer, rows, tmp_path, caplog) -> None:
    """One memory per row, strong enough to store two-token answers: the model unlearns them."""
    generator = torch.Generator().manual_seed(3)
    short = []
    for index in range(16):
        ids = torch.randint(20, 200, (8,), generator=generator).tolist()
        short.append({"input_ids": ids, "labels": [-100] * 6 + ids[6:], "example_id": index})
    settings = {"mem_scope": "row", "mem_inner_lr": 1.0, "mem_num_inner_epochs": 4, "learning_rate": 3e-3}
    settings.update({"max_steps": 120, "logging_steps": 2})
    trainer = _trainer(load(), tokenizer, short, tmp_path, time_epsilon=0.5, **settings)
    with caplog.at_level(logging.WARNING, logger="memdlm"):
        trainer.train()
    told = [record for record in caplog.records if "rises while the loss with memory falls" in record.getMessage()]
    first, last = _logs(trainer)[10], _logs(trainer)[-1]
    assert last["loss_with_memory"] < first["loss_with_memory"]
    assert last["loss_without_memory"] > 1.5 * first["loss_without_memory"]
    assert len(told) == 1


def test_a_step_that_is_not_finite_is_counted_in_the_log(load, tokenizer, rows, tmp_path) -> None:
    trainer = _trainer(load(), tokenizer, rows, tmp_path, logging_steps=1, max_steps=2, mem_scope="row")
    original = trainer.memory.hidden_at
    calls = []

    def spoil_one_row(hidden, layer_inputs, positions):
        result = original(hidden, layer_inputs, positions)
        calls.append(1)
        # The second inner step of the first batch (its first readout is the loss without memory).
        spoiled = (positions // hidden.shape[1] == 1) & (len(calls) == 3)
        return torch.where(spoiled[:, None], torch.inf, result)

    trainer.memory.hidden_at = spoil_one_row
    trainer.train()
    first, second = _logs(trainer)
    assert first["mem_inner_skipped_2"] == 0.25 and first["mem_nonfinite_rows"] == 1.0
    assert second["mem_inner_skipped_2"] == 0 and "mem_nonfinite_rows" not in second
    assert all(bool(value.isfinite().all()) for value in trainer.lm.state_dict().values())


def test_both_losses_are_taken_at_logged_steps_alone(load, tokenizer, rows, tmp_path) -> None:
    settings = {"max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    trainer = _trainer(load(), tokenizer, rows, tmp_path, **settings)
    original, calls = trainer.memory.readout, []
    trainer.memory.readout = lambda *inputs: (calls.append(trainer.state.global_step), original(*inputs))[1]
    trainer.train()
    # Two batches a step, with and without memory; the steps that end at 2 and at 4.
    assert calls == [1, 1, 1, 1, 3, 3, 3, 3]


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_the_share_of_time_is_that_of_prefixes_and_writes(load, tokenizer, rows, tmp_path, strategy: str) -> None:
    trainer = _trainer(load(), tokenizer, rows, tmp_path, max_steps=3, logging_strategy=strategy)
    entered = []
    original = type(trainer._timer).__enter__
    timer = trainer._timer

    class Counting(type(timer)):
        def __enter__(self) -> None:
            entered.append(1)
            original(self)

    timer.__class__ = Counting
    trainer.train()
    assert len(entered) == (2 * 3 if strategy == "steps" else 0)  # nothing is kept that nobody reads


def test_dropout_makes_no_gap(load, tokenizer, rows, tmp_path) -> None:
    model = get_peft_model(load(), LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trainer = _trainer(model, tokenizer, rows, tmp_path, mem_inner_lr=0.0)
    trainer.train()
    assert all(entry["memory_gap"] == 0 for entry in _logs(trainer)) and len(_logs(trainer)) == 2


def test_an_alias_of_the_default_is_no_change(tmp_path) -> None:
    alias = "progressive_memory_consistent"
    assert not MemDLMConfig(output_dir=str(tmp_path), use_cpu=True, mem_masking_strategy=alias).memory().enabled


def test_settings_of_the_prompt_reach_it(load, tokenizer, rows, tmp_path) -> None:
    settings = {"mem_inner_target": "prompt", "mem_prompt_mask_ratio": 0.5, "mem_masking_strategy": "no_progressive"}
    trainer = _trainer(load(), tokenizer, rows, tmp_path, **settings)
    assert trainer.memory_config.loss_weight_type == "uniform"  # as at inference
    assert trainer.args.loss_weight_type == "scheduler"
    (step,) = trainer.data_collator(rows)["memory_plan"]["steps"]
    assert torch.equal(step["t"], torch.full((len(rows),), 0.5))
    assert 0 < len(step["loss_positions"]) < 8 * len(rows)  # some of the eight prompt tokens of each row
    progressive = _trainer(
        load(),
        tokenizer,
        rows,
        tmp_path,
        mem_masking_strategy="progressive_memory",
        mem_prompt_mask_ratio=0.5,
    )
    assert float(progressive.data_collator(rows)["memory_plan"]["steps"][-1]["t"][0]) == 0.5
