"""Answers kept on disk as they come, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from dataclasses import dataclass
from typing import Any

from dllm.core.eval.progress import say
from dllm.utils.parsing import InputError


@dataclass(frozen=True)
class Answer:
    """What a request got.

    value: text (generate_until), [log-likelihood, is greedy] (loglikelihood) or log-likelihood (loglikelihood_rolling).
    nfe: denoising forwards that it needed; of a likelihood, masked states (twice as many with guidance).
    cache_forwards: what it needed besides (see `dllm.core.samplers.BaseSamplerOutput`); of a likelihood 0.
    num_tokens: tokens that were made, or scored.
    without_memory: why it was answered without the memory that was asked for; None: no such thing.
    """

    value: Any
    nfe: int
    num_tokens: int
    without_memory: str | None = None
    cache_forwards: int = 0


class AnswerStore:
    """Answers by key, one JSON line each in `answers-RANK.jsonl` of a folder; in memory alone without a folder.

    Lines of all ranks are read, so a run may be continued with another number of processes.

    Args:
        folder: where the files are; None keeps nothing.
        rank: index of this process, which writes to a file of its own.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: str | None, rank: int = 0) -> None:
        self.folder = None if folder is None else pathlib.Path(folder)
        self._answers: dict[str, Answer] = {}
        self._file = None
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"answers_dir {folder} cannot be made ({error}): name another folder") from error
        self._num_damaged = self._num_foreign = 0
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            self._read(path)
        if self._num_damaged:
            say(f"{self.folder}: {self._num_damaged} damaged line(s) ignored (an earlier run was cut off); asked again")
        if self._num_foreign:
            say(f"{self.folder}: {self._num_foreign} line(s) made by another version ignored; asked again")
        path = self.folder / f"answers-{rank}.jsonl"
        is_cut = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if is_cut:
            self._file.write("\n")  # else the next answer would be damaged too

    def _read(self, path: pathlib.Path) -> None:
        """Takes in a file, and counts the lines that are no answers."""
        names = {"key", *(field.name for field in dataclasses.fields(Answer))}
        for line in filter(bytes.strip, path.read_bytes().splitlines()):
            try:
                entry = json.loads(line)
            except ValueError:
                self._num_damaged += 1
                continue
            if not isinstance(entry, dict):
                self._num_damaged += 1  # the rest of a line may be JSON too
            elif set(entry) == names:
                key = entry.pop("key")
                self._answers[key] = Answer(**entry)
            else:
                self._num_foreign += 1

    def get(self, key: str) -> Answer | None:
        """The answer kept under `key`."""
        return self._answers.get(key)

    def add(self, key: str, answer: Answer) -> None:
        """Keeps an answer, at once also on disk."""
        if self._file is None:
            return
        self._answers[key] = answer
        self._file.write(json.dumps({"key": key, **dataclasses.asdict(answer)}) + "\n")
        self._file.flush()


def request_key(fingerprint: str, *parts: Any) -> str:
    """Hex digest over everything that decides an answer; `parts` must be JSON."""
    return hashlib.sha256(json.dumps([fingerprint, *parts], sort_keys=True).encode()).hexdigest()
