"""A training run on packed rows is the run on their documents as rows."""

import pytest
import torch

from dllm.core.trainers.bd3lm import BD3LMConfig, BD3LMTrainer
from dllm.data.collators import PaddingCollator
from dllm.data.packing import join_documents
from dllm.utils.parsing import InputError
from memdlm import MemDLMConfig, MemDLMTrainer, relay

MEMORY = {"mem_enabled": True, "mem_inner_rank": 4, "mem_inner_layer_fraction": 0.4}
SETTINGS = {
    "use_cpu": True,
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.02,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "train_sampling_strategy": "sequential",
}
LENGTHS = (20, 9, 5, 13, 7, 11) * 2


@pytest.fixture
def documents(rows) -> list[dict]:
    """Twelve documents of unequal length, with three prompt tokens each."""
    cut = [row["input_ids"][:length] for row, length in zip(rows, LENGTHS, strict=True)]
    return [
        {"input_ids": ids, "labels": [-100] * 3 + ids[3:], "example_id": 7 * index} for index, ids in enumerate(cut)
    ]


def _run(load, tokenizer, rows, folder, size: int, **settings) -> MemDLMTrainer:
    trainer = MemDLMTrainer(
        model=load().double(),
        args=MemDLMConfig(output_dir=str(folder), per_device_train_batch_size=size, **SETTINGS, **settings),
        processing_class=tokenizer,
        data_collator=PaddingCollator(tokenizer.pad_token_id, train_on_padding=False, hide_padding=True),
        train_dataset=rows,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "settings",
    [{"loss_norm_type": "sequence", "edit_ratio": 0.2}, MEMORY],
    ids=["editing", "memory"],
)
def test_packed_training_is_that_on_the_documents(load, tokenizer, documents, tmp_path, settings: dict) -> None:
    packed = [join_documents(documents[start : start + 3]) for start in range(0, 12, 3)]
    first = _run(load, tokenizer, packed, tmp_path / "packed", 2, **settings)
    second = _run(load, tokenizer, documents, tmp_path / "rows", 6, **settings)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (first, second)]
    # float64 weights; what is float32 (times, fast weights, the sums of the log) rounds in another order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2
    start = load().double().state_dict()
    moved = max(float((value - start[name]).abs().max()) for name, value in first.lm.state_dict().items())
    for name, value in first.lm.state_dict().items():
        torch.testing.assert_close(value, second.lm.state_dict()[name], atol=1e-4 * moved, rtol=1e-5)


def test_trainers_that_cannot_take_packed_rows_say_so(load, tokenizer, documents, tmp_path) -> None:
    options = {"processing_class": tokenizer, "train_dataset": [join_documents(documents)]}
    folder = str(tmp_path)
    with pytest.raises(InputError, match="BD3LMTrainer cannot train on packed rows"):
        BD3LMTrainer(load(), BD3LMConfig(output_dir=folder, use_cpu=True), **options)
    with pytest.raises(InputError, match="MemRelayTrainer cannot train on packed rows"):
        relay.MemRelayTrainer(load(), relay.MemRelayConfig(output_dir=folder, use_cpu=True), **options)
    with pytest.raises(InputError, match="mem_scope=row and packing"):
        MemDLMTrainer(
            load(), MemDLMConfig(output_dir=folder, use_cpu=True, mem_enabled=True, mem_scope="row"), **options
        )
    with pytest.raises(InputError, match="pack the training rows only"):
        MemDLMTrainer(
            load(),
            MemDLMConfig(output_dir=folder, use_cpu=True),
            processing_class=tokenizer,
            eval_dataset=options["train_dataset"],
        )
