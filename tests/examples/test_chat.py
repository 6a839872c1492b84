"""Chat and sample: in this process, through a pipe, and in a terminal."""

import io
import os
import pathlib
import pty
import runpy
import select
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from dllm.core.samplers import BLOCK_PRESETS, BlockSamplerConfig, MDLMSamplerConfig
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils import parse_args
from memdlm import chat, sample
from memdlm.decoding import Decoder, LoadFlags, MemoryFlags

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "llada"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("chat") / "tiny"
    return str(make_tiny_checkpoint(folder, "llada_moe", num_hidden_layers=2, num_experts=4))


@pytest.fixture(scope="module")
def decoder(checkpoint) -> Decoder:
    flags = parse_args(LoadFlags, MemoryFlags, args=["--model_name_or_path", checkpoint, "--device", "cpu"])
    return Decoder.from_flags(*flags)


@pytest.fixture
def talk(decoder):
    """A chat whose console writes to a string; `terminal` as if it were one."""

    def begin(terminal: bool = False, **settings):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100, legacy_windows=False)
        config = MDLMSamplerConfig(**{"max_new_tokens": 8, "early_stop": True, **settings})
        return chat.Chat(decoder, config, console, with_memory=False, system=None)

    return begin


def _prompt(decoder: Decoder, messages) -> list[int]:
    text = str(decoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return decoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def _said(decoder: Decoder, messages, config, with_memory=False) -> str:
    decoded = decoder.answer([_prompt(decoder, messages)], config, with_memory=with_memory)
    return decoder.text(decoded.output.answers[0].tolist())


def test_the_second_answer_is_to_the_whole_conversation(decoder, talk) -> None:
    chatting = talk()
    assert chatting.handle("first") and chatting.handle("second")
    messages = []
    for question in ("first", "second"):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": _said(decoder, messages, chatting.config)})
    assert chatting.messages == messages
    chatting.handle("/reset")
    assert chatting.messages == []
    chatting.handle("first")
    assert chatting.messages == messages[:2]


def test_memory_is_switched_by_a_command_and_written_from_the_conversation(decoder, talk) -> None:
    chatting = talk()
    lengths = []
    for line in ("one message", "/memory on", "and another one", "/memory off", "the last"):
        before = len(chatting.console.file.getvalue())
        chatting.handle(line)
        said = chatting.console.file.getvalue()[before:]
        if not line.startswith("/"):
            assert ("memory of" in said) == chatting.with_memory
            lengths.append(len(_prompt(decoder, chatting.messages[:-1])))
            assert (f"memory of {lengths[-1]} tokens" in said) == chatting.with_memory
    assert lengths == sorted(set(lengths))


def test_commands(talk) -> None:
    chatting = talk()
    for line in ("/help", "/memory", "/nonsense", ""):
        assert chatting.handle(line) is True
    said = chatting.console.file.getvalue()
    assert all(command in said for command in ("/memory on|off", "/reset", "/quit"))
    assert "/memory: no such command" in said and "/nonsense: no such command" in said
    assert chatting.handle("/quit") is False and chatting.messages == []


def test_an_interrupted_answer_leaves_the_conversation_as_it_was(decoder, talk, monkeypatch) -> None:
    chatting = talk(terminal=True)
    chatting.handle("first")
    kept = list(chatting.messages)
    answer = decoder.answer

    def interrupted(*args, on_step, **options):
        def stop(state):
            on_step(state)
            raise KeyboardInterrupt

        return answer(*args, on_step=stop, **options)

    monkeypatch.setattr(decoder, "answer", interrupted)
    assert chatting.handle("second") is True
    monkeypatch.undo()
    assert chatting.messages == kept and "stopped" in chatting.console.file.getvalue()
    assert chatting.handle("second") is True and len(chatting.messages) == 4


def test_a_message_that_does_not_fit_is_told_and_dropped(talk) -> None:
    chatting = talk(max_new_tokens=4096)
    assert chatting.handle("hello") is True
    assert "more than the model's 4096" in chatting.console.file.getvalue() and chatting.messages == []


def test_painting_tells_masked_new_and_kept_tokens_apart(decoder) -> None:
    mask = decoder.sampler.mask_token_id
    one, two, three = (decoder.tokenizer(text)["input_ids"][0] for text in ("def", " self", "import"))
    text = chat.painted(decoder, [one, mask, mask, mask], [one, two, three, mask])
    pieces = [text.plain[span.start : span.end] for span in text.spans]
    decode = decoder.tokenizer.decode
    assert text.plain == decode([one]) + decode([two, three]) + "_"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles == {decode([two, three]): chat.STYLES["new"], "_": "dim"} and len(pieces) == 2


def test_the_last_thing_painted_is_the_answer(decoder, talk) -> None:
    chatting = talk(terminal=True)
    chatting.handle("first")
    painted = chatting.console.file.getvalue()
    assert "_" * 8 in painted  # the beginning: nothing but masks
    answer = _said(decoder, [{"role": "user", "content": "first"}], chatting.config)
    assert chatting.messages[-1]["content"] == answer


def _sample(capsys, monkeypatch, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
    sample.main()
    return capsys.readouterr().out


def test_sample_prints_what_the_decoder_says(decoder, checkpoint, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "prompts.txt").write_text("third prompt\n\nfourth\n")
    prompts = ["first", "a second [prompt]", "third prompt", "fourth"]
    out = _sample(
        capsys,
        monkeypatch,
        *("--model_name_or_path", checkpoint, "--device", "cpu", "--prompt", prompts[0], "--prompt", prompts[1]),
        *("--prompt_file", str(tmp_path / "prompts.txt"), "--max_new_tokens", "6", "--steps", "3"),
        *("--mem_enabled", "True", "--mem_prompt_mask_ratio", "0.7", "--histories", "True"),
    )
    config = MDLMSamplerConfig(max_new_tokens=6, steps=3)
    flags = parse_args(
        LoadFlags, MemoryFlags, args=["--model_name_or_path", checkpoint, "--mem_prompt_mask_ratio", "0.7"]
    )
    own = Decoder.from_flags(*flags)
    rows = [own.tokenizer(text)["input_ids"] for text in prompts]
    decoded = own.answer(rows, config, with_memory=True)
    for index, prompt in enumerate(prompts):
        assert f"\n{prompt}\n  step 1: {prompt}" in f"\n{out}"
        assert (
            f"\n{own.text(decoded.output.answers[index].tolist())}\n  3 denoising forwards, 2.00 tokens per forward"
            in out
        )
    assert out.count("step 3: ") == 4 and "4 in one batch: " in out and "their memories" in out


def test_a_block_causal_model_is_decoded_block_by_block(tmp_path, capsys, monkeypatch) -> None:
    sizes = {"num_hidden_layers": 2, "num_experts": 4, "n_group": 2, "topk_group": 1, "initializer_range": 0.2}
    folder = str(make_tiny_checkpoint(tmp_path / "tiny", "llada2_moe", **sizes))
    load = ("--model_name_or_path", folder, "--device", "cpu")
    settings = ("--preset", "quality", "--block_size", "8", "--max_new_tokens", "12")
    own = Decoder.from_flags(*parse_args(LoadFlags, MemoryFlags, args=load))
    config = BlockSamplerConfig(**{**BLOCK_PRESETS["quality"], "block_size": 8, "max_new_tokens": 12})
    rows = [own.tokenizer(text)["input_ids"] for text in ("first", "a second one")]
    for with_memory in (False, True):
        flags = ("--prompt", "first", "a second one", "--mem_enabled", str(with_memory))
        out = _sample(capsys, monkeypatch, *load, *settings, *flags)
        for answer in own.answer(rows, config, with_memory=with_memory).output.answers.tolist():
            assert f"\n{own.text(answer)}\n" in out
    out = _sample(capsys, monkeypatch, *load, "--block_size", "8", "--infill", "x = [MASK*3] + y")
    assert "3 denoising forwards" in out or "4 denoising forwards" in out  # one more where a block lies before
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    monkeypatch.setattr(sys, "argv", ["chat.py", *load, *settings])
    chat.main()
    prompt = _prompt(own, [{"role": "user", "content": "hello"}])
    stopping = BlockSamplerConfig(**{**vars(config), "early_stop": True})
    assert f"{own.text(own.answer([prompt], stopping).output.answers[0].tolist())}\n" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["llada/chat.py", "llada/sample.py", "llada21/chat.py", "llada21/sample.py"])
def test_the_examples_are_the_programs(script: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    shown = capsys.readouterr().out
    assert left.value.code == 0 and "--editing_threshold" in shown and "--mem_inner_rank" in shown
    assert ("--infill" in shown) == script.endswith("sample.py")


def test_sample_fills_in_masks(decoder, checkpoint, capsys, monkeypatch) -> None:
    mask = decoder.tokenizer.mask_token
    texts = [f"def {mask}(a)", "x = [MASK*3] + [MASK]"]
    out = _sample(
        capsys, monkeypatch, "--model_name_or_path", checkpoint, "--device", "cpu", "--infill", *texts, "--steps", "2"
    )
    rows = [decoder.tokenizer(text)["input_ids"] for text in (texts[0], f"x = {mask * 3} + {mask}")]
    output = decoder.infill(rows, MDLMSamplerConfig(steps=2)).output
    for index, row in enumerate(rows):
        filled = decoder.tokenizer.decode(output.sequences[index, : len(row)], skip_special_tokens=True)
        assert f"{texts[index]}\n{filled}\n" in out
    assert "1 denoising forwards, 1.00" in out and "2 denoising forwards, 2.00" in out


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (sample, (), "nothing to do: give --prompt"),
        (sample, ("--prompt_file", "nowhere.txt"), "--prompt_file nowhere.txt cannot be read"),
        (sample, ("--infill", "x", "--chat", "True"), "--chat has no effect on --infill"),
        (sample, ("--infill", "x", "--max_new_tokens", "3"), "--max_new_tokens has no effect on --infill"),
        (sample, ("--prompt", "x", "--mem_inner_lr", "1"), "--mem_inner_lr has no effect without --mem_enabled True"),
        (sample, ("--prompt", "x", "--steps", "0"), "steps must be at least 1"),
        (sample, ("--prompt", "x", "--editing_threshold", "0.5"), "--editing_threshold has no effect on MDLMSampler"),
        (
            sample,
            ("--prompt", "x", "--preset", "speed"),
            "--preset 'speed' is none of MDLMSampler: choose one of llada",
        ),
        (chat, ("--sampler", "block"), "give the --block_size of that training"),
        (chat, ("--histories", "True"), "--histories has no effect here"),
        (chat, ("--mem_inner_rank", "0"), "mem_inner_rank must be an integer of at least 1"),
    ],
)
def test_what_cannot_be_is_said(checkpoint, monkeypatch, capsys, script, flags, message) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "--model_name_or_path", checkpoint, *flags])
    with pytest.raises((ValueError, SystemExit)) as refused:
        script.main()
    assert message in f"{refused.value} {capsys.readouterr().err}"


