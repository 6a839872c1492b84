"""Converting Qwen2: the same weights and logits, a mask token, blocks; and what is refused."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from dllm.core.attention import block_causal_mask
from dllm.models import FAST_DLLM_V2, spec_of
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.tiny import make_tiny_checkpoint, train_tokenizer
from dllm.tools.convert_ar import ConvertArguments, convert
from dllm.utils.parsing import InputError

TEXT = "Some words to learn pieces from, and some more words. " * 5


def make_qwen(folder: pathlib.Path, tied: bool, spare_rows: int, dtype=torch.float32, with_turns=True) -> pathlib.Path:
    """A tiny Qwen2 checkpoint whose embedding has `spare_rows` more rows than its tokenizer has tokens."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>") if with_turns else ("<|endoftext|>",)
    plain = dataclasses.replace(
        FAST_DLLM_V2, special_tokens=special, **dict.fromkeys(("mask_token", "pad_token", "eos_token"), special[0])
    )
    made = train_tokenizer(plain, TEXT, 300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, eos_token=special[0])
    assert tokenizer.mask_token is None
    torch.manual_seed(4)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + spare_rows,
        hidden_size=24,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=20,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    model = Qwen2ForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(source: pathlib.Path, output: pathlib.Path, **settings) -> pathlib.Path:
    return convert(ConvertArguments(str(source), str(output), **settings))


@pytest.fixture
def qwen(tmp_path) -> pathlib.Path:
    return make_qwen(tmp_path / "qwen", tied=True, spare_rows=8)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare_rows", [8, 0])
def test_the_result_computes_what_qwen2_does(tmp_path, tied: bool, spare_rows: int) -> None:
    source = make_qwen(tmp_path / "qwen", tied, spare_rows)
    folder = run(source, tmp_path / "out", block_size=4)
    model, old = load_model(str(folder)), Qwen2ForCausalLM.from_pretrained(source).eval()
    assert spec_of(model).name == "fast_dllm_v2" and model.config.bd_size == 4
    size = old.config.vocab_size
    assert model.config.vocab_size == (size if spare_rows else size + 1)  # one row for the mask token
    ids = torch.randint(0, size, (3, 7))
    logits = model(ids, attention_mask=block_causal_mask(7, 1)).logits[..., :size]
    # Angles and norms are rounded at other places: some roundings of the largest logit.
    expected = old(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    saved, given = load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
    assert saved.keys() == given.keys() and ("lm_head.weight" in saved) == (not tied)
    assert all(torch.equal(saved[name][: len(tensor)], tensor) for name, tensor in given.items())


def test_the_tokenizer_can_mask_and_ends_turns(qwen, tmp_path) -> None:
    folder = run(qwen, tmp_path / "out")
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    assert tokenizer.mask_token == "|<MASK>|" and tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.mask_token_id == model.config.mask_token_id == model.config.vocab_size - 8
    assert tokenizer.encode("a|<MASK>|b", add_special_tokens=False)[1] == tokenizer.mask_token_id
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.chat_template == FAST_DLLM_V2.chat_template
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "Fast_dLLM_Qwen" and config["architectures"] == ["Fast_dLLM_QwenForCausalLM"]
    assert config["bd_size"] == 32 and config["rope_theta"] == 5000.0 and config["hidden_size"] == 24


def test_new_rows_are_the_mean_of_the_old(tmp_path) -> None:
    source = make_qwen(tmp_path / "qwen", tied=False, spare_rows=0, with_turns=False)
    saved, given = (load_file(path / "model.safetensors") for path in (run(source, tmp_path / "out"), source))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        new = saved[name][len(given[name]) :]
        assert len(new) == 2  # mask and end of turn
        torch.testing.assert_close(new, given[name].mean(dim=0).expand_as(new), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype, expected", [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_the_dtype_is_the_stored_one_or_the_one_asked_for(tmp_path, dtype: str, expected: torch.dtype) -> None:
    source = make_qwen(tmp_path / "qwen", tied=True, spare_rows=8, dtype=torch.bfloat16)
    folder = run(source, tmp_path / "out", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {expected}
    assert load_model(str(folder)).dtype == expected


def change(folder: pathlib.Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def error_of(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_only_plain_qwen2_is_converted(qwen, tmp_path) -> None:
    other = make_tiny_checkpoint(tmp_path / "llada", "llada", TEXT, 300)
    output = tmp_path / "out"
    assert "is no plain Qwen2 language model (model_type 'llada'" in error_of(lambda: run(other, output))
    again = run(qwen, tmp_path / "first")
    assert "model_type 'Fast_dLLM_Qwen'" in error_of(lambda: run(again, output))
    change(qwen, architectures=["Qwen2ForSequenceClassification"])
    assert "Qwen2ForSequenceClassification" in error_of(lambda: run(qwen, output))
    assert not output.exists() and not list(tmp_path.glob("*.partial-*"))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0}}, "'yarn' are not supported"),
        ({"hidden_size": 48}, "has another shape"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"quantization_config": {"bits": 4}}, "quantised already"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"rope_parameters": None, "rope_theta": "x"}, "rope_theta='x'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta='x'"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"pad_token_id": 10**6}, "pad_token_id=1000000 lies outside the vocabulary"),
        ({"eos_token_id": [3, -1]}, "eos_token_id=-1"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"architectures": "Qwen2ForCausalLM"}, "architectures 'Qwen2ForCausalLM'"),
        ({"architectures": [7]}, "architectures [7]"),
    ],
)
def test_settings_that_the_family_does_not_have(qwen, tmp_path, values: dict, message: str) -> None:
    change(qwen, **values)
    assert message in error_of(lambda: run(qwen, tmp_path / "out"))


