"""python -m memdlm.recall: a document into a memory file, and questions about it."""

import subprocess
import sys

import pytest
import torch

from dllm.models.auto import load_model
from dllm.models.lora import LoraSettings, add_lora
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.parsing import InputError
from memdlm import recall
from memdlm.memory import read_header

TEXT = "The ship left the harbour in the evening; nobody on board knew where it would go. " * 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recall") / "model"
    # Larger weights than usual: near-uniform predictions would hide what the memory does.
    return make_tiny_checkpoint(folder, "llada_moe", num_experts=4, initializer_range=0.2)


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "doc.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def _write(document, out, model, *flags: str) -> None:
    recall.main(["write", str(document), "--out", str(out), "--model_name_or_path", str(model), *flags])


STRONG = ("--mem_inner_lr", "3", "--mem_inner_grad_clip", "0", "--mem_num_inner_epochs", "4")
SHORT = ("--max_new_tokens", "12", "--steps", "6")


def test_a_document_is_written_and_asked_about(checkpoint, document, tmp_path, capsys) -> None:
    out = tmp_path / "mem.safetensors"
    _write(document, out, checkpoint, *STRONG)
    written = capsys.readouterr().out
    header = read_header(out)
    assert f"{header.num_tokens:,} tokens" in written and "MB" in written and " s\n" in written
    assert len(header.losses) == 8 and f"{header.losses[0]:.4f}" in written
    assert header.settings().inner_lr == 3.0 and header.base_model == str(checkpoint)
    recall.main(["ask", str(out), "Where does it go?", *SHORT])  # the file names the model
    asked = capsys.readouterr().out
    _, with_memory, without = asked.split("\n\n", 2)
    assert with_memory.startswith(f"with the memory of {header.num_tokens:,} tokens (6 denoising forwards):")
    assert without.startswith("without it (6 denoising forwards):")
    assert with_memory.partition("\n")[2].strip() != without.partition("\n")[2].strip()
    recall.main(["ask", str(out), "Where does it go?", *SHORT])
    assert capsys.readouterr().out == asked
    recall.main(["ask", str(out), "Where does it go?", *SHORT, "--chat", "False"])
    assert capsys.readouterr().out != asked  # another prompt


def test_the_document_is_not_in_the_prompt(checkpoint, document, tmp_path, monkeypatch) -> None:
    out, prompts = tmp_path / "mem.safetensors", []
    _write(document, out, checkpoint)
    answer = recall.Decoder.answer

    def remember(self, rows, *rest, **options):
        prompts.extend(rows)
        return answer(self, rows, *rest, **options)

    monkeypatch.setattr(recall.Decoder, "answer", remember)
    recall.main(["ask", str(out), "Where?", *SHORT])
    assert len(prompts) == 2 and prompts[0] == prompts[1] and len(prompts[0]) < 40 < read_header(out).num_tokens


def test_the_beginning_of_a_long_document_is_dropped_on_request(checkpoint, document, tmp_path, capsys) -> None:
    long, short = tmp_path / "long.safetensors", tmp_path / "short.safetensors"
    _write(document, long, checkpoint)
    total = read_header(long).num_tokens
    limit = ("--max_length", "40")
    with pytest.raises(InputError, match=rf"has {total} tokens, the limit is 40: pass --truncation left"):
        _write(document, short, checkpoint, *limit)
    assert not short.exists()
    _write(document, short, checkpoint, *limit, "--truncation", "left")
    assert f"40 tokens (its first {total - 40} were dropped)" in capsys.readouterr().out
    assert read_header(short).num_tokens == 40
    assert recall.fit_length([1, 2, 3, 4], 3, "left", "doc") == ([2, 3, 4], 1)


