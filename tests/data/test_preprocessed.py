"""Rows tokenised to disk are found, are the same as those tokenised on the way, and are tied to their tokenizer."""

import json
import shutil
import sys

import pytest

from dllm.data import check_preprocessed, load_sft_dataset, tokenize_sft_dataset
from dllm.data.preprocessed import RECORD_NAME
from dllm.models.auto import load_tokenizer
from dllm.models.tiny import make_tiny_checkpoint
from dllm.tools import preprocess_sft_dataset as tool
from dllm.utils import InputError

NAME = "sets/questions.jsonl"


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch, write_jsonl):
    write_jsonl(NAME, [{"question": f"Name number {n}.", "answer": f"It is {n}."} for n in range(9)])
    monkeypatch.chdir(tmp_path)


def make(tiny_folder, **options):
    options = {"dataset_args": f"{NAME}[train:6,test:2]", **options}
    return tool.preprocess(tool.PreprocessArguments(model_name_or_path=str(tiny_folder), **options))


def test_round_trip(tiny_folder, tokenizer):
    folder = make(tiny_folder)
    assert str(folder) == "data/sft/base/questions"
    raw = tokenize_sft_dataset(load_sft_dataset(f"{NAME}[train:6,test:2]"), tokenizer)
    options = {"model_name_or_path": str(tiny_folder), "tokenizer": tokenizer, "mask_prompt_loss": True}
    for name in (NAME, str(folder)):
        found = load_sft_dataset(name, True, **options)
        assert {split: rows.to_list() for split, rows in found.items()} == {
            split: rows.to_list() for split, rows in raw.items()
        }
    assert len(load_sft_dataset(f"{folder}[train:4]", True)["train"]) == 4
    record = json.loads((folder / RECORD_NAME).read_text())
    assert record["rows"] == {"train": 6, "test": 2} and record["dataset_args"] == f"{NAME}[train:6,test:2]"


def test_found_below_the_base_folder(tiny_folder, tmp_path, monkeypatch):
    make(tiny_folder, output_dir=str(tmp_path / "base" / "org" / "name"))
    monkeypatch.setenv("BASE_DATASETS_DIR", str(tmp_path / "base"))
    assert len(load_sft_dataset("org/name", True)["train"]) == 6


def test_missing_folder_names_the_command(tiny_folder):
    with pytest.raises(InputError) as caught:
        load_sft_dataset("org/name[train:5]", True, model_name_or_path=str(tiny_folder))
    assert str(caught.value).endswith(
        f"python -m dllm.tools.preprocess_sft_dataset --model_name_or_path {tiny_folder} "
        '--dataset_args "org/name" --output_dir data/sft/base/org/name'
    )
    assert "\n" not in str(caught.value)


def test_another_tokenizer_template_or_mask_is_refused(tiny_folder, tokenizer, tmp_path):
    folder = make(tiny_folder)
    check_preprocessed(folder, tokenizer, mask_prompt_loss=True)
    with pytest.raises(InputError, match="made with --mask_prompt_loss True, not False"):
        check_preprocessed(folder, tokenizer, mask_prompt_loss=False)
    other = load_tokenizer(str(make_tiny_checkpoint(tmp_path / "other", text="xyz " * 99, vocab_size=300)))
    with pytest.raises(InputError, match=r"whose vocabulary differs from that of .*preprocess again"):
        load_sft_dataset(str(folder), True, tokenizer=other)
    changed = load_tokenizer(str(tiny_folder))
    changed.chat_template += " "
    with pytest.raises(InputError, match="whose chat template differs"):
        check_preprocessed(folder, changed)


def test_broken_or_missing_record(tiny_folder, tokenizer, caplog):
    folder = make(tiny_folder)
    (folder / RECORD_NAME).write_text("{")
    with pytest.raises(InputError, match="is broken"):
        check_preprocessed(folder, tokenizer)
    (folder / RECORD_NAME).unlink()
    with pytest.raises(InputError, match="its tokenizer is unknown"):
        check_preprocessed(folder, tokenizer)
    assert load_sft_dataset(str(folder), True, tokenizer=tokenizer)
    assert "cannot be checked" in caplog.text


def test_truncated_rows_are_named(tiny_folder):
    folder = make(tiny_folder)
    shutil.rmtree(folder / "test")
    with pytest.raises(InputError, match="cannot be read"):
        load_sft_dataset(str(folder), True)


def test_nothing_half_written_stays(tiny_folder, tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError("no space left")

    monkeypatch.setattr(tool, "write_record", no_space)
    with pytest.raises(OSError, match="no space left"):
        make(tiny_folder, output_dir="out/rows")
    assert not list((tmp_path / "out").iterdir())


def test_nothing_is_overwritten(tiny_folder, tmp_path, write_jsonl):
    folder = make(tiny_folder)
    with pytest.raises(InputError, match=r"holds a data set made from .*delete it, or give another --output_dir"):
        make(tiny_folder, dataset_args=NAME)
    assert json.loads((folder / RECORD_NAME).read_text())["rows"]["train"] == 6
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep")
    with pytest.raises(InputError, match="holds other files"):
        make(tiny_folder, output_dir="notes")
    bad = write_jsonl("bad.jsonl", [{"question": "Q", "answer": "A"}, {"question": "Q", "answer": None}])
    with pytest.raises(InputError, match=r"bad.jsonl, train, row 1"):
        make(tiny_folder, dataset_args=bad, output_dir="out/rows")
    with pytest.raises(InputError, match="joins 2 data sets: give their folder"):
        make(tiny_folder, dataset_args=f"{NAME}+{NAME}")


def test_command_line(tiny_folder, monkeypatch, capsys):
    words = ["preprocess", "--model_name_or_path", str(tiny_folder), "--dataset_args", NAME]
    monkeypatch.setattr(sys, "argv", [*words, "--output_dir", "out", "--mask_prompt_loss", "False"])
    tool.main()
    rows = load_sft_dataset("out", True, mask_prompt_loss=False)["train"]
    assert rows[0]["labels"] == rows[0]["input_ids"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        tool.main()
    assert caught.value.code == 2
    assert "delete it" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words, "--num_proc", "0"])
    with pytest.raises(SystemExit):
        tool.main()
    assert capsys.readouterr().err.endswith("--num_proc is 0 but must be at least 1\n")


def test_several_processes_give_the_same_rows_and_the_same_error(tokenizer, write_jsonl):
    rows = load_sft_dataset(NAME, num_proc=2)
    alone, several = (tokenize_sft_dataset(rows, tokenizer, num_proc=count)["train"] for count in (None, 2))
    assert several.to_list() == alone.to_list()
    bad = write_jsonl("bad.jsonl", [{"question": "Q", "answer": "A"}] * 5 + [{"question": "Q", "answer": None}])
    with pytest.raises(InputError, match=r"bad\.jsonl, train, row 5: the row holds no messages") as caught:
        load_sft_dataset(bad, num_proc=2)
    assert "\n" not in str(caught.value)
