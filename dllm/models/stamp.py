"""Whether a checkpoint is the one that it was."""

from __future__ import annotations

import pathlib
from typing import Any

from dllm.models.checkpoint import find_file

# What a checkpoint or an adapter consists of.
_FILES = ("*.safetensors", "*config.json", "tokenizer*.json", "*.jinja")  # the last are chat templates


def checkpoint_stamp(name_or_path: str) -> Any:
    """JSON that changes when a checkpoint or adapter does: name, size and time of the files in its folder, or the
    commit of a Hub name."""
    folder = pathlib.Path(name_or_path)
    if folder.is_dir():
        files = sorted({path for pattern in _FILES for path in folder.glob(pattern)})
        sizes = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return [str(folder.resolve()), sizes]
    config = find_file(name_or_path, "config.json") or find_file(name_or_path, "adapter_config.json")
    # In the Hub's cache the folder around a file is named after the commit.
    return [name_or_path, None if config is None else config.parent.name]
