"""Streams: the same rows and numbers for every process and worker, an exact resumption, and length groups."""

import itertools
import json
import pathlib
from typing import Any

import datasets
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader

from dllm.core.trainers.mdlm import MDLMConfig, MDLMTrainer
from dllm.core.trainers.rows import LengthGroups
from dllm.data.examples import row_lengths, with_example_ids
from dllm.data.packing import is_packed, split_documents
from dllm.data.prepare import PretrainingArguments, load_pretraining_rows, load_sft_rows
from dllm.data.streaming import RowStream
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.args import DataArguments
from dllm.utils.parsing import InputError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "tiny"
    return make_tiny_checkpoint(folder, "llada", d_model=32, n_layers=2, mlp_hidden_size=48)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory) -> pathlib.Path:
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 24)]
    path = tmp_path_factory.mktemp("data") / "count.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> pathlib.Path:
    texts = [" ".join(str(n * n) for n in range(start, start + 5 + start % 17)) for start in range(40)]
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, ""]))
    return path


def _numbers(count: int) -> datasets.IterableDataset:
    rows = [{"input_ids": [index + 2, 3], "labels": [index + 2, 3]} for index in range(count)]
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


def _take(stream, count: int) -> list[dict]:
    return list(itertools.islice(stream, count))


def test_numbers_go_on_over_passes_and_every_pass_is_shuffled_anew() -> None:
    stream = with_example_ids(_numbers(6).shuffle(seed=1, buffer_size=6), may_stream=True)
    rows = _take(stream, 18)
    assert [row["example_id"] for row in rows] == list(range(18))
    passes = [[row["input_ids"][0] for row in rows[start : start + 6]] for start in (0, 6, 12)]
    assert all(sorted(one) == list(range(2, 8)) for one in passes) and passes[0] != passes[1] != passes[2]
    assert rows == _take(stream, 18)


@pytest.mark.parametrize("processes", [1, 2])
def test_workers_bring_the_rows_in_the_order_of_no_workers(processes: int) -> None:
    def batches(workers: int, rank: int) -> list[list[tuple[int, int]]]:
        stream = RowStream(_numbers(7).shuffle(seed=1, buffer_size=4))
        stream.rows_per_turn = 2 * processes
        shard = IterableDatasetShard(stream, batch_size=2, num_processes=processes, process_index=rank)
        loader = DataLoader(shard, batch_size=2, num_workers=workers, collate_fn=lambda rows: rows)
        return [[(row["example_id"], row["input_ids"][0]) for row in rows] for rows in itertools.islice(loader, 6)]

    ranks = [batches(0, rank) for rank in range(processes)]
    ids = [[number for number, _ in itertools.chain(*step)] for step in zip(*ranks, strict=True)]
    width = 2 * processes
    assert ids == [list(range(step * width, (step + 1) * width)) for step in range(6)]
    assert [batches(2, rank) for rank in range(processes)] == ranks


def test_streamed_chats_are_the_rows_of_the_whole_data_set(tokenizer, chat_file) -> None:
    args = {"dataset_args": f"{chat_file}[train]", "max_length": 60, "truncation": "filter"}
    whole = list(load_sft_rows(DataArguments(**args), tokenizer, "", 0)["train"])
    plain = DataArguments(**args, streaming=True, shuffle_buffer_size=0)
    streamed = _take(load_sft_rows(plain, tokenizer, "", 0)["train"], 2 * len(whole))
    assert 5 < len(whole) < 23  # long rows are dropped
    for index, row in enumerate(streamed):
        assert {**row, "example_id": 0} == {**whole[index % len(whole)], "example_id": 0}
        assert row["example_id"] == index
    shuffled = load_sft_rows(DataArguments(**args, streaming=True), tokenizer, "", 0)["train"]
    order = [row["input_ids"] for row in _take(shuffled, len(whole))]
    assert order != [row["input_ids"] for row in whole] and sorted(order) == sorted(row["input_ids"] for row in whole)


