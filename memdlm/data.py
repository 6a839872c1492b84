"""Data sets under the name that training scripts of this package import: `from memdlm.data import load_sft_dataset`."""

from dllm.data import load_sft_dataset

__all__ = ["load_sft_dataset"]
