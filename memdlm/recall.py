"""Put a document into a memory file, and ask about it: the document is not in the prompt, only the memory carries it.

    python -m memdlm.recall write DOC --out mem.safetensors --model_name_or_path runs/tiny [--mem_num_inner_steps 4 ...]
    python -m memdlm.recall ask mem.safetensors "What is it about?" [--max_new_tokens 64 ...]

DOC is a UTF-8 text file. `ask` answers with the memory and without it, and loads the model that the file names unless
another place is given. All flags: `python -m memdlm.recall write --help`, `python -m memdlm.recall ask --help`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal, get_type_hints

from dllm.core.samplers import BaseSamplerConfig
from dllm.models.lora import is_adapter
from dllm.utils.parsing import InputError, one_line_errors, parse_args
from memdlm.decoding import (
    Decoder,
    LoadFlags,
    MemoryFlags,
    SamplerFlags,
    find_sampler,
    memory_config,
    sampler_config,
)
from memdlm.memory.parametric import ParametricMemory
from memdlm.memory.prompts import WrittenMemory
from memdlm.memory.store import check_target, read_header

SHOWN_LOSSES = 4  # of the first and of the last inner steps


def _flags(name: str, source: Any, left_out: Sequence[str] = (), optional: Sequence[str] = ()) -> Any:
    """The flags of `source` less some; `optional` ones are None where they are not given."""
    hints = get_type_hints(source)
    kept = [(f.name, hints[f.name], f) for f in dataclasses.fields(source) if f.name not in left_out]
    made = []
    for flag, hint, known in kept:
        copied: Any = field(default=known.default, metadata=dict(known.metadata))
        if flag in optional:
            hint, copied = hint | None, field(default=None, metadata=dict(known.metadata))
        made.append((flag, hint, copied))
    return make_dataclass(name, made)


# The memory is always on here.
WriteMemoryFlags: Any = _flags("WriteMemoryFlags", MemoryFlags, left_out=("mem_enabled",))
# The file names its model.
AskLoadFlags: Any = _flags("AskLoadFlags", LoadFlags, optional=("model_name_or_path",))


@dataclass
class WriteOptions:
    """Where to, and what becomes of a document that is too long."""

    out: str = field(metadata={"help": "Memory file to write (safetensors); an older memory there is replaced."})
    max_length: int | None = field(
        default=None, metadata={"help": "Most tokens of the document, at least 1. None: the model's own limit."}
    )
    truncation: Literal["error", "left"] = field(
        default="error",
        metadata={"help": "Too long a document: error, or left (its beginning is dropped, and counted)."},
    )

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise InputError(f"--max_length is {self.max_length} but must be at least 1")


@dataclass
class AskOptions:
    """How the question is put."""

    chat: bool = field(
        default=True, metadata={"help": "Put the question into the model's chat template; False: as it stands."}
    )


def _arguments(words: Sequence[str], command: str, names: Sequence[str], *groups: Any) -> tuple[list[str], tuple]:
    """(the arguments without a flag, one instance per group of flags)."""
    usage = f"python -m memdlm.recall {command} {' '.join(names)}"
    if {"-h", "--help"} & set(words):
        print(f"{usage} [flags]\n")
        parse_args(*groups, args=["--help"])
    given = list(words[: len(names)])
    if len(given) < len(names) or any(word.startswith("--") for word in given):
        raise InputError(f"{command} needs {' and '.join(names)} before any flag: {usage} ...")
    return given, parse_args(*groups, args=words[len(names) :])


def read_document(path: str) -> str:
    """The text of a file.

    Raises:
        InputError: there is none, it cannot be read, is no UTF-8, or is empty.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the document {path} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise InputError(f"the document {path} is empty: there is nothing to remember")
    return text


def fit_length(ids: list[int], limit: int, truncation: str, path: str) -> tuple[list[int], int]:
    """(`ids` or the last `limit` of them, how many were dropped).

    Raises:
        InputError: more than `limit`, and truncation is "error".
    """
    num_dropped = max(0, len(ids) - limit)
    if num_dropped and truncation == "error":
        raise InputError(
            f"the document {path} has {len(ids)} tokens, the limit is {limit}: pass --truncation left to drop its "
            "beginning, or shorten it"
        )
    return ids[num_dropped:], num_dropped


