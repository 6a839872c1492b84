"""Chat in the terminal and watch the answer being denoised: masks dim, what the last step committed highlighted.

    python -m memdlm.chat --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --block_size 32
    python -m memdlm.chat --model_name_or_path runs/tiny --device cpu --mem_enabled True --load_in_4bit True

The family decides how is decoded; `--sampler block --block_size N` for one trained by block diffusion.
With memory on, one is written from the conversation so far before each answer (Parametric Memory) and dropped after it.
A checkpoint with a relay is decoded with it unless `--relay False` says otherwise.
/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves. Where standard input is a file or a pipe, one line is
one message and the answers are printed plainly. `--help` lists every flag.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from dllm.core.samplers import BaseSamplerConfig
from dllm.utils.parsing import InputError, one_line_errors, parse_args
from memdlm.decoding import Decoded, Decoder, LoadFlags, MemoryFlags, SamplerFlags, find_sampler, sampler_config

HELP = """/memory on|off   with on, a memory is written before each answer
/reset           forget the conversation
/quit            leave (or Ctrl-D)
/help            this list
Ctrl-C stops an answer; the message that it was for is dropped."""
STYLES = {"masked": "dim", "new": "bold black on bright_green", "kept": ""}
MASK = "_"
NOTHING = "(no text)"


@dataclass
class ChatOptions:
    """How the chat begins."""

    system: str | None = field(default=None, metadata={"help": "System message at its beginning. None: none."})


class Chat:
    """A conversation with a model.

    Args:
        decoder: the model.
        config: of the sampler.
        console: where everything is printed; with a terminal, answers are shown while they are made.
        with_memory: whether to begin with memory on.
        system: first message, or None.
    """

    def __init__(
        self, decoder: Decoder, config: BaseSamplerConfig, console: Console, with_memory: bool, system: str | None
    ) -> None:
        self.decoder, self.config, self.console = decoder, config, console
        self.with_memory = with_memory
        self.opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.opening)

    def handle(self, line: str) -> bool:
        """Carries out a command, or answers a message; False when the chat is over."""
        if line.startswith("/"):
            return self.obey(line.split())
        if line:
            try:
                self.answer(line)
            except KeyboardInterrupt:
                self.console.print("stopped; this message is dropped", style="yellow")
            except InputError as error:
                self.console.print(f"{error}; /reset begins anew", style="red", markup=False, highlight=False)
        return True

    def obey(self, words: Sequence[str]) -> bool:
        """Carries out a command; False when the chat is over."""
        if words == ["/quit"]:
            return False
        if words == ["/reset"]:
            self.messages = list(self.opening)
            self.console.print("the conversation is forgotten", style="yellow")
        elif words in (["/memory", "on"], ["/memory", "off"]):
            self.with_memory = words[1] == "on"
            self.console.print(f"memory is {words[1]}", style="yellow")
        elif words == ["/help"]:
            self.console.print(HELP, markup=False, highlight=False)
        else:
            self.console.print(f"{' '.join(words)}: no such command; /help lists them", style="red", markup=False)
        return True

    def answer(self, message: str) -> None:
        """Answers `message`; an answer that comes to its end joins the conversation."""
        messages = [*self.messages, {"role": "user", "content": message}]
        template = self.decoder.tokenizer.apply_chat_template
        text = str(template(messages, tokenize=False, add_generation_prompt=True))
        prompt = self.decoder.tokenizer(text, add_special_tokens=False).input_ids
        if self.console.is_terminal:
            reply, decoded = self.show(prompt)
        else:
            decoded = self.decoder.answer([prompt], self.config, with_memory=self.with_memory)
            reply = self.reply(decoded)
            self.console.print(reply or NOTHING, markup=False, highlight=False, soft_wrap=True)
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        taken = f"{decoded.summary(0)}; {decoded.memory_seconds + decoded.seconds:.1f} s"
        self.console.print(taken, style="dim", highlight=False, soft_wrap=True)

    def reply(self, decoded: Decoded) -> str:
        """Text of the one answer."""
        assert decoded.output.answers is not None
        return self.decoder.text(decoded.output.answers[0].tolist())

    def show(self, prompt: Sequence[int]) -> tuple[str, Decoded]:
        """The answer to `prompt`, painted after every step."""
        mask = self.decoder.sampler.mask_token_id
        before = [mask] * self.config.max_new_tokens
        with Live(console=self.console, auto_refresh=False) as live:

            def paint(state: torch.Tensor) -> None:
                nonlocal before
                now = state[0, len(prompt) :].tolist()
                live.update(painted(self.decoder, before, now), refresh=True)
                before = now

            live.update(painted(self.decoder, before, before), refresh=True)
            decoded = self.decoder.answer([prompt], self.config, with_memory=self.with_memory, on_step=paint)
            reply = self.reply(decoded)
            live.update(Text(reply or NOTHING), refresh=True)
        return reply, decoded


def painted(decoder: Decoder, before: Sequence[int], now: Sequence[int]) -> Text:
    """The state `now`, with the masks dim and what differs from `before` (filled in or edited) highlighted."""
    mask = decoder.sampler.mask_token_id
    kinds = ["masked" if new == mask else "new" if old != new else "kept" for old, new in zip(before, now, strict=True)]
    text = Text()
    for kind, group in itertools.groupby(zip(kinds, now, strict=True), key=lambda pair: pair[0]):
        tokens = [token for _, token in group]
        shown = MASK * len(tokens) if kind == "masked" else str(decoder.tokenizer.decode(tokens))
        text.append(shown, STYLES[kind])
    return text


def read_line(console: Console) -> str | None:
    """What the user says next; None at the end. Ctrl-C empties the line."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return console.input("[bold cyan]you >[/bold cyan] ").strip()
    except KeyboardInterrupt:
        console.print("\nCtrl-D or /quit leaves", style="yellow")
        return ""
    except EOFError:
        console.print()
        return None


def main() -> None:
    """The command line."""
    options, load_flags, sampler_flags, memory_flags = parse_args(ChatOptions, LoadFlags, SamplerFlags, MemoryFlags)
    if sampler_flags.histories:
        raise InputError("--histories has no effect here, every step is shown anyway: drop it")
    sampler_class = find_sampler(load_flags, sampler_flags)
    config = sampler_config(sampler_flags, sampler_class, early_stop=True)
    console = Console()
    decoder = Decoder.from_flags(load_flags, memory_flags, sampler_class)
    chat = Chat(decoder, config, console, memory_flags.mem_enabled, options.system)
    relay = "; the relay is on" if decoder.sampler.carries_state else ""
    console.print(f"memory is {'on' if chat.with_memory else 'off'}{relay}; /help lists the commands", style="yellow")
    while (line := read_line(console)) is not None and chat.handle(line):
        pass


if __name__ == "__main__":
    with one_line_errors():
        main()
