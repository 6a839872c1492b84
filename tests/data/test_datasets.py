"""The grammar, every kind of source, and one line for whatever cannot be read."""

import gzip
import json

import datasets
import pytest

from dllm.data import datasets as data_sets
from dllm.data import load_pt_dataset, load_sft_dataset
from dllm.data.datasets import DatasetPart, parse_dataset_args
from dllm.utils import InputError


def questions(count, first=0):
    return [{"question": f"Q{number}", "answer": f"A{number}"} for number in range(first, first + count)]


def answers(rows):
    return [row["messages"][-1]["content"] for row in rows]


def sizes(found):
    return {split: len(rows) for split, rows in found.items()}


def test_grammar():
    assert parse_dataset_args("a/b[train:5_000,test:500]+ c?config=x[train] +d.jsonl") == [
        DatasetPart("a/b", {}, {"train": 5000, "test": 500}),
        DatasetPart("c", {"config": "x"}, {"train": None}),
        DatasetPart("d.jsonl", {}, {}),
    ]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a[train:5", "brackets do not match"),
        ("a[train:5+b", "brackets do not match"),
        ("a[train:5]]", "brackets do not match"),
        ("a[train:5]b", "brackets do not match"),
        ("a[train:-5]", "whole number above 0, not -5"),
        ("a[train:0]", "whole number above 0, not 0"),
        ("a[train:many]", "whole number above 0, not 'many'"),
        ("a[train:]", "'train:' is not KEY or KEY:VALUE"),
        ("a[]", "is not KEY"),
        ("a[train:1,train:2]", "'train' is given twice"),
        ("a[dev:5]", "split 'dev' is unknown; allowed: train, test"),
        ("a++b", r"missing beside '\+'"),
        ("+a", r"missing beside '\+'"),
        ("[train:5]", "a name must stand before the bracket"),
        ("train=5", "names no data set"),
        ("a?config", "'config' after '\\?' is not key=value"),
    ],
)
def test_grammar_errors_name_the_place(text, part):
    with pytest.raises(InputError, match=part) as caught:
        parse_dataset_args(text)
    assert "\n" not in str(caught.value)


def test_limits_select_splits(write_jsonl, tmp_path, caplog):
    write_jsonl("set/train.jsonl", questions(7))
    write_jsonl("set/test_1.jsonl", questions(3, first=10))
    folder = str(tmp_path / "set")
    assert sizes(load_sft_dataset(folder)) == {"train": 7, "test": 3}
    assert sizes(load_sft_dataset(f"{folder}[train]")) == {"train": 7}
    found = load_sft_dataset(f"{folder}[train:2,test:1]")
    assert answers(found["train"]) == ["A0", "A1"] and answers(found["test"]) == ["A10"]
    assert sizes(load_sft_dataset(f"{folder}[test:9]")) == {"test": 3}
    assert "9 rows asked for, 3 there, all taken" in caplog.text


def test_test_rows_are_cut_off_the_end_of_train(write_jsonl):
    path = write_jsonl("a.jsonl", questions(10))
    found = load_sft_dataset(f"{path}[train:5,test:3]")
    assert answers(found["train"]) == ["A0", "A1", "A2", "A3", "A4"]
    assert answers(found["test"]) == ["A7", "A8", "A9"]
    assert sizes(load_sft_dataset(f"{path}[train]")) == {"train": 10}
    with pytest.raises(InputError, match="test:10 leaves nothing of its 10 train rows"):
        load_sft_dataset(f"{path}[test:10]")
    with pytest.raises(InputError, match="has no split 'test'; it has: train"):
        load_sft_dataset(f"{path}[test]")


def test_parts_are_joined_in_order(write_jsonl):
    one = write_jsonl("a.jsonl", questions(3))
    two = write_jsonl("b.jsonl", [{"instruction": "Q", "input": "X", "output": "B0"}] * 2)
    found = load_sft_dataset(f"{one}[train:2,test:1]+{two}")
    assert answers(found["train"]) == ["A0", "A1", "B0", "B0"]
    assert answers(found["test"]) == ["A2"]


def test_formats(tmp_path):
    rows = questions(3)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.csv").write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "c.parquet"))
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "e"))
    for name in ("a.json", "b.csv", "c.parquet", "d.jsonl.gz", "e"):
        assert answers(load_sft_dataset(str(tmp_path / name))["train"]) == ["A0", "A1", "A2"], name


def test_csv_cells_stay_text(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\n0012,0034\nNA,7\n")
    rows = load_sft_dataset(str(tmp_path / "a.csv"))["train"]
    assert [[turn["content"] for turn in row["messages"]] for row in rows] == [["0012", "0034"], ["NA", "7"]]


def test_names_are_looked_up_below_the_base_folder(write_jsonl, tmp_path, monkeypatch):
    write_jsonl("base/some/name/rows.jsonl", questions(2))
    monkeypatch.setenv("BASE_DATASETS_DIR", str(tmp_path / "base"))
    assert sizes(load_sft_dataset("some/name")) == {"train": 2}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_unreadable_files_are_named(tmp_path):
    write(tmp_path / "broken.jsonl", '{"question": "Q", "answer": "A"}\n{"question": "Q"\n')
    write(tmp_path / "broken.json", '[\n{"question": "Q"},\n{"question" "Q"}\n]')
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "blank.jsonl", "\n\n")
    write(tmp_path / "header.csv", "question,answer\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9", "answer": "A"}\n')
    write(tmp_path / "a.xlsx", "x")
    write(tmp_path / "mixed" / "a.csv", "question,answer\n")
    write(tmp_path / "mixed" / "b.jsonl", "{}\n")
    write(tmp_path / "none" / "readme", "x")
    for name, part in {
        "broken.jsonl": "broken.jsonl, line 2: ",
        "broken.json": "broken.json, line 3: ",
        "empty.jsonl": "empty.jsonl is empty",
        "blank.jsonl": "blank.jsonl is empty",
        "header.csv": "header.csv cannot be read as csv",
        "latin.jsonl": "latin.jsonl, train, row 0: .*save the file as UTF-8",
        "a.xlsx": r"a.xlsx: one format at a time of .json, .jsonl.*found: .xlsx",
        "mixed": "found: .csv, .jsonl",
        "none": "holds no data file",
        "missing.jsonl": "missing.jsonl' does not exist",
        "no/such/folder": "does not exist",
    }.items():
        with pytest.raises(InputError, match=part) as caught:
            load_sft_dataset(str(tmp_path / name))
        assert "\n" not in str(caught.value), name


