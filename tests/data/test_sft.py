"""Rows of every form become messages and tokens; truncation counts what it drops; pretraining text becomes blocks."""

from itertools import chain

import datasets
import pytest

from dllm.data import (
    clip_row,
    default_sft_map_fn,
    post_process_dataset,
    prepend_bos,
    to_messages,
    tokenize_and_group,
    tokenize_sft_dataset,
)
from dllm.utils import DataArguments, InputError

PAIR = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PAIR},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}], "id": 3},
        {"messages": [*PAIR, {"role": "user", "content": "and?"}]},
        {"messages": None, "instruction": "Q", "output": "A"},
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "input": "<noinput>", "output": "A"},
        {"instruction": "Q", "input": None, "response": "A"},
        {"prompt": "Q", "completion": "A"},
        {"prompt": "Q", "response": "A"},
        {"question": "Q", "answer": "A"},
    ],
)
def test_forms_of_a_row(row):
    assert to_messages(row) == PAIR


def test_input_and_context_follow_the_instruction():
    for column in ("input", "context"):
        assert to_messages({"instruction": "Q", column: "X", "output": "A"})[0]["content"] == "Q\n\nX"


def test_system_message_and_several_turns_stay():
    turns = [{"role": "system", "content": "S"}, *PAIR, *PAIR]
    assert to_messages({"messages": turns}) == turns


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"text": "x", "source": None}, r"columns found: text, source \(empty\); accepted: messages"),
        ({}, "columns found: none"),
        ({"instruction": "Q"}, "columns found: instruction"),
        ({"question": "Q", "answer": 4}, "'answer' must be text but is int"),
        ({"messages": []}, "holds no messages"),
        ({"messages": "hello"}, "holds no messages"),
        ({"messages": ["hello"]}, "needs role and content"),
        ({"messages": PAIR[:1]}, "no assistant message"),
        ({"messages": PAIR[1:]}, "no assistant message that answers"),
        ({"messages": [{"role": "robot", "content": "Q"}]}, "'robot' is unknown; known: system, user"),
        ({"messages": [{"role": "user", "content": None}]}, "'content' must be text but is NoneType"),
    ],
)
def test_rows_that_are_refused_in_one_line(row, part):
    with pytest.raises(InputError, match=part) as caught:
        to_messages(row)
    assert "\n" not in str(caught.value)


