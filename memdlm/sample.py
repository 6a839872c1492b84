"""Answers to prompts, and texts with their masks filled in, in one batch each, with or without memory.

    python -m memdlm.sample --model_name_or_path runs/tiny --prompt "def add(a, b):" --prompt "import" \
        --infill "def [MASK*3]: return 1" --max_new_tokens 16 --mem_enabled True

In a text to fill in, [MASK] stands for one token, [MASK*8] for eight; the model's own mask token does too. With
memory, one is written from each prompt, or from what stands around the masks. The family decides how is decoded;
`--sampler block --block_size N` for one trained by block diffusion. A checkpoint with a relay is decoded with it unless
`--relay False` says otherwise. `--help` lists every flag.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console

from dllm.utils.parsing import InputError, one_line_errors, parse_args
from memdlm.decoding import (
    Decoded,
    Decoder,
    LoadFlags,
    MemoryFlags,
    SamplerFlags,
    find_sampler,
    refuse_idle_memory,
    sampler_config,
)

SHORTHAND = re.compile(r"\[MASK(?:\*(\d+))?\]")
console = Console()


def _texts(help: str):
    # extend: the flag may come several times, each time with one or more texts
    return field(default_factory=list, metadata={"help": help, "action": "extend"})


@dataclass
class SampleOptions:
    """What to decode."""

    prompt: list[str] = _texts("Prompts, one or more; the flag may be repeated.")
    prompt_file: str | None = field(default=None, metadata={"help": "UTF-8 file with one prompt per line."})
    infill: list[str] = _texts("Texts with [MASK] or [MASK*8], one or more; the flag may be repeated.")
    chat: bool = field(default=False, metadata={"help": "Put each prompt into the model's chat template."})

    def __post_init__(self) -> None:
        if self.prompt_file is not None:
            try:
                lines = pathlib.Path(self.prompt_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"--prompt_file {self.prompt_file} cannot be read: {error}") from error
            self.prompt = [*self.prompt, *(line for line in lines if line.strip())]
        if not self.prompt and not self.infill:
            raise InputError('nothing to do: give --prompt "...", --prompt_file FILE or --infill "... [MASK*8]"')
        if self.chat and not self.prompt:
            raise InputError("--chat has no effect on --infill: drop it")


def prompt_ids(decoder: Decoder, text: str, chat: bool) -> list[int]:
    """Token ids of a prompt."""
    if not chat:
        return decoder.tokenizer(text)["input_ids"]
    messages = [{"role": "user", "content": text}]
    text = str(decoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return decoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def infill_ids(decoder: Decoder, text: str) -> list[int]:
    """Token ids of a text to fill in."""
    mask = str(decoder.tokenizer.mask_token)
    return decoder.tokenizer(SHORTHAND.sub(lambda found: mask * int(found[1] or 1), text))["input_ids"]


def shown(decoder: Decoder, ids: Sequence[int]) -> str:
    """Text of a state: masks as underscores."""
    mask = decoder.sampler.mask_token_id
    pieces = [[]]
    for token in ids:
        if token == mask:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return "_".join(str(decoder.tokenizer.decode(piece, skip_special_tokens=True)) for piece in pieces)


def report(decoder: Decoder, titles: Sequence[str], rows: Sequence[Sequence[int]], decoded: Decoded) -> None:
    """Prints what was made of each row, and what it took.

    Args:
        titles: what each row is.
        rows: token ids that went in.
        decoded: what came out.
    """
    output = decoded.output
    new = 0 if output.answers is None else output.answers.shape[1]
    for index, (title, row) in enumerate(zip(titles, rows, strict=True)):
        console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
        for step, state in enumerate(output.histories or (), 1):
            line = shown(decoder, state[index, : len(row) + new].tolist()).replace("\n", "\\n")
            console.print(f"  step {step}: {line}", style="dim", markup=False, highlight=False, soft_wrap=True)
        if output.answers is None:
            text = shown(decoder, output.sequences[index, : len(row)].tolist())
        else:
            text = decoder.text(output.answers[index].tolist())
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        console.print(f"  {decoded.summary(index)}", style="dim", highlight=False, soft_wrap=True)
    total = f"{len(rows)} in one batch: {decoded.seconds:.2f} s"
    if decoded.written is not None:
        total += f", their memories {decoded.memory_seconds:.2f} s"
    console.print(total, style="dim", highlight=False)


def main() -> None:
    """The command line."""
    options, load_flags, sampler_flags, memory_flags = parse_args(SampleOptions, LoadFlags, SamplerFlags, MemoryFlags)
    refuse_idle_memory(memory_flags)
    sampler_class = find_sampler(load_flags, sampler_flags)
    config = sampler_config(sampler_flags, sampler_class)
    for name in ("max_new_tokens", "early_stop"):
        if not options.prompt and vars(sampler_flags)[name] is not None:
            raise InputError(f"--{name} has no effect on --infill: drop it")
    decoder = Decoder.from_flags(load_flags, memory_flags, sampler_class)
    if options.prompt:
        rows = [prompt_ids(decoder, text, options.chat) for text in options.prompt]
        report(decoder, options.prompt, rows, decoder.answer(rows, config, with_memory=memory_flags.mem_enabled))
    if options.infill:
        rows = [infill_ids(decoder, text) for text in options.infill]
        config = replace(config, early_stop=False)
        report(decoder, options.infill, rows, decoder.infill(rows, config, with_memory=memory_flags.mem_enabled))


if __name__ == "__main__":
    with one_line_errors():
        main()
