"""Collators around collators: change the rows before, or the batch after, without a new collator."""

from collections.abc import Callable, Sequence
from typing import Any

from dllm.data.sft import prepend_bos


class CollatorWrapper:
    """A collator that calls `after(collator(before(rows)))`; subclasses override one of the two hooks.

    Args:
        collator: turns a list of rows into a batch.
    """

    def __init__(self, collator: Callable[..., Any]):
        self.collator = collator

    def before(self, features: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows that the inner collator gets; here the same."""
        return features

    def after(self, batch: Any) -> Any:
        """The batch that comes out; here the same."""
        return batch

    def __call__(self, features: Sequence[dict[str, Any]], **kwargs: Any) -> Any:
        """The collated batch; keyword arguments (`return_tensors`) go to the inner collator."""
        return self.after(self.collator(self.before(list(features)), **kwargs))


class NoAttentionMaskWrapper(CollatorWrapper):
    """Drops `attention_mask` from the batch, so that padding is attended like any other token."""

    def after(self, batch: Any) -> Any:
        """The batch without `attention_mask`."""
        batch.pop("attention_mask", None)
        return batch


class PrependBOSWrapper(CollatorWrapper):
    """Puts the begin-of-text token before every row, before it is padded (see prepend_bos).

    Args:
        collator: turns a list of rows into a batch.
        bos_token_id: the token's id.
        label_pad_token_id: label of the new position, which is not trained on.
    """

    def __init__(self, collator: Callable[..., Any], bos_token_id: int | None, label_pad_token_id: int = -100):
        super().__init__(collator)
        if bos_token_id is None:
            raise ValueError("PrependBOSWrapper needs a bos_token_id: this tokenizer has none, leave the wrapper out")
        self.bos_token_id = bos_token_id
        self.label_pad_token_id = label_pad_token_id

    def before(self, features: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with the token in front."""
        return [prepend_bos(row, self.bos_token_id, self.label_pad_token_id) for row in features]
