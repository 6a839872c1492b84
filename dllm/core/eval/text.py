"""Between text and tokens, as lm-eval's own models do it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from dllm.utils.parsing import InputError
from dllm.utils.tokens import token_id


def prefix_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands in for an empty context: the beginning-of-text token, or the end-of-text token if there is none."""
    has_bos = tokenizer.special_tokens_map.get("bos_token") is not None
    return token_id(tokenizer, "bos_token" if has_bos else "eos_token")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text`, with the special tokens that the tokenizer adds, but never a second beginning-of-text."""
    bos = tokenizer.special_tokens_map.get("bos_token")
    if bos is not None and text.startswith(str(bos)):
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(text)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """`encode`, or the prefix token for a text without tokens."""
    return encode(tokenizer, text) or [prefix_token_id(tokenizer)]


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """(tokens of the context, tokens of the continuation).

    Spaces at the end of the context move to the continuation, and the continuation is what the whole text has behind
    the context's tokens, so that words are cut as in running text. An empty context is the prefix token, which a
    continuation that begins with it gives itself.
    """
    if context == "":
        prefix = prefix_token_id(tokenizer)
        target = tokenizer.encode(continuation, add_special_tokens=False)
        return ([prefix], target[1:] if target[:1] == [prefix] else target)
    bare = context.rstrip()
    if not bare:  # spaces alone: nothing is left to move them from
        return encode_pair(tokenizer, "", context + continuation)
    continuation = context[len(bare) :] + continuation
    before = encode(tokenizer, bare)
    return before, encode(tokenizer, bare + continuation)[len(before) :]


def rolling_windows(tokens: Sequence[int], prefix: int, max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, block) pairs that hold every token once as part of a block.

    The first block is the first max_length - 1 tokens behind the prefix token. Each further one has at most
    ceil(max_length / 2) tokens and the max_length - len(block) tokens before it as context.

    Args:
        tokens: of the whole text.
        prefix: id of the token that stands before the first one.
        max_length: most tokens of context and block together, at least 2.
    """
    first = min(len(tokens), max_length - 1)
    if first:
        yield [prefix], list(tokens[:first])
    size = (max_length + 1) // 2
    for start in range(first, len(tokens), size):
        block = list(tokens[start : start + size])
        before = max_length - len(block)
        yield list(tokens[max(0, start - before) : start]), block


def answer_text(
    tokenizer: PreTrainedTokenizerBase, answer: Sequence[int], end_token_ids: Sequence[int], until: Sequence[str]
) -> str:
    """Text of an answer up to its first end token or stop string, without special tokens.

    A stop string that is one special token ends the answer where that token stands.

    Args:
        answer: token ids.
        end_token_ids: what ends an answer in any case.
        until: stop strings; empty ones are not looked for.
    """
    vocabulary = tokenizer.get_vocab()
    ends = {*end_token_ids, *(vocabulary[stop] for stop in until if stop in tokenizer.all_special_tokens)}
    kept = next((index for index, token in enumerate(answer) if token in ends), len(answer))
    text = str(tokenizer.decode(list(answer[:kept]), skip_special_tokens=True))
    found = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(found, default=len(text))]


def fit(context: Sequence[int], num_behind: int, max_length: int, truncation: str, what: str) -> tuple[list[int], int]:
    """(context, how many of its tokens were dropped) so that `num_behind` more tokens fit behind it.

    Args:
        context: token ids.
        num_behind: tokens of the answer.
        max_length: most tokens in all.
        truncation: error, or left: drop the beginning.
        what: names the request in an error.

    Raises:
        InputError: too long and truncation is error; or not one token of context would be left.
    """
    room = max_length - num_behind
    if room < 1:
        raise InputError(
            f"{what}: {num_behind} tokens to score or to make leave no room for a prompt within max_length="
            f"{max_length}: raise max_length or lower the number of tokens"
        )
    surplus = len(context) - room
    if surplus <= 0:
        return list(context), 0
    if truncation == "error":
        raise InputError(
            f"{what}: a prompt of {len(context)} tokens and {num_behind} behind it exceed max_length={max_length} by "
            f"{surplus}: shorten it, raise max_length, or pass truncation=left to drop its beginning"
        )
    return list(context[surplus:]), surplus
