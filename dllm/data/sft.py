"""Instruction and chat rows -> token rows {input_ids, labels, prompt_len, example_id}; pretraining text -> blocks.

L = tokens of a row. `labels` equal `input_ids` where the loss is taken and -100 elsewhere; `prompt_len` counts the
tokens before the answer.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import datasets
from transformers import PreTrainedTokenizerBase

from dllm.data.streaming import DROP, told_drops
from dllm.utils.args import DataArguments
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError

logger = get_default_logger(__name__)

Messages = list[dict[str, str]]
AnyDataset = TypeVar("AnyDataset", datasets.Dataset, datasets.DatasetDict)

CHAT_COLUMNS = ("messages", "conversations")
# (role key, content key) of one chat turn.
_TURN_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
# (question column, columns of further input, answer columns); the first form whose columns are present is taken.
INSTRUCTION_FORMS = (
    ("instruction", ("input", "context"), ("output", "response")),
    ("prompt", (), ("completion", "response")),
    ("question", (), ("answer",)),
)
# Alpaca-like sets write this where there is no input.
_NO_INPUT = "<noinput>"
ACCEPTED_FORMS = (
    "messages or conversations (role + content, or from + value), instruction (+ input) + output, "
    "prompt + completion, question + answer"
)


def _turn(turn: Any, column: str) -> dict[str, str]:
    if isinstance(turn, Mapping):
        for role_key, content_key in _TURN_KEYS:
            role, content = turn.get(role_key), turn.get(content_key)
            if role is None:
                continue
            if role not in _ROLES:
                raise InputError(f"column {column!r}: role {role!r} is unknown; known: {', '.join(_ROLES)}")
            if not isinstance(content, str):
                raise InputError(f"column {column!r}: {content_key!r} must be text but is {type(content).__name__}")
            return {"role": _ROLES[role], "content": content}
    raise InputError(f"column {column!r}: each message needs role and content (or from and value), got {turn!r:.80}")


def _from_chat(row: Mapping[str, Any], column: str) -> Messages:
    turns = row[column]
    if not isinstance(turns, list) or not turns:
        raise InputError(f"column {column!r} holds no messages; a row needs a question and an answer")
    messages = [_turn(turn, column) for turn in turns]
    # What follows the last answer cannot be trained on: nothing answers it.
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if len(messages) < 2:
        raise InputError(f"column {column!r} holds no assistant message that answers another; drop the row")
    return messages


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise InputError(f"column {column!r} must be text but is {type(value).__name__}")
    return value


def _from_instruction(row: Mapping[str, Any], question: str, inputs: Sequence[str], answer: str) -> Messages:
    parts = [_text(row, question)]
    for column in inputs:
        if row.get(column) is not None:
            text = _text(row, column)
            parts += [text] if text.strip() not in ("", _NO_INPUT) else []
    return [
        {"role": "user", "content": "\n\n".join(parts)},
        {"role": "assistant", "content": _text(row, answer)},
    ]


def to_messages(row: Mapping[str, Any]) -> Messages:
    """The row as chat messages [{"role": system | user | assistant, "content": text}], the last from the assistant.

    Accepted: `messages` or `conversations` (role + content, or from + value with human / gpt); `instruction`
    (+ `input` or `context`) with `output` or `response`; `prompt` with `completion` or `response`; `question` with
    `answer`. An input is put after the instruction, an empty line between. Columns that are None count as absent.

    Raises:
        InputError: none of these forms (the message names the columns found), or a message without text.
    """
    for column in CHAT_COLUMNS:
        if row.get(column) is not None:
            return _from_chat(row, column)
    for question, inputs, answers in INSTRUCTION_FORMS:
        answer = next((column for column in answers if row.get(column) is not None), None)
        if row.get(question) is not None and answer is not None:
            return _from_instruction(row, question, inputs, answer)
    found = ", ".join(name if row[name] is not None else f"{name} (empty)" for name in row) or "none"
    raise InputError(f"the row holds no messages; columns found: {found}; accepted: {ACCEPTED_FORMS}")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose off: the warning about model_max_length is about rows that post_process_dataset cuts later.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]


def _prompt_and_answer_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, conversation: str
) -> tuple[list[int], list[int]]:
    prompt_ids, all_ids = _ids(tokenizer, prompt), _ids(tokenizer, conversation)
    if all_ids[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, all_ids[len(prompt_ids) :]
    # The tokenizer merges characters across the end of the prompt (line breaks, mostly). Decoding starts from the
    # prompt's own ids, so training must too: the answer is tokenised on its own.
    answer = conversation[len(prompt) :]
    answer_ids = _ids(tokenizer, answer)
    if not str(tokenizer.decode(answer_ids, clean_up_tokenization_spaces=False)).startswith(answer[:1]):
        raise InputError(
            "the prompt's tokens are no prefix of the conversation's and this tokenizer cannot tokenise the answer "
            "alone; end the chat template's assistant header with a special token"
        )
    return prompt_ids, answer_ids


def default_sft_map_fn(
    row: Mapping[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    mask_prompt_loss: bool = True,
    label_pad_token_id: int = -100,
) -> dict[str, Any]:
    """{"input_ids": [L], "labels": [L], "prompt_len": int} of one row, through the tokenizer's chat template.

    The prompt is everything before the last assistant message, with the header that asks for an answer
    (add_generation_prompt); the rest is the answer with its end-of-turn token. A row with an empty answer is its
    prompt alone: post_process_dataset drops and counts it.

    Args:
        row: any form that to_messages accepts.
        tokenizer: with a chat template.
        mask_prompt_loss: labels of the prompt are label_pad_token_id; False: labels are input_ids everywhere.
        label_pad_token_id: label of positions without loss.

    Raises:
        InputError: no messages in the row; no chat template; a template under which the prompt is not the beginning
            of the conversation.
    """
    messages = to_messages(row)
    if tokenizer.chat_template is None:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; add chat_template.jinja to its folder"
        )
    prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
    conversation = str(tokenizer.apply_chat_template(messages, tokenize=False))
    if not conversation.startswith(prompt):
        raise InputError(
            "the chat template renders the prompt differently once the answer follows; use a template whose "
            "generation prompt equals the header of an assistant message"
        )
    prompt_ids, answer_ids = _prompt_and_answer_ids(tokenizer, prompt, conversation)
    if not messages[-1]["content"].strip():
        answer_ids = []  # an end-of-turn token alone would teach the model to say nothing
    input_ids = prompt_ids + answer_ids
    masked = [label_pad_token_id] * len(prompt_ids) if mask_prompt_loss else list(prompt_ids)
    return {"input_ids": input_ids, "labels": masked + answer_ids, "prompt_len": len(prompt_ids)}


def map_row(row: Mapping[str, Any], index: int, place: str, **options: Any) -> dict[str, Any]:
    """`default_sft_map_fn`, with errors that begin with `place` and the number of the row."""
    try:
        return default_sft_map_fn(row, **options)
    except InputError as error:
        raise InputError(f"{place}, row {index}: {error}") from None


def tokenize_sft_dataset(
    dataset: datasets.DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    mask_prompt_loss: bool = True,
    num_proc: int | None = None,
) -> datasets.DatasetDict:
    """default_sft_map_fn over every split, with a progress bar; all other columns are dropped.

    Raises:
        InputError: names the split and the row that failed.
    """
    tokenized = {}
    for split, rows in dataset.items():
        tokenized[split] = rows.map(
            map_row,
            with_indices=True,
            fn_kwargs={
                "place": f"split {split}",
                "tokenizer": tokenizer,
                "mask_prompt_loss": mask_prompt_loss,
            },
            remove_columns=rows.column_names,
            num_proc=processes_for(num_proc, rows),
            desc=f"tokenising {split}",
        )
    return datasets.DatasetDict(tokenized)


def processes_for(num_proc: int | None, rows: datasets.Dataset) -> int | None:
    """num_proc for a map over these rows: None where there is hardly a row per process (datasets would warn)."""
    return None if num_proc is None or len(rows) < 2 * num_proc else num_proc


_KEEP, _TOO_LONG, _NO_ROOM, _NO_ANSWER = "", "row longer than", "prompt fills", "no answer within"


def fit_row(row: Mapping[str, Any], index: int, max_length: int, truncation: str) -> dict[str, Any]:
    """The row cut to max_length, its example_id, and under DROP why it must be left out ("" when it stays)."""
    length, prompt_len = len(row["input_ids"]), row["prompt_len"]
    why = _KEEP
    if prompt_len >= length:
        why = _NO_ANSWER
    elif length > max_length and truncation == "filter":
        why = _TOO_LONG
    elif prompt_len >= max_length and truncation != "left":
        why = _NO_ROOM
    fitted = clip_row(row, max_length, "left" if truncation == "left" else "right")
    if why == _KEEP and all(label == -100 for label in fitted["labels"]):
        why = _NO_ANSWER
    return {**fitted, "example_id": index, DROP: why and f"{why} max_length {max_length}"}


def _post_process_split(
    split: str, rows: datasets.Dataset, max_length: int, truncation: str, num_proc: int | None
) -> datasets.Dataset:
    missing = {"input_ids", "labels", "prompt_len"} - set(rows.column_names)
    if missing:
        raise InputError(
            f"split {split} lacks {', '.join(sorted(missing))} (columns: {', '.join(rows.column_names)}): "
            "tokenise it first, with tokenize_sft_dataset or .map(default_sft_map_fn)"
        )
    fitted = rows.map(
        fit_row,
        with_indices=True,
        fn_kwargs={"max_length": max_length, "truncation": truncation},
        num_proc=processes_for(num_proc, rows),
        desc=f"fitting {split} to {max_length} tokens",
    )
    dropped = Counter(why for why in fitted[DROP] if why != _KEEP)
    if dropped:
        told = told_drops(dropped)
        if dropped.total() == len(rows):
            raise InputError(f"no row of split {split} is left of {len(rows):,} ({told}); raise --max_length")
        logger.warning(f"split {split}: {dropped.total():,} of {len(rows):,} rows dropped ({told})")
        fitted = fitted.filter(lambda why: why == _KEEP, input_columns=DROP, desc=f"dropping rows of {split}")
    return fitted.remove_columns(DROP)


def post_process_dataset(dataset: AnyDataset, data_args: DataArguments) -> AnyDataset:
    """The tokenised rows at most max_length long, each with `example_id`, its position in `dataset`.

    truncation `right` keeps the prompt and cuts the answer; `left` keeps the end of the row and cuts its beginning;
    `filter` drops rows that are longer. Rows whose prompt alone reaches max_length (except with `left`), or that have
    no answer token, are dropped. Dropped rows are counted in one warning
    per split; the example_id of the others does not depend on what was dropped.

    Args:
        dataset: Dataset or DatasetDict with columns input_ids, labels, prompt_len.
        data_args: max_length, truncation and num_proc are read.

    Raises:
        InputError: a column is missing, or no row of a split is left.
    """
    options = (data_args.max_length, data_args.truncation, data_args.num_proc)
    if isinstance(dataset, datasets.Dataset):
        return _post_process_split("train", dataset, *options)
    return datasets.DatasetDict(
        {split: _post_process_split(f"{split}", rows, *options) for split, rows in dataset.items()}
    )


_PER_TOKEN = ("input_ids", "labels", "attention_mask")


def clip_row(row: Mapping[str, Any], max_length: int, truncation: str = "right") -> dict[str, Any]:
    """A copy of the row with at most max_length tokens in input_ids, labels and attention_mask (where present).

    `right` cuts the end, `left` the beginning (prompt_len shrinks by what was cut from the prompt).
    """
    if truncation not in ("right", "left"):
        raise ValueError(f"truncation {truncation!r} is unknown; allowed: right, left")
    cut = max(0, len(row["input_ids"]) - max_length)
    clipped = dict(row)
    for key in _PER_TOKEN:
        if key in row:
            clipped[key] = row[key][:max_length] if truncation == "right" else row[key][cut:]
    if "prompt_len" in row:
        left = row["prompt_len"] - (cut if truncation == "left" else 0)
        clipped["prompt_len"] = min(max(left, 0), max_length)
    return clipped


def prepend_bos(row: Mapping[str, Any], bos_token_id: int, label_pad_token_id: int = -100) -> dict[str, Any]:
    """A copy of the row that begins with bos_token_id: label label_pad_token_id, attended, part of the prompt."""
    first = {"input_ids": bos_token_id, "labels": label_pad_token_id, "attention_mask": 1}
    longer = dict(row)
    for key in _PER_TOKEN:
        if key in row:
            longer[key] = [first[key], *row[key]]
    if "prompt_len" in row:
        longer["prompt_len"] = row["prompt_len"] + 1
    return longer


def tokenize_and_group(
    examples: Mapping[str, Sequence[str]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str = "text",
    seq_length: int = 1024,
    insert_eos: bool = False,
    drop_tail: bool = True,
    add_special_tokens: bool = False,
) -> dict[str, list[Any]]:
    """All texts of the batch joined into one token stream and cut into rows of seq_length (for pretraining).

    For `dataset.map(partial(...), batched=True, remove_columns=...)`. labels equal input_ids, prompt_len is 0.

    Args:
        examples: columns of a batch; texts are in `text_field`.
        seq_length: tokens per row, at least 1.
        insert_eos: put the end-of-text token after each text.
        drop_tail: leave out what does not fill a last row; False: keep it as a shorter row.
        add_special_tokens: let the tokenizer add its own to each text.
    """
    if seq_length < 1:
        raise ValueError(f"seq_length is {seq_length} but must be at least 1")
    if insert_eos and tokenizer.eos_token_id is None:
        raise ValueError("insert_eos needs an end-of-text token: this tokenizer has none, pass insert_eos=False")
    texts = list(examples[text_field])
    tokenized: Any = (
        tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"] if texts else []
    )
    end: list[Any] = [tokenizer.eos_token_id] if insert_eos else []
    return group_tokens([[*ids, *end] for ids in tokenized], seq_length, drop_tail)


def group_tokens(documents: Sequence[Sequence[int]], seq_length: int, drop_tail: bool = True) -> dict[str, list[Any]]:
    """Token lists joined and cut into rows {input_ids, labels, prompt_len} of seq_length, as `tokenize_and_group`."""
    stream = list(itertools.chain.from_iterable(documents))
    stop = len(stream) - len(stream) % seq_length if drop_tail else len(stream)
    blocks = [stream[start : start + seq_length] for start in range(0, stop, seq_length)]
    return {
        "input_ids": blocks,
        "labels": [list(block) for block in blocks],
        "prompt_len": [0] * len(blocks),
    }
