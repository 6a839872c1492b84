"""Models for memory training: those of dllm, under the names that scripts import from here."""

from dllm.models.auto import get_model, get_tokenizer

__all__ = ["get_model", "get_tokenizer"]