def _command(checkpoint: str, *flags: str) -> list[str]:
    return [sys.executable, str(SCRIPTS / "chat.py"), "--model_name_or_path", checkpoint, "--device", "cpu", *flags]


def test_chat_reads_from_a_pipe(decoder, checkpoint, tmp_path) -> None:
    done = subprocess.run(
        _command(checkpoint, "--max_new_tokens", "8", "--mem_enabled", "True"),
        input="first\n/memory off\nsecond\n/quit\nthird\n",
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    config = MDLMSamplerConfig(max_new_tokens=8, early_stop=True)
    messages = [{"role": "user", "content": "first"}]
    first = _said(decoder, messages, config, with_memory=True)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "second"}]
    wanted = [f"{first}\n", "memory of", "memory is off", f"{_said(decoder, messages, config)}\n"]
    place = 0
    for text in wanted:  # in this order
        place = done.stdout.index(text, place) + len(text)
    assert "\x1b" not in done.stdout and "third" not in done.stdout and done.stdout.count("forwards") == 2


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(checkpoint) -> None:
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TERM="xterm-256color", COLUMNS="80", LINES="24")
        os.execv(sys.executable, _command(checkpoint, "--max_new_tokens", "2000"))
    seen = ""

    def wait_for(text: str, since: int = 0) -> int:
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen[since:] and time.monotonic() < end:
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 65536).decode(errors="replace")
        assert text in seen[since:], seen[-2000:]
        return len(seen)

    try:
        wait_for("you >")
        os.write(terminal, b"hello\n")
        here = wait_for("____")
        os.write(terminal, b"\x03")
        here = wait_for("stopped", here - 4)
        os.write(terminal, b"/memory on\n")
        here = wait_for("memory is on", here)
        os.write(terminal, b"\x04")
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise
    finally:
        os.close(terminal)
