"""Hooks around a collator run in order, and see rows before padding."""

import pytest

from dllm.utils import CollatorWrapper, NoAttentionMaskWrapper, PrependBOSWrapper


def collate(rows, return_tensors="lists"):
    return {"input_ids": [row["input_ids"] for row in rows], "attention_mask": 1, "kind": return_tensors}


def test_hooks_run_before_and_after():
    class Twice(CollatorWrapper):
        def before(self, features):
            return features * 2

        def after(self, batch):
            return {**batch, "rows": len(batch["input_ids"])}

    batch = Twice(collate)([{"input_ids": [1]}], return_tensors="pt")
    assert batch["rows"] == 2 and batch["kind"] == "pt"
    assert CollatorWrapper(collate)([{"input_ids": [1]}]) == collate([{"input_ids": [1]}])


def test_attention_mask_is_dropped():
    assert "attention_mask" not in NoAttentionMaskWrapper(collate)([{"input_ids": [1]}])


def test_begin_of_text_is_prepended_and_wrappers_nest():
    wrapped = NoAttentionMaskWrapper(PrependBOSWrapper(collate, bos_token_id=5))
    assert wrapped([{"input_ids": [1]}, {"input_ids": [2, 3]}])["input_ids"] == [[5, 1], [5, 2, 3]]
    with pytest.raises(ValueError, match="has none"):
        PrependBOSWrapper(collate, bos_token_id=None)
