"""What the training log says of a run, and where it goes: tokens per second, memory, event files, trackers."""

import importlib.util
import re

import pytest
import torch

from dllm.core.trainers import MDLMConfig, MDLMTrainer
from dllm.core.trainers.meters import BatchCounts
from dllm.models.auto import load_model, load_tokenizer
from dllm.utils import TrainingArguments, parse_args
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
def train(checkpoint, rows, tmp_path):
    """A function (kind, rows, **settings) -> a trainer that has trained, and the training entries of its log."""

    def run(kind="mdlm", rows=rows, **settings):
        trainer_class, config_class, own = KINDS[kind]
        defaults = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1, "save_strategy": "no"}
        defaults |= {"use_cpu": True, "disable_tqdm": True, **own, **settings}
        trainer = trainer_class(
            model=load_model(str(checkpoint), dtype="float32"),
            args=config_class(output_dir=str(tmp_path), **defaults),
            processing_class=load_tokenizer(str(checkpoint)),
            train_dataset=rows,
            eval_dataset=rows[:2],
        )
        trainer.train()
        return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_per_second_are_the_tokens_before_padding(train, rows, kind: str, monkeypatch) -> None:
    # Rows of 20, 19, ..., 9 tokens: padding must not count.
    uneven = [
        {**row, "input_ids": row["input_ids"][: 20 - index], "labels": row["labels"][: 20 - index]}
        for index, row in enumerate(rows)
    ]
    counted = []
    original = BatchCounts.read

    def read(self, gather):
        counted.append(original(self, gather))
        return counted[-1]

    monkeypatch.setattr(BatchCounts, "read", read)
    settings = {"gradient_accumulation_steps": 3, "logging_steps": 2, "max_steps": 4}
    trainer, logs = train(kind, uneven, **settings)
    assert len(logs) == len(counted) == 2
    if kind != "relay":  # a rollout keeps rows that are not finished
        # Two steps of six rows are one epoch: every row once.
        assert [entry["num_tokens"] for entry in counted] == [sum(20 - index for index in range(12))] * 2
    for entry, counts in zip(logs, counted, strict=True):
        # Each log covers two steps; step_seconds is rounded to 4 digits behind the point.
        expected = counts["num_tokens"] / (2 * entry["step_seconds"])
        assert entry["tokens_per_second"] == pytest.approx(expected, rel=6e-5 / entry["step_seconds"])
        assert entry["peak_memory_mib"] > 50
    assert trainer.state.global_step == 4


def test_a_rollout_counts_the_tokens_of_its_rows(train, rows, monkeypatch) -> None:
    lengths = []
    original = BatchCounts.add

    def add(self, batch):
        lengths.append(batch["num_tokens"].tolist())
        original(self, batch)

    monkeypatch.setattr(BatchCounts, "add", add)
    train("relay", [{**row, "input_ids": row["input_ids"][:15], "labels": row["labels"][:15]} for row in rows])
    assert lengths == [[15, 15]] * 4


def test_counts_are_summed_over_ranks_and_memory_is_the_largest() -> None:
    counts = BatchCounts(torch.device("cpu"))
    counts.add({"num_tokens": torch.tensor([5, 7]), "num_maskable": torch.tensor([0, 0])})
    counts.add({"num_tokens": torch.tensor([1, 2]), "num_maskable": torch.tensor([0, 3])})
    own = []

    def gather(values: torch.Tensor) -> torch.Tensor:
        own.append(values.clone())
        return torch.cat([values, torch.tensor([[100, 2, 2**60]])])

    found = counts.read(gather)
    assert own[0].shape == (1, 3) and own[0][0, :2].tolist() == [15, 1]
    assert found == {"num_tokens": 115, "empty_batches": 3, "peak_memory_bytes": 2**60}
    # Tokens start anew, empty batches go on.
    assert counts.read(gather)["num_tokens"] == 100 and own[1][0, :2].tolist() == [0, 1]


def test_tensorboard_gets_every_number_of_the_log(train, tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer, logs = train("memory", report_to="tensorboard", eval_strategy="steps", eval_steps=2)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    written = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    expected: dict[str, dict[int, float]] = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if name != "step" and isinstance(value, (int, float)):
                tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                expected.setdefault(tag, {})[entry["step"]] = value
    assert len(logs) == 4
    assert expected.keys() >= {"train/loss", "train/tokens_per_second", "train/peak_memory_mib", "train/mem_change"}
    assert expected.keys() >= {"train/memory_gap", "eval/nll", "eval/memory_loss"}
    assert written.keys() == expected.keys()
    for tag, values in expected.items():
        # Event files hold float32.
        assert written[tag] == pytest.approx(values, rel=1e-6), tag


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("wandb", "--report_to wandb needs a package that is not installed: pip install wandb"),
        ("paper", "--report_to 'paper' is unknown; allowed: none, all, .*tensorboard.*wandb.*"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_one_line_before_anything_is_loaded(tmp_path, capsys, tracker, message):
    if importlib.util.find_spec(tracker) is not None:
        pytest.skip(f"{tracker} is installed")
    with pytest.raises(SystemExit) as stopped:
        words = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--report_to", tracker]
        parse_args(TrainingArguments, args=words)
    assert stopped.value.code == 2
    assert re.fullmatch(f".*{message}\n", capsys.readouterr().err)
