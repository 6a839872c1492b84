"""Local data files -> raw rows, with errors that name the file and line."""

import csv
import gzip
import itertools
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any, TextIO

import datasets
import pyarrow
from datasets.exceptions import DatasetGenerationError

from dllm.utils.parsing import InputError

# Suffix -> builder of the datasets library.
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
TEST_WORDS = ("test", "validation", "valid", "val", "dev", "eval")


def reader_of(path: pathlib.Path) -> str | None:
    """Name of the builder for a file (`.gz` after the suffix is fine), or None for other files."""
    suffixes = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    return READERS.get(suffixes[-1]) if suffixes else None


def _open(path: pathlib.Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace")
    return open(path, encoding="utf-8", errors="replace")


def _is_empty(path: pathlib.Path) -> bool:
    if reader_of(path) == "parquet":
        return path.stat().st_size == 0
    with _open(path) as file:
        return not any(line.strip() for line in file)


def _split_of(path: pathlib.Path, folder: pathlib.Path) -> str:
    words = re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())
    return next((word for word in TEST_WORDS if word in words), "train")


def _files_of(path: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    if path.is_file():
        return {"train": [path]}
    splits: dict[str, list[pathlib.Path]] = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and reader_of(file) is not None:
            splits.setdefault(_split_of(file, path), []).append(file)
    return splits


def read_jsonl(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, plain or with .gz, as they stand: no column is typed or filled in.

    Raises:
        InputError: it cannot be read, or a line is no JSON object (named).
    """
    path = pathlib.Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        # Not splitlines: JSON strings may hold other line ends of Unicode as they are.
        lines = data.decode("utf-8-sig").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON lines: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}; correct that line or delete it") from None
        if row is not None and not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is no JSON object: correct that line or delete it")
        rows += [] if row is None else [row]
    return rows


def _broken_json_place(path: pathlib.Path) -> str | None:
    """Where the file stops being JSON or JSON lines; None if every line is fine."""
    with _open(path) as file:
        text = file.read()
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return f"{path}, line {error.lineno}: {error.msg}"
        return None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                json.loads(line)
            except json.JSONDecodeError as error:
                return f"{path}, line {number}: {error.msg}"
    return None


def _find_broken_line(files: Iterable[pathlib.Path]) -> str | None:
    places = (_broken_json_place(path) for path in files)
    place = next((place for place in places if place is not None), None)
    return None if place is None else f"{place}; correct that line or delete it"


def find_broken_line(path: pathlib.Path) -> str | None:
    """Where the JSON of a file or folder is broken, in one line; None if it is not, or there is none."""
    files = itertools.chain.from_iterable(_files_of(path).values()) if path.exists() else ()
    return _find_broken_line(file for file in files if reader_of(file) == "json")


def _explain(files: list[pathlib.Path], reader: str, error: Exception) -> str:
    if reader == "json":
        place = _find_broken_line(files)
        if place is not None:
            return place
    cause = error.__cause__ or error
    names = ", ".join(str(path) for path in files)
    return f"{names} cannot be read as {reader}: {' '.join(str(cause).split())}"


def _text_columns(path: pathlib.Path) -> datasets.Features:
    # Numbers would lose leading zeros, and an empty cell would become None.
    with _open(path) as file:
        header = next(csv.reader(file), [])
    return datasets.Features({name: datasets.Value("string") for name in header})


def _reader_options(reader: str, files: list[pathlib.Path]) -> dict[str, Any]:
    if reader == "csv":
        return {"features": _text_columns(files[0]), "keep_default_na": False}
    if reader == "text":
        # Lines keep their end, so that joining them gives the file back.
        return {"keep_linebreaks": True}
    return {}


def _check_files(path: pathlib.Path, splits: dict[str, list[pathlib.Path]]) -> str:
    """The one reader of all files."""
    every = [file for files in splits.values() for file in files]
    if not every:
        raise InputError(f"folder {path} holds no data file; known: {', '.join(READERS)} (also with .gz)")
    readers = {reader_of(file) for file in every}
    if len(readers) > 1 or None in readers:
        found = ", ".join(sorted({"".join(file.suffixes) or file.name for file in every}))
        raise InputError(f"{path}: one format at a time of {', '.join(READERS)} (also with .gz), found: {found}")
    for file in every:
        if _is_empty(file):
            raise InputError(f"{file} is empty: fill or delete it")
    return str(readers.pop())


def load_files(path: pathlib.Path, streaming: bool = False) -> dict[str, Any]:
    """{split: rows} of a data file (one split, train) or of a folder of files of one format.

    In a folder, files with the word test, validation, valid, val, dev or eval in their path form a split of that
    name; the others are train.

    Raises:
        InputError: unknown or mixed formats, an empty file, a broken line (named).
    """
    splits = _files_of(path)
    reader = _check_files(path, splits)
    loaded = {}
    for split, files in splits.items():
        try:
            loaded[split] = datasets.load_dataset(
                reader,
                data_files=[str(file) for file in files],
                split="train",
                streaming=streaming,
                **_reader_options(reader, files),
            )
        except (DatasetGenerationError, pyarrow.ArrowInvalid, OSError, ValueError) as error:
            raise InputError(_explain(files, reader, error)) from None
    return loaded