def write(words: Sequence[str]) -> None:
    """The command `write`."""
    (path,), (options, load_flags, memory_flags) = _arguments(
        words, "write", ("DOC",), WriteOptions, LoadFlags, WriteMemoryFlags
    )
    config = memory_config(memory_flags)
    text = read_document(path)
    check_target(options.out)
    decoder = Decoder.from_flags(load_flags, MemoryFlags())
    memory = decoder.make_memory(config)
    limit = memory.lm.config.max_position_embeddings if options.max_length is None else options.max_length
    ids = decoder.tokenizer(text, verbose=False)["input_ids"]
    ids, num_dropped = fit_length(ids, limit, options.truncation, path)
    adapter = load_flags.adapter_model_name_or_path
    if adapter is None and is_adapter(load_flags.model_name_or_path):
        adapter = load_flags.model_name_or_path
    with memory.attached():
        began = time.perf_counter()
        (written,) = memory.adapt([ids])
        seconds = time.perf_counter() - began
        if written.failure is not None:
            raise InputError(f"no memory could be written from {path}: {written.failure}")
        memory.save(options.out, adapter=adapter)
    _report_write(path, options.out, memory, written, num_dropped, seconds)


def _report_write(
    path: str, out: str, memory: ParametricMemory, written: WrittenMemory, num_dropped: int, seconds: float
) -> None:
    dropped = f" (its first {num_dropped:,} were dropped)" if num_dropped else ""
    losses = [f"{loss:.4f}" for loss in written.losses.tolist()]
    if len(losses) > 2 * SHOWN_LOSSES:
        losses = [*losses[:SHOWN_LOSSES], f"... ({len(losses)} steps)", *losses[-SHOWN_LOSSES:]]
    fast = memory.fast
    print(f"document      {path}: {written.num_tokens:,} tokens{dropped}")
    print(f"inner losses  {', '.join(losses)}")
    print(f"memory        {fast.numel:,} numbers on {len(fast.targets)} linears, from layer {memory.start} on")
    print(f"written in    {seconds:.2f} s")
    print(f"file          {out}: {os.path.getsize(out) / 1e6:.2f} MB, for {memory.lm.name_or_path}")


def ask(words: Sequence[str]) -> None:
    """The command `ask`."""
    (path, question), (options, load_flags, sampler_flags) = _arguments(
        words, "ask", ("MEMORY", "QUESTION"), AskOptions, AskLoadFlags, SamplerFlags
    )
    if not question.strip():
        raise InputError("the question is empty: ask something")
    header = read_header(path)
    loading = dict(vars(load_flags))
    if loading["model_name_or_path"] is None:
        if not header.base_model:
            raise InputError(f"{path} names no model: give --model_name_or_path")
        loading["model_name_or_path"] = header.base_model
        loading["adapter_model_name_or_path"] = loading["adapter_model_name_or_path"] or header.adapter
    sampler_class = find_sampler(LoadFlags(**loading), sampler_flags)
    config = sampler_config(sampler_flags, sampler_class, early_stop=True)
    decoder = Decoder.from_flags(LoadFlags(**loading), MemoryFlags(), sampler_class)
    memory = decoder.make_memory(header.settings())
    ids = _question_ids(decoder, question, options.chat)
    with memory.attached():
        memory.load(path)
        print(f"question: {question}")
        _answer(decoder, ids, config, f"with the memory of {header.num_tokens:,} tokens")
    _answer(decoder, ids, config, "without it")


def _question_ids(decoder: Decoder, question: str, chat: bool) -> list[int]:
    tokenizer = decoder.tokenizer
    if not chat:
        return tokenizer(question)["input_ids"]  # pyright: ignore[reportReturnType]
    if tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template: pass --chat False")
    messages = [{"role": "user", "content": question}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]


def _answer(decoder: Decoder, ids: list[int], config: BaseSamplerConfig, title: str) -> None:
    output = decoder.answer([ids], config).output
    assert output.answers is not None and output.nfe is not None
    print(f"\n{title} ({int(output.nfe[0])} denoising forwards):\n{decoder.text(output.answers[0].tolist())}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"write": write, "ask": ask}


def main(words: Sequence[str] | None = None) -> None:
    """The command line: `words` behind the program's name, None reads sys.argv."""
    words = sys.argv[1:] if words is None else words
    if words and words[0] in ("-h", "--help"):
        print(__doc__)
        return
    if not words or words[0] not in COMMANDS:
        found = f"unknown command {words[0]!r}" if words else "nothing to do"
        raise InputError(f"{found}: choose {' or '.join(COMMANDS)}, or --help")
    COMMANDS[words[0]](words[1:])


if __name__ == "__main__":
    with one_line_errors():
        main()
