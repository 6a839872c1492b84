"""Settings: ranges, combinations without effect, defaults, the guard of output folders."""

import dataclasses
import logging

import pytest
import torch

from dllm.utils import (
    DataArguments,
    InputError,
    ModelArguments,
    TrainingArguments,
    initial_training_setup,
    print_args_main,
    resolve_with_base_env,
)

MODEL = ModelArguments("m")
DATA = DataArguments("d")


@pytest.fixture(autouse=True)
def _levels_stay():
    loggers = [logging.getLogger(name) for name in ("dllm", "memdlm", "transformers")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("kind", "options", "part"),
    [
        (ModelArguments, {"dtype": "half"}, "--dtype 'half' is unknown; allowed: auto, float32"),
        (ModelArguments, {"lora": True, "lora_r": 0}, "--lora_r is 0 but must be at least 1"),
        (ModelArguments, {"lora": True, "lora_alpha": 0}, "--lora_alpha is 0 but must be above 0"),
        (ModelArguments, {"lora": True, "lora_dropout": 1.0}, r"--lora_dropout is 1.0 but must be in \[0, 1\)"),
        (ModelArguments, {"lora": True, "target_modules": " "}, "--target_modules is empty"),
        (ModelArguments, {"lora": True, "bias": "some"}, "--bias 'some' is unknown; allowed: none, all, lora_only"),
        (ModelArguments, {"lora_r": 8}, "--lora_r has no effect without --lora True"),
        (ModelArguments, {"target_modules": "q_proj"}, "--target_modules has no effect without --lora True"),
        (DataArguments, {"max_length": 1}, "--max_length is 1"),
        (DataArguments, {"truncation": "middle"}, "--truncation 'middle' is unknown; allowed: filter, left"),
        (DataArguments, {"num_proc": 0}, "--num_proc is 0"),
        (TrainingArguments, {"per_device_train_batch_size": 0}, "--per_device_train_batch_size is 0"),
        (TrainingArguments, {"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps is 0"),
        (TrainingArguments, {"learning_rate": -1.0}, "--learning_rate is -1.0"),
        (TrainingArguments, {"warmup_steps": -1}, "--warmup_steps is -1"),
        (TrainingArguments, {"num_train_epochs": 0}, "--num_train_epochs is 0"),
        (TrainingArguments, {"save_total_limit": 0}, "--save_total_limit is 0"),
        (TrainingArguments, {"seed": -1}, "--seed is -1"),
        (TrainingArguments, {"remove_unused_columns": True}, "--remove_unused_columns must stay False"),
    ],
)
def test_ranges_and_options_without_effect(kind, options, part, tmp_path):
    first = str(tmp_path)
    with pytest.raises(InputError, match=part) as caught:
        kind(first, **options)
    assert "\n" not in str(caught.value)


def test_empty_data_set_name():
    with pytest.raises(InputError, match="--dataset_args is empty"):
        DataArguments(" ")


def test_training_defaults(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (2e-5, "cosine", 0.1)
    assert args.get_warmup_steps(200) == 20
    assert args.remove_unused_columns is False and args.report_to == [] and args.seed == 42
    assert args.gradient_checkpointing is False and args.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_given_checkpointing_options_stay(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, gradient_checkpointing_kwargs={"preserve_rng_state": True})
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False, "preserve_rng_state": True}


def test_resolve_with_base_env(tmp_path, monkeypatch):
    (tmp_path / "base" / "model").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_with_base_env("model", "SOME_BASE") == "model"
    monkeypatch.setenv("SOME_BASE", str(tmp_path / "base"))
    assert resolve_with_base_env("model", "SOME_BASE") == str(tmp_path / "base" / "model")
    for same in ("here", "org/on-the-hub", str(tmp_path / "nowhere")):
        assert resolve_with_base_env(same, "SOME_BASE") == same
    monkeypatch.setenv("BASE_MODELS_DIR", str(tmp_path / "base"))
    assert ModelArguments("model").model_name_or_path == str(tmp_path / "base" / "model")


def make_checkpoint(folder):
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, folder / name)


def test_setup_resolves_the_checkpoint_and_seeds(tmp_path, capsys):
    args = TrainingArguments(str(tmp_path), use_cpu=True, resume_from_checkpoint="True", seed=5)
    make_checkpoint(tmp_path / "checkpoint-3")
    initial_training_setup(MODEL, DATA, args)
    assert args.resume_from_checkpoint == str(tmp_path / "checkpoint-3")
    drawn = torch.rand(1)
    initial_training_setup(MODEL, DATA, args)  # the resolved path is taken again
    assert torch.rand(1) == drawn
    assert "max_length: 1024" in capsys.readouterr().out
    fresh = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(InputError, match="holds another run"):
        initial_training_setup(MODEL, DATA, fresh)


def test_processes_that_would_train_apart_are_refused(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"2 processes were started but training would use 1: .*--use_cpu True"):
        initial_training_setup(MODEL, DATA, args)


def test_printed_settings(tmp_path, capsys, monkeypatch):
    @dataclasses.dataclass
    class Own(TrainingArguments):
        own_flag: int = 3

    args = Own(str(tmp_path), use_cpu=True, hub_token="secret", weight_decay=0.25)
    print_args_main(MODEL, args)
    shown = capsys.readouterr().out
    assert "Own:\n" in shown and "  own_flag: 3\n" in shown and "  weight_decay: 0.25\n" in shown
    assert "  lora_r: 32\n" in shown and "adam_beta1" not in shown and "secret" not in shown
    monkeypatch.setenv("RANK", "1")
    print_args_main(MODEL)
    assert capsys.readouterr().out == ""