def test_streamed_texts_are_those_of_the_whole_data_set(tokenizer, text_file) -> None:
    args = {"dataset_args": f"{text_file}[train]", "max_length": 32}
    whole = load_pretraining_rows(PretrainingArguments(**args, random_length_ratio=0.0), tokenizer, "", 0)["train"]
    options = {"streaming": True, "shuffle_buffer_size": 0}
    stream = load_pretraining_rows(PretrainingArguments(**args, **options), tokenizer, "", 0)["train"]
    assert [row["input_ids"] for row in _take(stream, len(whole))] == whole["input_ids"]
    joined = list(itertools.chain(*whole["input_ids"]))
    assert joined.count(tokenizer.eos_token_id) >= 35 and whole["labels"] == whole["input_ids"]

    packed = load_pretraining_rows(PretrainingArguments(**args, packing=True), tokenizer, "", 0)["train"]
    stream = load_pretraining_rows(PretrainingArguments(**args, **options, packing=True), tokenizer, "", 0)["train"]
    assert is_packed(packed) and is_packed(stream)
    documents = sorted(split_documents(list(packed)), key=lambda row: row["example_id"])
    pieces = [row for row in documents if row["input_ids"][-1] == tokenizer.eos_token_id]
    assert len(pieces) == 40 and max(map(len, packed["input_ids"])) <= 32
    # A window of the stream holds many passes here, each with numbers of its own.
    streamed = sorted(split_documents(_take(stream, 2000)), key=lambda row: row["example_id"])
    assert streamed[: len(documents)] == documents


def test_rows_do_not_depend_on_the_processes_that_tokenise(tokenizer, text_file) -> None:
    args = {"dataset_args": f"{text_file}[train]", "max_length": 32}
    one, two = (
        load_pretraining_rows(PretrainingArguments(**args, num_proc=count), tokenizer, "", 0)["train"]
        for count in (None, 2)
    )
    assert one["example_id"] == two["example_id"] == list(range(len(one)))
    assert one["input_ids"] == two["input_ids"]


@pytest.mark.parametrize("streaming", [False, True])
def test_test_rows_of_a_packed_run_hold_one_text_and_no_empty_one(tokenizer, tmp_path, streaming: bool) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    texts = ["", "1 2", "0123456789 0123456789", "", "3"]
    length = len(ids(texts[2]))
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    args = PretrainingArguments(str(tmp_path), max_length=length, packing=True, streaming=streaming)
    rows = load_pretraining_rows(args, tokenizer, "", 0)
    end = tokenizer.eos_token_id
    # The long text fills its row; no document is an end-of-text token alone.
    expected = [[*ids("1 2"), end], ids(texts[2]), [*ids("3"), end]]
    assert rows["test"]["input_ids"] == expected and not is_packed(rows["test"])
    documents = split_documents(_take(rows["train"], 2))
    assert {tuple(row["input_ids"]) for row in documents} <= set(map(tuple, expected))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "abc', "bad.jsonl, line 31: Unterminated string"),
        ('{"text": null}', "bad.jsonl, train, row 30: column 'text' must be text but is NoneType"),
    ],
)
def test_a_bad_row_is_named(tokenizer, tmp_path, streaming: bool, line: str, message: str) -> None:
    good = [json.dumps({"text": f"text {index}"}) for index in range(30)]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([*good, line, *good]) + "\n")
    args = PretrainingArguments(f"{path}[train]", max_length=8, streaming=streaming)
    with pytest.raises(InputError, match=message):
        _take(load_pretraining_rows(args, tokenizer, "", 0)["train"], 100)
    path.write_text("".join(json.dumps({"text": index}) + "\n" for index in range(5)))
    with pytest.raises(InputError, match="row 0: column 'text' must be text but is int"):
        _take(load_pretraining_rows(args, tokenizer, "", 0)["train"], 100)


def test_random_lengths_hit_their_share(tokenizer, text_file) -> None:
    args = PretrainingArguments(f"{text_file}[train]", max_length=16, random_length_ratio=0.3)
    rows = load_pretraining_rows(args, tokenizer, "", 3)["train"]
    lengths = [len(row) for row in rows["input_ids"]]
    cut = [length for length in lengths if length < 16]
    assert 0.15 < len(cut) / len(lengths) < 0.45 and len(set(cut)) > 5  # 3 sigma around 0.3 * 15 / 16
    again = load_pretraining_rows(args, tokenizer, "", 3)["train"]
    assert again["input_ids"] == rows["input_ids"] and rows["labels"] == rows["input_ids"]