def test_tokens_of_a_row(tokenizer):
    row = default_sft_map_fn({"messages": PAIR}, tokenizer=tokenizer)
    prompt = tokenizer.apply_chat_template(PAIR[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(PAIR, return_dict=False)
    assert row["input_ids"] == whole
    assert row["prompt_len"] == len(prompt) and row["input_ids"][: len(prompt)] == prompt
    assert row["labels"] == [-100] * len(prompt) + whole[len(prompt) :]
    unmasked = default_sft_map_fn({"messages": PAIR}, tokenizer=tokenizer, mask_prompt_loss=False)
    assert unmasked == {**row, "labels": whole}


def test_prompt_of_several_turns_ends_before_the_last_answer(tokenizer):
    row = default_sft_map_fn({"messages": [*PAIR, *PAIR]}, tokenizer=tokenizer)
    prompt = tokenizer.apply_chat_template([*PAIR, PAIR[0]], add_generation_prompt=True, return_dict=False)
    assert row["input_ids"][: row["prompt_len"]] == prompt


PLAIN = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


@pytest.fixture
def plain_template(tokenizer, monkeypatch):
    """Sets a template without special tokens, under which characters merge across the end of the prompt."""
    return lambda template=PLAIN: monkeypatch.setattr(tokenizer, "chat_template", template)


def test_prompt_ids_are_those_of_decoding_where_the_tokenizer_merges_across(tokenizer, plain_template):
    plain_template()
    messages = [PAIR[0], {"role": "assistant", "content": "\nThe sea"}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(prompt)] != prompt, "the case is not there: line breaks do not merge"
    row = default_sft_map_fn({"messages": messages}, tokenizer=tokenizer)
    assert row["input_ids"][: row["prompt_len"]] == prompt
    assert tokenizer.decode(row["input_ids"]) == tokenizer.decode(whole)


def test_templates_that_cannot_serve(tokenizer, plain_template):
    plain_template("{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}")
    with pytest.raises(InputError, match="renders the prompt differently"):
        default_sft_map_fn({"messages": PAIR}, tokenizer=tokenizer)
    plain_template(None)
    with pytest.raises(InputError, match=r"no chat template; add chat_template.jinja"):
        default_sft_map_fn({"messages": PAIR}, tokenizer=tokenizer)


def test_failing_row_is_named(tokenizer):
    rows = datasets.Dataset.from_list([{"question": "Q", "answer": "A"}, {"question": "Q", "answer": None}])
    with pytest.raises(InputError, match="split train, row 1: the row holds no messages"):
        tokenize_sft_dataset(datasets.DatasetDict({"train": rows}), tokenizer)


def token_rows(*sizes, answer_label=7):
    """Rows of (prompt tokens, answer tokens)."""
    return datasets.Dataset.from_list(
        [
            {
                "input_ids": list(range(prompt + answer)),
                "labels": [-100] * prompt + [answer_label] * answer,
                "prompt_len": prompt,
            }
            for prompt, answer in sizes
        ]
    )


def limits(**options):
    return DataArguments(dataset_args="x", **options)


def test_truncation_right_keeps_the_prompt_and_counts_what_it_drops(caplog):
    rows = token_rows((2, 1), (2, 9), (5, 3), (4, 1), (7, 2), (3, 0))
    kept = post_process_dataset(rows, limits(max_length=5))
    assert kept["example_id"] == [0, 1, 3]
    assert kept["input_ids"] == [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert kept["labels"][1] == [-100, -100, 7, 7, 7]
    assert set(kept.column_names) == {"input_ids", "labels", "prompt_len", "example_id"}
    assert "3 of 6 rows dropped (no answer within max_length 5: 1; prompt fills max_length 5: 2)" in caplog.text


def test_truncation_left_keeps_the_end_of_the_row():
    kept = post_process_dataset(token_rows((3, 4), (9, 2), (2, 8), (3, 2)), limits(max_length=5, truncation="left"))
    given = token_rows((3, 4), (9, 2), (2, 8), (3, 2))
    assert kept["input_ids"] == [row[-5:] for row in given["input_ids"]]
    assert kept["labels"] == [row[-5:] for row in given["labels"]]
    assert kept["prompt_len"] == [1, 3, 0, 3]


def test_truncation_filter_drops_longer_rows_and_counts_them(caplog):
    splits = datasets.DatasetDict({"train": token_rows((2, 3), (2, 4), (6, 1)), "test": token_rows((1, 1))})
    kept = post_process_dataset(splits, limits(max_length=5, truncation="filter"))
    assert kept["train"]["example_id"] == [0] and kept["test"]["example_id"] == [0]
    assert "split train: 2 of 3 rows dropped (row longer than max_length 5: 2)" in caplog.text
    assert "split test" not in caplog.text


def test_answers_without_labels_are_dropped(caplog):
    kept = post_process_dataset(
        datasets.concatenate_datasets([token_rows((1, 2)), token_rows((1, 2), answer_label=-100)]), limits()
    )
    assert kept["example_id"] == [0]
    assert "no answer within" in caplog.text


def test_nothing_left_and_missing_columns():
    with pytest.raises(InputError, match=r"no row of split train is left of 2 \(prompt fills .*raise --max_length"):
        post_process_dataset(token_rows((9, 1), (8, 2)), limits(max_length=4))
    with pytest.raises(InputError, match=r"lacks prompt_len .*tokenise it first"):
        post_process_dataset(token_rows((1, 1)).remove_columns("prompt_len"), limits())


def test_clip_row():
    row = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4], "prompt_len": 2, "other": "x"}
    copy = {key: value for key, value in row.items()}
    assert clip_row(row, 3) == {"input_ids": [1, 2, 3], "labels": [-100, -100, 3], "prompt_len": 2, "other": "x"}
    assert clip_row(row, 1)["prompt_len"] == 1
    assert clip_row(row, 3, "left") == {
        "input_ids": [2, 3, 4],
        "labels": [-100, 3, 4],
        "prompt_len": 1,
        "other": "x",
    }
    assert clip_row(row, 9) == row and clip_row(row, 9, "left") == row
    assert row == copy
    with pytest.raises(ValueError, match="allowed: right, left"):
        clip_row(row, 3, "middle")


def test_prepend_bos():
    row = {"input_ids": [1], "labels": [1], "attention_mask": [1], "prompt_len": 0}
    assert prepend_bos(row, 9) == {
        "input_ids": [9, 1],
        "labels": [-100, 1],
        "attention_mask": [1, 1],
        "prompt_len": 1,
    }
    assert row["input_ids"] == [1]


def test_tokenize_and_group_joins_and_cuts(tokenizer):
    texts = ["The sea is blue.", "", "Seven."]
    stream = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    options = {"tokenizer": tokenizer, "seq_length": 3}
    whole = tokenize_and_group({"text": texts}, drop_tail=False, **options)
    assert list(chain(*whole["input_ids"])) == stream and whole["labels"] == whole["input_ids"]
    assert whole["prompt_len"] == [0] * len(whole["input_ids"])
    cut = tokenize_and_group({"text": texts}, **options)
    assert cut["input_ids"] == [block for block in whole["input_ids"] if len(block) == 3]
    ended = tokenize_and_group({"text": texts}, drop_tail=False, insert_eos=True, **options)
    assert list(chain(*ended["input_ids"])).count(tokenizer.eos_token_id) == 3
    assert tokenize_and_group({"text": []}, **options)["input_ids"] == []
    with pytest.raises(ValueError, match="at least 1"):
        tokenize_and_group({"text": texts}, tokenizer=tokenizer, seq_length=0)


def test_a_row_with_an_empty_answer_is_dropped_and_counted(tokenizer, caplog):
    rows = [{"instruction": "Say nothing.", "output": "  "}, {"instruction": "Say hello.", "output": "hello"}]
    messages = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    fitted = post_process_dataset(tokenize_sft_dataset(messages, tokenizer), DataArguments(dataset_args="x"))["train"]
    assert list(fitted["example_id"]) == [1]
    assert "1 of 2 rows dropped (no answer within max_length 1024: 1)" in caplog.text
