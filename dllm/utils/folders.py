"""Folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from dllm.utils.parsing import InputError


@contextlib.contextmanager
def new_folder(folder: pathlib.Path, flag: str) -> Iterator[pathlib.Path]:
    """A folder to be filled inside the block, which is named `folder` if the block ends without an error: written
    beside and renamed, so that an interrupted run leaves no half checkpoint behind.

    Args:
        folder: must be absent or empty.
        flag: what the user calls it, for the messages: --output, ...

    Raises:
        InputError: there is something already; it cannot be made.
    """
    try:
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise InputError(f"{flag} {folder} holds something already: delete it, or give a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"{flag} {folder} cannot be made ({' '.join(str(error).split())}): give another folder"
        ) from error
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's folders are private
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
