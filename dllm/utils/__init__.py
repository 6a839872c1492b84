"""Settings, logging and process helpers, and the data and model functions that scripts import from here."""

import importlib
from typing import TYPE_CHECKING, Any

from dllm.utils.args import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    initial_training_setup,
    print_args_main,
    resolve_with_base_env,
)
from dllm.utils.checkpoints import resolve_checkpoint
from dllm.utils.distributed import is_main_process, local_rank, main_process_first, rank, world_size
from dllm.utils.logging import get_default_logger
from dllm.utils.parsing import InputError, one_line_errors, parse_args, parse_spec

if TYPE_CHECKING:
    from dllm.data.sft import (
        clip_row,
        default_sft_map_fn,
        post_process_dataset,
        prepend_bos,
        tokenize_and_group,
    )
    from dllm.data.wrappers import CollatorWrapper, NoAttentionMaskWrapper, PrependBOSWrapper
    from dllm.models.auto import get_model, get_tokenizer

# Those modules import dllm.utils.args themselves; loading them on first use keeps imports free of cycles.
_ELSEWHERE = {
    "get_model": "dllm.models.auto",
    "get_tokenizer": "dllm.models.auto",
    "clip_row": "dllm.data.sft",
    "default_sft_map_fn": "dllm.data.sft",
    "post_process_dataset": "dllm.data.sft",
    "prepend_bos": "dllm.data.sft",
    "tokenize_and_group": "dllm.data.sft",
    "CollatorWrapper": "dllm.data.wrappers",
    "NoAttentionMaskWrapper": "dllm.data.wrappers",
    "PrependBOSWrapper": "dllm.data.wrappers",
}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(_ELSEWHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CollatorWrapper",
    "DataArguments",
    "InputError",
    "ModelArguments",
    "NoAttentionMaskWrapper",
    "PrependBOSWrapper",
    "TrainingArguments",
    "clip_row",
    "default_sft_map_fn",
    "get_default_logger",
    "get_model",
    "get_tokenizer",
    "initial_training_setup",
    "is_main_process",
    "local_rank",
    "main_process_first",
    "one_line_errors",
    "parse_args",
    "parse_spec",
    "post_process_dataset",
    "prepend_bos",
    "print_args_main",
    "rank",
    "resolve_checkpoint",
    "resolve_with_base_env",
    "tokenize_and_group",
    "world_size",
]