def test_incomplete_checkpoints(qwen, tmp_path) -> None:
    bare = shutil.copytree(qwen, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "has no tokenizer" in error_of(lambda: run(bare, tmp_path / "out"))
    (bare / "config.json").write_text("{ half")
    assert "is damaged" in error_of(lambda: run(bare, tmp_path / "out"))
    (qwen / "model.safetensors").unlink()
    assert "safetensors" in error_of(lambda: run(qwen, tmp_path / "out"))
    assert "config.json" in error_of(lambda: run(tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, message",
    [(b"[1, 2]", "holds no settings but a list"), (b'{"model_type": "\xff\xfe"}', "is damaged"), (b"7", "but a int")],
)
def test_a_config_that_is_none(qwen, tmp_path, content: bytes, message: str) -> None:
    (qwen / "config.json").write_bytes(content)
    assert message in error_of(lambda: run(qwen, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_weights_are_read(qwen, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dllm.tools.convert_ar.read_shapes", lambda files: pytest.fail("weights were read"))
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out", tmp_path / ("x" * 300) / "out"):
        assert "cannot be made" in error_of(lambda output=output: run(qwen, output))
    assert "holds something already" in error_of(lambda: run(qwen, tmp_path / "file"))


def test_a_used_folder_is_left_alone(qwen, tmp_path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert "holds something already" in error_of(lambda: run(qwen, output))
    assert [file.name for file in output.iterdir()] == ["notes.txt"]
    (output / "notes.txt").unlink()
    assert run(qwen, output) == output and (output / "config.json").is_file()  # an empty folder may be there


def test_settings_out_of_range(tmp_path) -> None:
    assert "int8 is unknown; allowed: auto, float32" in error_of(lambda: run(tmp_path, tmp_path, dtype="int8"))
    assert "at least 1, got 0" in error_of(lambda: run(tmp_path, tmp_path, block_size=0))


def test_the_command_line(qwen, tmp_path) -> None:
    command = [sys.executable, "-m", "dllm.tools.convert_ar", "--model_name_or_path", str(qwen)]
    done = subprocess.run([*command, "--output", str(qwen)], capture_output=True, text=True)
    assert done.returncode == 2 and "holds something already" in done.stderr and "Traceback" not in done.stderr