def test_row_without_messages_is_named(write_jsonl):
    path = write_jsonl("a.jsonl", [*questions(2), {"question": "Q", "answer": None}])
    with pytest.raises(InputError, match=r"a\.jsonl, train, row 2: the row holds no messages; columns found: question"):
        load_sft_dataset(path)


def test_tokenised_rows_need_the_flag(tmp_path):
    rows = datasets.Dataset.from_list([{"input_ids": [1], "labels": [1], "prompt_len": 0}])
    rows.save_to_disk(str(tmp_path / "tokens"))
    with pytest.raises(InputError, match="tokenised already: pass --load_preprocessed_data True"):
        load_sft_dataset(str(tmp_path / "tokens"))


def test_hub_out_of_reach():
    with pytest.raises(InputError, match=r"'tatsu-lab/alpaca' could not be reached .*builtin:docstrings"):
        load_sft_dataset("tatsu-lab/alpaca[train:5]")


@pytest.fixture
def hub(monkeypatch):
    """hub({name: {split: rows}}): data sets that the Hub would give."""

    def serve(sets):
        def load_dataset(name, config, streaming):
            assert not streaming
            return datasets.DatasetDict(
                {split: datasets.Dataset.from_list(rows) for split, rows in sets[name, config].items()}
            )

        monkeypatch.setattr(data_sets.datasets, "load_dataset", load_dataset)

    return serve


def test_hub_layouts(hub):
    chat = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "prompt": "P"}]
    hub(
        {
            ("HuggingFaceH4/ultrachat_200k", None): {
                name: chat for name in ("train_gen", "train_sft", "test_sft", "test_gen")
            },
            ("tatsu-lab/alpaca", None): {"train": [{"instruction": "Q", "input": "", "output": "A", "text": "T"}]},
            ("allenai/tulu-3-sft-mixture", None): {"train": [{"id": "1", "source": "S", **chat[0]}]},
            ("Yukang/LongAlpaca-12k", None): {
                "train": [{"instruction": "Q", "input": "x", "output": "A", "file": "F"}]
            },
            ("some/other", "main"): {"train": questions(3), "validation": questions(1), "extra": questions(9)},
            ("some/tests", None): {"dev_only": questions(3)},
        }
    )
    names = ("ultrachat_200k", "alpaca", "tulu-3-sft-mixture", "LongAlpaca-12k")
    for name in data_sets.HUB_LAYOUTS:
        assert name.split("/")[1] in names
        found = load_sft_dataset(name)
        assert [turn["content"] for turn in found["train"][0]["messages"]] == ["Q", "A"], name
        assert ("test" in found) == (name == "HuggingFaceH4/ultrachat_200k")
    assert sizes(load_sft_dataset("some/other?config=main")) == {"train": 3, "test": 1}
    with pytest.raises(InputError, match="neither train nor test; it has: dev_only"):
        load_sft_dataset("some/tests")


def test_real_rows(shared_dir):
    folder = shared_dir / "data"
    found = load_sft_dataset(
        f"{folder}/alpaca_libre.jsonl[train:900,test:90]+{folder}/self_instruct_seed.jsonl"
        f"+{folder}/gsm8k/train_2000.jsonl[train:100]"
    )
    assert sizes(found) == {"train": 900 + 175 + 100, "test": 90}
    assert all(row["messages"][0]["content"] and row["messages"][-1]["role"] == "assistant" for row in found["train"])
    assert not any("<noinput>" in row["messages"][0]["content"] for row in found["train"])
    with pytest.raises(InputError, match="columns found: task_id, prompt"):
        load_sft_dataset(f"{folder}/code/HumanEval.jsonl.gz")


def test_pretraining_text_is_the_file_again(tmp_path):
    text = "One line.\n\n  Another,\nand no end"
    (tmp_path / "a.txt").write_text(text)
    path = str(tmp_path / "a.txt")
    assert "".join(load_pt_dataset(path)["train"]["text"]) == text
    stream = load_pt_dataset(f"{path}[train:2]", streaming=True)["train"]
    assert [row["text"] for row in stream] == ["One line.\n", "\n"]
    assert sizes(load_pt_dataset(f"{path}[train:1,test:2]")) == {"train": 1, "test": 2}
    with pytest.raises(InputError, match="a stream has no end"):
        load_pt_dataset(f"{path}[test:2]", streaming=True)


def test_pretraining_rows_need_text(write_jsonl, tmp_path):
    path = write_jsonl("a.jsonl", questions(1))
    for streaming in (False, True):
        with pytest.raises(InputError, match="has no column 'text'; columns found: question, answer"):
            load_pt_dataset(path, streaming=streaming)
    datasets.Dataset.from_list([{"text": "x", "id": 1}]).save_to_disk(str(tmp_path / "saved"))
    assert list(load_pt_dataset(str(tmp_path / "saved"), streaming=True)["train"]) == [{"text": "x"}]
