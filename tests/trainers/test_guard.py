"""The guard on the training loss: where a run stops, what it keeps, and what it lets pass."""

import json
import types

import pytest
import torch
from safetensors.torch import load_file

from dllm.core.trainers import MDLMConfig, MDLMTrainer
from dllm.core.trainers import guard as guard_module
from dllm.core.trainers.guard import NonFiniteGuard, NonFiniteLoss, flatten_batch
from dllm.models.auto import load_model, load_tokenizer
from memdlm import MemDLMConfig, MemDLMTrainer
from memdlm.relay import RelayTrainer, RelayTrainerConfig

KINDS = {
    "mdlm": (MDLMTrainer, MDLMConfig, {}),
    "memory": (
        MemDLMTrainer,
        MemDLMConfig,
        {"mem_enabled": True, "mem_inner_rank": 2, "mem_inner_layer_fraction": 0.4},
    ),
    "relay": (RelayTrainer, RelayTrainerConfig, {"relay_threshold": 0.05, "relay_block_size": 4}),
}


@pytest.fixture
def build(checkpoint, rows, tmp_path):
    """A function (kind, folder name, **settings) -> a trainer of four steps with a checkpoint after each."""

    def make(kind="mdlm", name="run", **settings):
        trainer_class, config_class, own = KINDS[kind]
        defaults = {
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_steps": 1,
            "save_total_limit": None,
            "save_only_model": True,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        args = config_class(output_dir=str(tmp_path / name), **{**defaults, **own, **settings})
        model = load_model(str(checkpoint), dtype="float32")
        return trainer_class(
            model=model, args=args, processing_class=load_tokenizer(str(checkpoint)), train_dataset=rows
        )

    return make


def _spoil(trainer, micro_batch: int, value: float) -> list[dict]:
    """From now on the loss of so many micro-batches later is `value`; the list gets every batch that is trained on."""
    seen: list[dict] = []
    original = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        seen.append(inputs)
        loss = original(model, inputs, *args, **kwargs)
        return loss * value if len(seen) == micro_batch else loss

    trainer.compute_loss = compute_loss
    return seen


def _weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.lm.state_dict().items()}


def _saved(folder, step: int) -> tuple[dict, dict]:
    where = folder / f"nonfinite-{step}-rank0"
    return load_file(where / "batch.safetensors"), json.loads((where / "report.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_the_run_stops_before_the_weights_move(build, tmp_path, kind: str, value: float) -> None:
    shorter = build(kind, "shorter", max_steps=2)
    shorter.train()
    trainer = build(kind)
    seen = _spoil(trainer, 3, value)
    with pytest.raises(NonFiniteLoss, match=r"not finite in step 3 .*nonfinite-3-rank0") as stopped:
        trainer.train()
    assert "\n" not in str(stopped.value) and len(seen) == 3
    for name, expected in _weights(shorter).items():
        assert torch.equal(expected, trainer.lm.state_dict()[name]), name
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]

    tensors, report = _saved(tmp_path / "run", 3)
    flat = {name: leaf for name, leaf in flatten_batch(seen[2]).items() if isinstance(leaf, torch.Tensor)}
    assert tensors.keys() >= {"input_ids", "noised_ids", "is_masked", "loss_positions"}
    assert tensors.keys() == flat.keys()
    for name, tensor in flat.items():
        assert torch.equal(tensors[name], tensor), name
    assert report["step"] == 3 and report["rank"] == 0 and report["micro_batch"] == 0
    assert report["losses"] == [repr(value)] and report["nonfinite_weights"] == []
    assert report["example_id"] == seen[2]["example_id"].tolist()
    assert report["num_masked"] == seen[2]["is_masked"].sum(dim=1).tolist()
    assert report["t"] == pytest.approx(seen[2]["t"].tolist())


def test_one_bad_batch_among_accumulated_ones_is_the_one_that_is_saved(build, tmp_path) -> None:
    trainer = build(per_device_train_batch_size=1, gradient_accumulation_steps=3)
    seen = _spoil(trainer, 5, float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"in step 2 \(1 batch"):
        trainer.train()
    tensors, report = _saved(tmp_path / "run", 2)
    assert len(seen) == 6 and report["micro_batch"] == 1 and report["losses"][1] == "nan"
    assert report["example_id"] == seen[4]["example_id"].tolist() != seen[3]["example_id"].tolist()
    assert torch.equal(tensors["noised_ids"], seen[4]["noised_ids"])


def test_a_guard_that_is_off_lets_it_pass(build, tmp_path) -> None:
    trainer = build(stop_on_nonfinite_loss=False, save_strategy="no")
    seen = _spoil(trainer, 2, float("nan"))
    trainer.train()
    assert len(seen) == 4 and not list((tmp_path / "run").glob("nonfinite-*"))


def test_a_second_run_of_the_trainer_starts_clean(build) -> None:
    trainer = build(save_strategy="no")
    _spoil(trainer, 1, float("nan"))
    with pytest.raises(NonFiniteLoss):
        trainer.train()
    trainer.train()
    assert trainer.state.global_step == 4


def _guard(folder) -> NonFiniteGuard:
    return NonFiniteGuard(str(folder), torch.device("cpu"), lambda count: count)


def _batch() -> dict:
    ones = torch.ones(2, 3, dtype=torch.int64)
    return {"input_ids": ones, "is_masked": ones.bool(), "t": torch.ones(2), "example_id": torch.arange(2)}


def test_infinite_gradients_of_a_finite_loss_are_not_its_business(tmp_path) -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), torch.inf)  # as under float16, before the scaler lowers its factor
    guard = _guard(tmp_path)
    guard.add(torch.tensor(1.0), _batch())
    guard.on_pre_optimizer_step(None, types.SimpleNamespace(global_step=0, epoch=0.0), None, model=model)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_broken_already_are_named(tmp_path) -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.data[0] = torch.nan
    guard = _guard(tmp_path)
    guard.add(torch.tensor(torch.nan), _batch())
    with pytest.raises(NonFiniteLoss):
        guard.on_pre_optimizer_step(None, types.SimpleNamespace(global_step=6, epoch=0.5), None, model=model)
    report = _saved(tmp_path, 7)[1]
    assert report["nonfinite_weights"] == ["bias"] and report["epoch"] == 0.5


def test_under_zero3_nothing_is_claimed_about_the_weights(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(guard_module, "is_deepspeed_zero3_enabled", lambda: True)
    model = torch.nn.Linear(2, 2)
    model.weight.data = torch.empty(0)  # what ZeRO-3 leaves in its place
    guard = _guard(tmp_path)
    guard.add(torch.tensor(torch.nan), _batch())
    with pytest.raises(NonFiniteLoss):
        guard.on_pre_optimizer_step(None, types.SimpleNamespace(global_step=0, epoch=0.0), None, model=model)
    assert _saved(tmp_path, 1)[1]["nonfinite_weights"] is None


def test_a_batch_that_cannot_be_saved_does_not_hide_the_loss(tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    guard = _guard(blocked)  # no folder can be made below a file
    guard.add(torch.tensor(torch.nan), _batch())
    state = types.SimpleNamespace(global_step=0, epoch=0.0)
    with pytest.raises(NonFiniteLoss, match="could not be saved under"):
        guard.on_pre_optimizer_step(None, state, None, model=torch.nn.Linear(1, 1))


def test_nested_batches_are_flattened_by_dotted_name() -> None:
    nested = {"a": 1, "b": {"c": [2, {"d": 3}]}}
    assert flatten_batch(nested) == {"a": 1, "b.c.0": 2, "b.c.1.d": 3}
