"""MDLMTrainer: objective, accumulation, resumption, metrics, bad input."""

import math

import datasets
import pytest
import torch

from dllm.core.trainers import MDLMConfig, MDLMTrainer


def _config(folder, **settings) -> MDLMConfig:
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
    }
    return MDLMConfig(**{**defaults, **settings})


def _trainer(model, tokenizer, rows, folder, **settings) -> MDLMTrainer:
    return MDLMTrainer(
        model=model, args=_config(folder, **settings), processing_class=tokenizer, train_dataset=rows, eval_dataset=rows
    )


def _weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.lm.state_dict().items()}


def _assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_logged_loss_is_the_formula(load, tokenizer, rows, tmp_path) -> None:
    model = load()
    trainer = _trainer(model, tokenizer, rows, tmp_path, max_steps=1, per_device_train_batch_size=12)
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["noised_ids"]).logits.double()
    log_p = torch.log_softmax(logits, dim=-1)
    total = 0.0
    for b in range(12):
        for p in range(20):
            if batch["is_masked"][b, p]:
                total -= float(log_p[b, p, batch["input_ids"][b, p]]) / (float(batch["t"][b]) + 1e-6)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # One batch holds all rows, so the order does not matter; logits are float32, and the log rounds to float32.
    assert logged == pytest.approx([total / (12 * 12)], rel=1e-5)


def test_loss_falls_when_rows_repeat(load, tokenizer, rows, tmp_path) -> None:
    trainer = _trainer(load(), tokenizer, rows[:4], tmp_path, max_steps=80)
    before = trainer.evaluate()["eval_nll"]
    trainer.train()
    assert trainer.evaluate()["eval_nll"] < 0.5 * before


def test_two_accumulated_batches_of_two_are_one_of_four(load, tokenizer, rows, tmp_path) -> None:
    results = []
    for settings in (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ):
        trainer = _trainer(load().double(), tokenizer, rows, tmp_path, max_steps=3, optim="sgd", **settings)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, _weights(trainer)))
    # Every row has as many maskable positions, so the mean of two means is the mean; float64 up to the order of sums.
    # The loss weights are float32.
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, value in results[0][1].items():
        assert torch.allclose(value, results[1][1][name], rtol=1e-6, atol=1e-9), name


def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(load, tokenizer, rows, tmp_path) -> None:
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4}  # step 4 lies inside the second epoch
    whole = _trainer(load(), tokenizer, rows, tmp_path / "whole", **settings)
    whole.train()
    resumed = _trainer(load(), tokenizer, rows, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    _assert_equal(_weights(whole), _weights(resumed))
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    again = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert losses == again and len(losses) == 7


def test_masks_change_from_epoch_to_epoch(load, tokenizer, rows, tmp_path) -> None:
    trainer = _trainer(load(), tokenizer, rows, tmp_path, max_steps=6, learning_rate=0.0)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(losses)) == 6  # the weights stand still, so only masks and order differ


def test_evaluation_is_repeatable_and_perplexity_is_exp_nll(load, tokenizer, rows, tmp_path) -> None:
    trainer = _trainer(load(), tokenizer, rows, tmp_path, per_device_eval_batch_size=12)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"] and first["eval_nll"] == second["eval_nll"]
    assert first["eval_ppl"] == pytest.approx(math.exp(first["eval_nll"]), rel=1e-6)  # float32 exp
    # One batch: the mean over batches is the mean over tokens.
    assert first["eval_loss"] == pytest.approx(first["eval_nll"], rel=1e-6)
    logged = [entry for entry in trainer.state.log_history if "eval_nll" in entry]
    assert logged and logged[0]["eval_nll"] == first["eval_nll"]


def test_metrics_weigh_by_tokens_not_by_batches(load, tokenizer, rows, tmp_path) -> None:
    uneven = [*rows[:3], {**rows[3], "labels": [-100] * 18 + rows[3]["input_ids"][18:]}]
    single = _trainer(load(), tokenizer, uneven, tmp_path, per_device_eval_batch_size=4).evaluate()
    split = _trainer(load(), tokenizer, uneven, tmp_path, per_device_eval_batch_size=1).evaluate()
    # Float32 sums in another order.
    assert single["eval_nll"] == pytest.approx(split["eval_nll"], rel=1e-5)