def _train(checkpoint, rows, folder, steps: int, resume=None, model=None, **settings) -> dict:
    options = {
        "max_steps": 4,
        "learning_rate": 0.05,
        "optim": "sgd",
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
    }
    options |= {"save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, **settings}
    args = MDLMConfig(output_dir=str(folder), disable_tqdm=True, **options)
    trainer = MDLMTrainer(load_model(checkpoint), args, train_dataset=rows, processing_class=load_tokenizer(checkpoint))
    seen: list[list[int]] = []
    step = trainer.training_step

    def watch(model, inputs, *rest):
        seen.append(inputs["example_id"].tolist())
        return step(model, inputs, *rest)

    trainer.training_step = watch
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == steps
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "ids": seen, "weights": trainer.lm.state_dict()}


@pytest.mark.parametrize("form", ["stream", "packed stream", "length groups"])
def test_a_resumed_run_goes_on_bit_for_bit(checkpoint, tokenizer, chat_file, tmp_path, form: str) -> None:
    data = DataArguments(
        f"{chat_file}[train]",
        max_length=128,
        packing=form == "packed stream",
        streaming=form != "length groups",
    )
    settings: dict[str, Any] = {}
    if form == "length groups":  # two epochs, and the checkpoint inside the second
        settings = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 6}
        settings |= {"max_steps": 8, "save_steps": 5}
    steps = settings.get("max_steps", 4)
    stop = settings.get("save_steps", 2)

    def rows():
        return load_sft_rows(data, tokenizer, "", 0)["train"]

    whole = _train(checkpoint, rows(), tmp_path / "run", steps, **settings)
    torch.manual_seed(99)  # where the resumed process stands is no matter
    resumed = _train(checkpoint, rows(), tmp_path / "run", steps, tmp_path / "run" / f"checkpoint-{stop}", **settings)
    assert resumed["losses"] == whole["losses"] and resumed["ids"] == whole["ids"][stop:]
    for name, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], value), name


def test_length_groups_bring_like_rows_together_in_an_order_of_seed_and_epoch() -> None:
    rows = [{"input_ids": list(range(1 + (7 * index) % 50))} for index in range(100)]
    lengths = row_lengths(rows)
    assert lengths == row_lengths(datasets.Dataset.from_list(rows)) == [len(row["input_ids"]) for row in rows]
    groups = LengthGroups(4, lengths, seed=1)
    first = list(groups)
    torch.manual_seed(7)
    assert list(groups) == first and sorted(first) == list(range(100))
    groups.set_epoch(1)
    assert list(groups) != first and sorted(groups) == list(range(100))
    spread = [max(part) - min(part) for part in ([lengths[i] for i in first[s : s + 4]] for s in range(4, 100, 4))]
    assert sum(spread) / len(spread) < 12  # of 50; drawn at random it would be 30


def test_bad_input_is_refused(checkpoint, tokenizer, chat_file, text_file, tmp_path) -> None:
    for flags, message in (
        ({"shuffle_buffer_size": 5}, "no effect without --streaming"),
        ({"streaming": True, "load_preprocessed_data": True}, "preprocessed rows are read from disk"),
        ({"streaming": True, "num_proc": 2}, "--num_proc has no effect on a stream"),
    ):
        with pytest.raises(InputError, match=message):
            DataArguments(str(chat_file), **flags)
    for flags, message in (
        ({"packing": True, "random_length_ratio": 0.1}, "no effect with --packing"),
        ({"random_length_ratio": 1.5}, "must be in"),
        ({"truncation": "left"}, "--truncation has no effect on plain text"),
    ):
        with pytest.raises(InputError, match=message):
            PretrainingArguments(str(text_file), **flags)
    with pytest.raises(InputError, match="give --max_steps"):
        _train(checkpoint, _numbers(4), tmp_path, 1, max_steps=-1)
    with pytest.raises(InputError, match="no effect on a stream"):
        _train(checkpoint, _numbers(4), tmp_path, 1, train_sampling_strategy="group_by_length")
    with pytest.raises(InputError, match="dispatch_batches cannot cut up"):
        _train(checkpoint, _numbers(4), tmp_path, 1, accelerator_config={"dispatch_batches": True})
    short = DataArguments(str(chat_file), max_length=8, streaming=True)
    with pytest.raises(InputError, match=r"\(prompt fills max_length 8: 23\): raise"):
        _take(load_sft_rows(short, tokenizer, "", 0)["train"], 1)
    with pytest.raises(InputError, match="do not fill one row"):
        load_pretraining_rows(PretrainingArguments(str(text_file), max_length=10**6), tokenizer, "", 0)