def test_the_adapter_is_loaded_again(checkpoint, document, tmp_path, capsys) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "mem.safetensors"
    adapted = add_lora(load_model(str(checkpoint)), LoraSettings(r=2, target_modules="q_proj"), seed=1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(adapter)
    _write(document, out, checkpoint, "--adapter_model_name_or_path", str(adapter))
    assert read_header(out).adapter == str(adapter)
    recall.main(["ask", str(out), "Where?", *SHORT])
    assert "with the memory" in capsys.readouterr().out
    with pytest.raises(InputError, match=f"with the adapter {adapter} "):
        recall.main(["ask", str(out), "Where?", "--model_name_or_path", str(checkpoint)])
    other = tmp_path / "other.safetensors"
    _write(document, other, adapter)  # the adapter as the model
    assert read_header(other).adapter == str(adapter) and read_header(other).base_model == str(checkpoint)


def test_what_cannot_be_written_or_asked_is_one_line(checkpoint, document, tmp_path, make_model) -> None:
    out = tmp_path / "mem.safetensors"
    _write(document, out, checkpoint)
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    other = make_tiny_checkpoint(tmp_path / "other", "llada", n_layers=2)
    bad_json = tmp_path / "notes.txt"
    bad_json.write_text("notes")
    cases = [
        (["write", empty, "--out", out, "--model_name_or_path", checkpoint], "is empty"),
        (["write", tmp_path / "none.txt", "--out", out, "--model_name_or_path", checkpoint], "cannot be read"),
        (["write", tmp_path, "--out", out, "--model_name_or_path", checkpoint], "cannot be read"),
        (["write", binary, "--out", out, "--model_name_or_path", checkpoint], "cannot be read as UTF-8"),
        (["write", document, "--out", bad_json, "--model_name_or_path", checkpoint], "give another name"),
        (["write", document, "--out", out, "--model_name_or_path", tmp_path / "none"], "none"),
        (["write", "--out", out], "write needs DOC before any flag"),
        (["ask", out], "ask needs MEMORY and QUESTION before any flag"),
        (["ask", out, "--chat", "False"], "ask needs MEMORY and QUESTION before any flag"),
        (["ask", out, "  "], "the question is empty"),
        (["ask", tmp_path / "none.safetensors", "Where?"], "no such file"),
        (["ask", bad_json, "Where?"], "no memory file"),
        (["ask", out, "Where?", "--model_name_or_path", other], str(other)),
        (["recite", out], "unknown command 'recite': choose write or ask"),
        ([], "nothing to do: choose write or ask"),
    ]
    for words, message in cases:
        with pytest.raises(InputError) as error:
            recall.main([str(word) for word in words])
        assert message in str(error.value) and "\n" not in str(error.value), words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("write", "doc", "--out", "x", "--model_name_or_path", "m", "--mem_inner_rnk", "3"), "--mem_inner_rank"),
        (("write", "doc", "--out", "x", "--model_name_or_path", "m", "--mem_enabled", "True"), "unknown flag"),
        (("write", "doc", "--out", "x", "--model_name_or_path", "m", "--truncation", "right"), "--truncation"),
        (("write", "doc", "--out", "x", "--model_name_or_path", "m", "--max_length", "0"), "at least 1"),
        (("write", "doc", "--model_name_or_path", "m"), "--out"),
        (("ask", "mem", "two", "words"), "quote values that hold spaces"),
    ],
)
def test_wrong_flags_end_the_program_with_one_line(capsys, words, message: str) -> None:
    with pytest.raises(SystemExit) as end:
        recall.main(words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_settings_out_of_range_are_refused_before_anything_is_loaded(
    checkpoint, document, tmp_path, monkeypatch
) -> None:
    words = ("write", "doc", "--out", "x", "--model_name_or_path", "m", "--mem_inner_rank", "0")
    with pytest.raises(InputError, match="mem_inner_rank must be"):
        recall.main(words)
    out = tmp_path / "mem.safetensors"
    _write(document, out, checkpoint)
    monkeypatch.setattr(recall.Decoder, "from_flags", None)
    with pytest.raises(InputError, match="max_new_tokens"):
        recall.main(("ask", str(out), "Where?", "--max_new_tokens", "0"))


def test_help_shows_the_arguments_and_the_flags(capsys) -> None:
    recall.main(["--help"])
    assert "recall write DOC --out" in capsys.readouterr().out
    for command, argument, flag in (("write", "DOC", "--mem_num_inner_steps"), ("ask", "MEMORY QUESTION", "--steps")):
        with pytest.raises(SystemExit) as end:
            recall.main([command, "-h"])
        shown = capsys.readouterr().out
        assert end.value.code == 0 and f"recall {command} {argument}" in shown and flag in shown


def test_as_a_program_an_error_is_one_line_and_exit_code_2(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memdlm.recall", "ask", str(tmp_path / "none.safetensors"), "Where?"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "no such file" in done.stderr.strip().splitlines()[-1]