def test_a_batch_with_nothing_maskable_is_counted_and_changes_nothing(load, tokenizer, rows, tmp_path) -> None:
    empty = [{**row, "labels": [-100] * 20} for row in rows[:4]]
    trainer = _trainer(load(), tokenizer, empty, tmp_path, max_steps=2, optim="sgd")
    before = _weights(trainer)
    trainer.train()
    _assert_equal(before, _weights(trainer))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logs] == [0.0, 0.0] and logs[-1]["empty_batches"] == 2


def test_likelihood_does_not_depend_on_how_the_loss_is_weighted(load, tokenizer, rows, tmp_path) -> None:
    expected = _trainer(load(), tokenizer, rows, tmp_path).evaluate()["eval_nll"]
    for settings in ({"loss_weight_type": "uniform"}, {"loss_norm_type": "sequence"}, {"loss_norm_type": "batch"}):
        assert _trainer(load(), tokenizer, rows, tmp_path, **settings).evaluate()["eval_nll"] == expected


def test_an_evaluation_that_broke_off_leaves_nothing_behind(load, tokenizer, rows, tmp_path, monkeypatch) -> None:
    trainer = _trainer(load(), tokenizer, rows, tmp_path, per_device_eval_batch_size=4)
    expected = trainer.evaluate()["eval_nll"]
    original, calls = trainer.row_nll, []

    def break_off(*inputs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a worker died, say")
        return original(*inputs)

    monkeypatch.setattr(trainer, "row_nll", break_off)
    with pytest.raises(RuntimeError, match="a worker died"):
        trainer.evaluate()
    assert trainer.evaluate()["eval_nll"] == expected


def test_a_loss_that_is_not_finite_shows_in_the_metrics(load, tokenizer, rows, tmp_path) -> None:
    model = load()
    model.lm_head.weight.data[:] = float("nan")
    assert math.isnan(_trainer(model, tokenizer, rows, tmp_path).evaluate()["eval_nll"])


def test_rows_without_ids_are_numbered(load, tokenizer, rows, tmp_path) -> None:
    bare = [{key: value for key, value in row.items() if key != "example_id"} for row in rows]
    named = _trainer(load(), tokenizer, rows, tmp_path).evaluate()
    assert _trainer(load(), tokenizer, bare, tmp_path).evaluate()["eval_nll"] == named["eval_nll"]


def test_router_loss_is_added(load, tokenizer, rows, tmp_path) -> None:
    plain, balanced = load(), load()
    balanced.config.output_router_logits = True
    first = _trainer(plain, tokenizer, rows, tmp_path).evaluate()["eval_loss"]
    second = _trainer(balanced, tokenizer, rows, tmp_path).evaluate()["eval_loss"]
    assert second > first


def test_bad_input_is_refused(load, tokenizer, rows, tmp_path) -> None:
    import copy

    maskless = copy.deepcopy(tokenizer)
    maskless.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        _trainer(load(), maskless, rows, tmp_path)
    with pytest.raises(ValueError, match="reentrant"):
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        _trainer(load(), tokenizer, rows, tmp_path, **settings)
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match="an evaluation needs rows with a length"):
        _trainer(load(), tokenizer, stream, tmp_path)
    with pytest.raises(ValueError, match="label_smoothing_factor has no effect"):
        _trainer(load(), tokenizer, rows, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="compute_metrics has no effect"):
        MDLMTrainer(load(), _config(tmp_path), processing_class=tokenizer, compute_metrics=print)
    with pytest.raises(ValueError, match="unknown masking schedule 'square'"):
        _config(tmp_path, alpha_scheduler="square")
    with pytest.raises(ValueError, match="time_epsilon must lie in"):
        _config(tmp_path, time_epsilon=0.0)
    with pytest.raises(TypeError, match="no model of dllm"):
        _trainer(torch.nn.Linear(2, 2), tokenizer, rows, tmp_path)
