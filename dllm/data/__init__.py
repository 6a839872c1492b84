"""Rows for training: where they come from and how they become token sequences."""

from dllm.data.builtin import load_docstrings
from dllm.data.datasets import load_pt_dataset, load_sft_dataset
from dllm.data.preprocessed import check_preprocessed
from dllm.data.sft import (
    clip_row,
    default_sft_map_fn,
    post_process_dataset,
    prepend_bos,
    to_messages,
    tokenize_and_group,
    tokenize_sft_dataset,
)
from dllm.data.wrappers import CollatorWrapper, NoAttentionMaskWrapper, PrependBOSWrapper

__all__ = [
    "CollatorWrapper",
    "NoAttentionMaskWrapper",
    "PrependBOSWrapper",
    "check_preprocessed",
    "clip_row",
    "default_sft_map_fn",
    "load_docstrings",
    "load_pt_dataset",
    "load_sft_dataset",
    "post_process_dataset",
    "prepend_bos",
    "to_messages",
    "tokenize_and_group",
    "tokenize_sft_dataset",
]
