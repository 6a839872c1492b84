"""Checkpoints of a training run: whole or not there, on full disks, with the best one kept, and at a signal."""

import contextlib
import datetime
import json
import os
import pathlib
import resource
import signal
import types

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import DeepSpeedPlugin

from dllm.core.trainers import MDLMConfig, MDLMTrainer, checkpointing
from dllm.core.trainers.checkpointing import EXIT_STOPPED
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.checkpoints import STAGING_FOLDER, find_damage, list_checkpoints
from dllm.utils.parsing import InputError

DEFAULTS = {
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,  # of three steps each
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "logging_steps": 2,
    "save_steps": 2,
    "save_total_limit": None,
    "disable_tqdm": True,
    "seed": 1,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """A dense model: these tests train it many times."""
    folder = tmp_path_factory.mktemp("checkpointing") / "tiny"
    return str(make_tiny_checkpoint(folder, "llada", d_model=32, n_layers=2, mlp_hidden_size=32))


@pytest.fixture
def build(small, rows, tmp_path):
    """A function (folder's name, callbacks, **settings) -> a trainer of the same model, rows and seed at every call."""

    def make(name: str = "run", callbacks=(), **settings) -> MDLMTrainer:
        args = MDLMConfig(output_dir=str(tmp_path / name), **{**DEFAULTS, **settings})
        return MDLMTrainer(
            model=load_model(small, dtype="float32"),
            args=args,
            processing_class=load_tokenizer(small),
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=list(callbacks),
        )

    return make


def logged(trainer: MDLMTrainer) -> list:
    """Every loss, gradient norm and evaluation loss of a run, with its step."""
    names = ("loss", "grad_norm", "learning_rate", "eval_loss")
    entries = trainer.state.log_history
    return [(entry["step"], name, entry[name]) for entry in entries for name in names if name in entry]


def assert_same_run(first: MDLMTrainer, second: MDLMTrainer) -> None:
    """Bit for bit: everything logged, and the weights."""
    assert logged(first) == logged(second) and logged(first)
    for name, value in first.lm.state_dict().items():
        assert torch.equal(value, second.lm.state_dict()[name]), name


class At(transformers.TrainerCallback):
    """Calls a function at an event of a step."""

    def __init__(self, event: str, step: int, function) -> None:
        self.step, self.function = step, function
        setattr(self, event, self._call)

    def _call(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.function()


def test_a_checkpoint_has_its_name_only_when_it_is_whole(build, tmp_path, monkeypatch) -> None:
    seen = []
    write = MDLMTrainer._save_rng_state

    def look(self, folder):
        write(self, folder)
        seen.append((sorted(path.name for path in (tmp_path / "run").iterdir()), folder))

    monkeypatch.setattr(MDLMTrainer, "_save_rng_state", look)
    build(max_steps=4).train()
    staging = tmp_path / "run" / STAGING_FOLDER
    assert [folder for _, folder in seen] == [str(staging / "checkpoint-2"), str(staging / "checkpoint-4")]
    assert [names for names, _ in seen] == [[STAGING_FOLDER], [STAGING_FOLDER, "checkpoint-2"]]
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-2", "checkpoint-4"]
    manifest = json.loads((tmp_path / "run" / "checkpoint-4" / "manifest.json").read_text())
    assert (manifest["engine"], manifest["num_processes"], manifest["global_batch"]) == ("ddp", 1, 4)
    there = {path.name for path in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert manifest["files"].keys() == there - {"manifest.json"}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= there


def test_old_checkpoints_go_when_the_new_one_is_there_and_the_best_stays(build, tmp_path) -> None:
    def names():
        return [path.name for path in list_checkpoints(tmp_path / "run")]

    trainer = build(
        max_steps=6,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.0,  # so that the first evaluation stays the best
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    best = str(tmp_path / "run" / "checkpoint-1")
    assert trainer.state.best_model_checkpoint == best
    assert names() == ["checkpoint-6", "checkpoint-1"]
    for path in list_checkpoints(tmp_path / "run"):
        assert json.loads((path / "trainer_state.json").read_text())["best_model_checkpoint"] == best
        assert find_damage(path) is None


def test_the_upload_is_of_the_folder_under_its_name(build, tmp_path, monkeypatch) -> None:
    pushed = []
    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append(folder))
    trainer = build(max_steps=2)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    trainer.train()
    assert pushed == [str(tmp_path / "run" / "checkpoint-2")]


@pytest.fixture
def disk():
    """A function (bytes or None): from now on no file can grow beyond it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0] if size is None else size, limits[1]))

    yield fill
    fill(None)


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_ends_the_run_with_one_line_and_leaves_the_old_checkpoint(build, tmp_path, disk, part) -> None:
    whole = build("whole", max_steps=6)
    whole.train()
    model = (tmp_path / "whole" / "checkpoint-2" / "model.safetensors").stat().st_size
    # The optimizer's two moments take twice the model's bytes.
    size = {"model.safetensors": model // 2, "optimizer.pt": model + 4096}[part]
    trainer = build(max_steps=6, callbacks=[At("on_step_end", 4, lambda: disk(size))])
    with pytest.raises(
        InputError, match=r"checkpoint-4 could not be written .* MiB are free there.: make room"
    ) as caught:
        trainer.train()
    disk(None)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "run" / STAGING_FOLDER) == []
    (old,) = list_checkpoints(tmp_path / "run")
    assert old.name == "checkpoint-2" and find_damage(old) is None
    resumed = build()
    resumed.args.max_steps = 6
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(whole, resumed)


def test_an_error_that_is_not_of_the_disk_keeps_its_name(build, monkeypatch) -> None:
    def fail(self, folder):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(MDLMTrainer, "_save_rng_state", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        build().train()


def test_a_final_folder_is_replaced_as_a_whole_or_stays(build, tmp_path) -> None:
    trainer = build(save_strategy="no")
    final = tmp_path / "run" / "checkpoint-final"
    for name in ("one", "two"):
        with trainer.writing_whole(final) as folder:
            pathlib.Path(folder).mkdir(parents=True)
            (pathlib.Path(folder) / name).write_text(name)
    assert os.listdir(final) == ["two"]
    with pytest.raises(InputError, match="checkpoint-final could not be written"), trainer.writing_whole(final):
        raise OSError(28, "No space left on device")
    assert os.listdir(final) == ["two"]


def test_files_of_an_earlier_try_are_not_published(build, tmp_path) -> None:
    trainer = build(save_strategy="no")
    final = tmp_path / "run" / "checkpoint-final"
    left = tmp_path / "run" / STAGING_FOLDER / "checkpoint-final" / "model-00001-of-00002.safetensors"
    left.parent.mkdir(parents=True)
    left.write_text("of another try")
    with trainer.writing_whole(final) as folder:
        pathlib.Path(folder).mkdir(parents=True)
        (pathlib.Path(folder) / "one").write_text("one")
    assert os.listdir(final) == ["one"]


def test_processes_wait_for_each_other_as_long_as_asked_and_the_group_ends(build, monkeypatch) -> None:
    groups, ended = [], []
    monkeypatch.setattr(checkpointing, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda **settings: groups.append(settings) or "group")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", ended.append)
    stopper = checkpointing.SaveOnSignal()
    stopper.on_train_begin(MDLMConfig(output_dir="unused", use_cpu=True, ddp_timeout=77), None, None)
    stopper.close()
    stopper.close()
    assert groups == [{"backend": "gloo", "timeout": datetime.timedelta(seconds=77)}] and ended == ["group"]


def send(number: signal.Signals):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "event", "step", "saved"),
    [
        (signal.SIGTERM, "on_substep_end", 3, 4),  # between the two batches of step 4
        (signal.SIGUSR1, "on_pre_optimizer_step", 5, 6),  # the last step of the second epoch
        (signal.SIGTERM, "on_save", 2, 3),  # after one checkpoint, before the next step
        (signal.SIGUSR1, "on_evaluate", 6, 7),
    ],
)
def test_a_signal_ends_the_run_at_the_end_of_the_step_and_it_goes_on(
    build, tmp_path, capfd, number, event, step, saved
) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 2}
    whole = build("whole", **settings)
    whole.train()
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)]
    stopped = build(callbacks=[At(event, step, send(number))], **settings)
    with pytest.raises(SystemExit) as caught:
        stopped.train()
    assert caught.value.code == EXIT_STOPPED == 75
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)] == before
    newest = tmp_path / "run" / f"checkpoint-{saved}"
    assert list_checkpoints(tmp_path / "run")[0] == newest and find_damage(newest) is None
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("stopped by")]
    assert said == [
        f"stopped by {number.name} at step {saved} of 9; saved {newest}: go on with --resume_from_checkpoint True"
    ]
    resumed = build(**settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(whole, resumed)


def test_a_signal_while_a_checkpoint_is_written_leaves_that_one_whole(build, tmp_path, monkeypatch) -> None:
    write = MDLMTrainer._save_rng_state

    def disturbed(self, folder):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        write(self, folder)

    monkeypatch.setattr(MDLMTrainer, "_save_rng_state", disturbed)
    with pytest.raises(SystemExit):
        build().train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-2"]
    assert all(find_damage(path) is None for path in list_checkpoints(tmp_path / "run"))


def test_at_the_end_of_an_epoch_its_evaluation_belongs_to_the_checkpoint(build, tmp_path) -> None:
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    whole = build("whole", **settings)
    whole.train()
    stopped = build(callbacks=[At("on_step_begin", 2, send(signal.SIGTERM))], **settings)
    with pytest.raises(SystemExit):
        stopped.train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    resumed = build(**settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(whole, resumed)


@pytest.mark.parametrize(
    ("strategy", "event", "step", "saved"),
    [
        ("steps", "on_step_begin", 1, 2),  # an evaluation follows, which is no better
        ("steps", "on_step_begin", 2, 3),  # at the end of the epoch
        ("epoch", "on_step_begin", 3, 4),
        ("epoch", "on_step_begin", 5, 6),
    ],
)
def test_where_only_better_models_are_saved_a_signal_saves_all_the_same(
    build, tmp_path, capfd, strategy, event, step, saved
) -> None:
    settings = {
        "save_strategy": "best",
        "eval_strategy": strategy,
        "eval_steps": 1,
        "learning_rate": 0.0,  # so that the first evaluation stays the best
        "metric_for_best_model": "eval_loss",
    }
    whole = build("whole", **settings)
    whole.train()
    first = {"steps": 1, "epoch": 3}[strategy]
    assert [path.name for path in list_checkpoints(tmp_path / "whole")] == [f"checkpoint-{first}"]
    with pytest.raises(SystemExit):
        build(callbacks=[At(event, step, send(signal.SIGTERM))], **settings).train()
    newest = tmp_path / "run" / f"checkpoint-{saved}"
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [newest.name, f"checkpoint-{first}"]
    assert find_damage(newest) is None and f"at step {saved} of 9; saved {newest}: " in capfd.readouterr().err
    resumed = build(**settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(whole, resumed)


class Unwilling(transformers.TrainerCallback):
    """Another callback that has the last word, and saves nothing."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_save = False


def test_what_is_not_there_is_not_said_to_be_saved(build, tmp_path, capfd) -> None:
    trainer = build(callbacks=[At("on_step_begin", 3, send(signal.SIGTERM))], save_steps=100)
    trainer.add_callback(Unwilling())
    with pytest.raises(SystemExit):
        trainer.train()
    said = capfd.readouterr().err
    assert f"stopped by SIGTERM at step 4 of 9; there is no {tmp_path}/run/checkpoint-4" in said
    assert "saved" not in said


def test_where_only_the_best_is_kept_the_checkpoint_of_a_signal_is_kept_too(build, tmp_path) -> None:
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "learning_rate": 0.0,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    with pytest.raises(SystemExit):
        build(callbacks=[At("on_step_begin", 3, send(signal.SIGTERM))], **settings).train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-1"]


@pytest.mark.parametrize("settings", [{"save_on_signal": False}, {"save_strategy": "no"}])
def test_switched_off_the_signals_are_the_systems(build, settings) -> None:
    seen = []
    look = At(
        "on_step_end", 1, lambda: seen.append([signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1)])
    )
    build(callbacks=[look], max_steps=1, **settings).train()
    assert seen == [[signal.SIG_DFL, signal.SIG_DFL]]


def test_two_ways_to_save_at_a_signal_are_one_too_many(build) -> None:
    with pytest.raises(InputError, match="--enable_jit_checkpoint has no effect here: use --save_on_signal"):
        build(enable_jit_checkpoint=True)


def test_a_run_at_its_end_takes_no_further_step(build) -> None:
    whole = build(max_steps=5)  # inside the second epoch
    whole.train()
    again = build(max_steps=5)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    assert_same_run(whole, again)


def test_a_checkpoint_of_another_engine_is_refused_before_training(build, tmp_path) -> None:
    build(max_steps=2).train()
    path = tmp_path / "run" / "checkpoint-2" / "manifest.json"
    path.write_text(path.read_text().replace('"ddp"', '"fsdp2"'))
    with pytest.raises(InputError, match="was saved under fsdp2, and this run uses ddp: launch it with the settings"):
        build(max_steps=4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("plugin", "refused"),
    [
        ({"zero_stage": 3, "zero3_save_16bit_model": True}, False),
        ({"zero_stage": 3, "zero3_save_16bit_model": False}, True),
        ({"hf_ds_config": {"zero_optimization": {"stage": 3}}}, True),
        ({"zero_stage": 2, "zero3_save_16bit_model": False}, False),
    ],
)
def test_zero3_that_saves_no_weights_is_refused(build, plugin, refused) -> None:
    trainer = build()
    made = DeepSpeedPlugin(**plugin)
    trainer.accelerator = types.SimpleNamespace(state=types.SimpleNamespace(deepspeed_plugin=made))
    trainer.is_deepspeed_enabled = True
    with pytest.raises(InputError, match="zero3_save_16bit_model: true") if refused else contextlib.nullcontext():
        trainer._refuse_to_save_no_weights()


def test_another_number_of_rows_per_step_is_told(build, caplog) -> None:
    build(max_steps=2).train()
    with caplog.at_level("WARNING"):
        build(max_steps=3, gradient_accumulation_steps=1).train(resume_from_checkpoint=True)
    assert "was saved with 4 rows per step and this run takes 2" in caplog.text


def test_what_a_killed_run_left_half_written_is_removed_at_the_next_start(build, tmp_path) -> None:
    half = tmp_path / "run" / STAGING_FOLDER / "checkpoint-2"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_text("half")
    build(max_steps=1, save_steps=1).train()
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-1"]
