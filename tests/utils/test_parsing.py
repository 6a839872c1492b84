"""Command lines: every flag arrives, and whatever is wrong is one line on stderr with exit code 2."""

import dataclasses

import pytest
from torch.utils.data import DataLoader

from dllm.utils import (
    DataArguments,
    InputError,
    ModelArguments,
    TrainingArguments,
    one_line_errors,
    parse_args,
    parse_spec,
)
from dllm.utils.parsing import REPLACED_FLAGS

NEEDED = ["--model_name_or_path", "m", "--dataset_args", "d"]


def parse(*words):
    return parse_args(ModelArguments, DataArguments, args=[*NEEDED, *words])


def complaint(capsys, *words, kinds=(ModelArguments, DataArguments), needed=NEEDED):
    """The one line that the words end in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        parse_args(*kinds, args=[*needed, *words])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


def test_flags_reach_their_fields():
    model, data = parse(
        "--lora", "True", "--lora_r", "8", "--max-length", "99", "--no_mask_prompt_loss", "--num_proc=2"
    )
    assert (model.lora, model.lora_r, data.max_length, data.mask_prompt_loss, data.num_proc) == (True, 8, 99, False, 2)
    assert parse("--lora")[0].lora is True


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--lorra", "True"], "unknown flag --lorra; the closest known one is --lora"),
        (["--max_lenght=7"], "unknown flag --max_lenght; the closest known one is --max_length"),
        (["--max_len", "7"], "unknown flag --max_len; the closest known one is --max_length"),
        (["--qqq"], "unknown flag --qqq; the closest known one is --"),
        (["stray"], "value 'stray' belongs to no flag"),
        (["--lora", "maybe"], "Truthy value expected"),
        (["--max_length", "x"], "invalid int value: 'x'"),
        (["--max_length"], "expected one argument"),
        (["--max_length", "1"], "--max_length is 1 but must be at least 2"),
    ],
)
def test_wrong_words_are_one_line(capsys, words, part):
    assert part in complaint(capsys, *words)


def test_missing_flag_is_one_line(capsys):
    assert "--model_name_or_path" in complaint(capsys, needed=["--dataset_args", "d"])


@pytest.mark.parametrize("name", sorted(REPLACED_FLAGS))
def test_removed_flags_name_the_replacement(capsys, name):
    for word in (f"--{name}", f"--{name}=1", f"--{name.replace('_', '-')}"):
        assert f"--{name} no longer exists: {REPLACED_FLAGS[name]}" in complaint(capsys, word)


def test_no_flag_is_both_known_and_replaced():
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    assert not {field.name for kind in kinds for field in dataclasses.fields(kind)} & set(REPLACED_FLAGS)


def test_flag_errors_are_told_by_the_main_process_only(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        parse("--lorra")
    assert caught.value.code == 2 and capsys.readouterr().err == ""


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(ModelArguments, DataArguments, TrainingArguments, args=["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for kind in (ModelArguments, DataArguments):
        for field in dataclasses.fields(kind):
            assert f"--{field.name}" in shown and field.metadata["help"]


def test_errors_of_a_script_become_one_line(capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise InputError("no such\nfile: give another")
    assert caught.value.code == 2 and capsys.readouterr().err == "no such file: give another\n"
    with pytest.raises(SystemExit), one_line_errors(KeyError):
        raise KeyError("x")
    with pytest.raises(ValueError, match="a bug"), one_line_errors():
        raise ValueError("a bug keeps its traceback")


def test_an_error_of_a_data_loader_worker_becomes_its_own_line(capsys):
    def refuse(rows):
        raise InputError(f"row {rows[0]} is bad: correct it")

    with pytest.raises(SystemExit), one_line_errors():
        list(DataLoader([7, 8], collate_fn=refuse, num_workers=1))
    assert capsys.readouterr().err == "row 7 is bad: correct it\n"


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("name", ("name", {})),
        (" org/name [train:5_000, lang:en, all] ", ("org/name", {"train": 5000, "lang": "en", "all": None})),
        ("builtin:docstrings?context=600[train:-3]", ("builtin:docstrings?context=600", {"train": -3})),
        ("a=1,b=x", (None, {"a": 1, "b": "x"})),
        ("folder/a=1/rows.jsonl", ("folder/a=1/rows.jsonl", {})),
    ],
)
def test_parse_spec(text, parsed):
    assert parse_spec(text) == parsed


@pytest.mark.parametrize(
    "text", ["", "a[b", "a]b", "a[b][c]", "[b:1]", "a[]", "a[b:]", "a[:1]", "a[b,,c]", "a=1,a=2", "a="]
)
def test_parse_spec_errors(text):
    with pytest.raises(InputError):
        parse_spec(text)
