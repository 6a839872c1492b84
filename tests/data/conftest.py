"""A tokenizer with a chat template, and small data files."""

import json

import datasets
import pytest

from dllm.models.auto import load_tokenizer
from dllm.models.tiny import make_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A checkpoint folder whose tokenizer merges line breaks."""
    text = "What is the colour of the sea?\n\nThe sea is blue.\n\nName a prime number.\n\nSeven.\n\n" * 5
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "base", text=text, vocab_size=400)


@pytest.fixture(scope="session")
def tokenizer(tiny_folder):
    return load_tokenizer(str(tiny_folder))


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl("name.jsonl", rows) -> path of the file."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    # What an earlier test read must not answer for a later one, and no test may ask the Hub.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("BASE_DATASETS_DIR", raising=False)
