"""Tiny checkpoints: files that load offline, a tokenizer that loses nothing, a template whose prompt is a prefix."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dllm.models import get_spec, load_config
from dllm.models.tiny import main, make_tiny_checkpoint

TEXT = "The memory of a model is not the model's memory. " * 20 + "def f(x):\n    return x\n"
STRINGS = [
    "",
    " two  spaces and a tab\t.\r\n\n\n end ",
    "Gr\u00fc\u00dfe, se\u00f1or \u2014 \u4f60\u597d\uff0c\u4e16\u754c",
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467 \u0000 \u200b \U0010ffff e\u0301",
    "    indented\n\n\tcode(x)[1] != 2**3 # !?",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        family: make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / family, family, text=TEXT, vocab_size=300)
        for family in ("llada", "llada_moe", "llada2_moe", "fast_dllm_v2", "rotary_encoder")
    }


@pytest.fixture
def folder(folders, family):
    return folders[family]


def test_model_and_tokenizer_load(folder, family):
    config, spec = load_config(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert spec is get_spec(family)
    assert len(tokenizer) == config.vocab_size <= 300
    assert tokenizer.mask_token == spec.mask_token and tokenizer.mask_token_id == config.mask_token_id
    assert tokenizer.pad_token_id == config.pad_token_id and tokenizer.pad_token == spec.pad_token
    assert tokenizer.eos_token_id == config.eos_token_id and tokenizer.eos_token == spec.eos_token
    assert tokenizer.bos_token_id == config.bos_token_id
    assert tokenizer.model_max_length == config.max_position_embeddings
    for token in spec.special_tokens:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
        assert token in tokenizer.all_special_tokens
    ids = torch.tensor([tokenizer.encode("some text")])
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))


@pytest.mark.parametrize("text", STRINGS)
def test_any_text_comes_back(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_text_with_special_tokens_comes_back(folder, family):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "a {} b{}{} c".format(*get_spec(family).special_tokens[:3])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("answer", ["x", "  spaces around \n", "\n\nlines", "12 + 3", "", "\u4f60\u597d", "- item"])
def test_the_prompt_is_a_prefix_of_the_conversation(folder, family, answer):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is f?\n"}]
    whole = [*prompt, {"role": "assistant", "content": answer}]
    first = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    both = tokenizer.apply_chat_template(whole)["input_ids"]
    assert both[: len(first)] == first
    end = tokenizer.convert_tokens_to_ids(get_spec(family).end_of_turn_token)
    closed = both.index(end, len(first))
    assert tokenizer.decode(both[len(first) : closed]) == answer.strip()
    assert tokenizer.decode(both[closed + 1 :]).strip() == ""


def test_the_same_arguments_give_the_same_files(folder, family, tmp_path):
    state = torch.get_rng_state()
    again = make_tiny_checkpoint(tmp_path / "again", family, text=TEXT, vocab_size=300)
    assert torch.equal(torch.get_rng_state(), state)
    for file in sorted(folder.iterdir()):
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    other = make_tiny_checkpoint(tmp_path / "other", family, text=TEXT, vocab_size=300, seed=1)
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


def test_default_text_and_overrides(tmp_path, capsys):
    output = tmp_path / "made"
    arguments = ["--family", "llada_moe", "--output", str(output), "--hidden_size", "32", "--qk_layernorm", "False"]
    assert main([*arguments, "--vocab_size", "700", "--moe_layer_freq", "[0, 1, 1, 1]"]) == 0
    assert str(output) in capsys.readouterr().out
    config = json.loads((output / "config.json").read_text())
    assert (config["hidden_size"], config["vocab_size"], config["qk_layernorm"]) == (32, 700, False)
    assert config["moe_layer_freq"] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--hiden_size", "32"], "no setting hiden_size"),
        (["--family", "gpt"], "choose from llada, llada_moe"),
        (["--vocab_size", "200"], "too small"),
        (["--hidden_size"], "pairs"),
        (["--text", "/nowhere/text.txt"], "/nowhere/text.txt"),
        (["--num_experts_per_tok", "99"], "num_experts_per_tok=99"),
    ],
)
def test_one_line_errors(tmp_path, capsys, arguments, message):
    output = tmp_path / "made"
    assert main(["--output", str(output), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not output.exists()


def test_a_used_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["--output", str(tmp_path)]) == 2
    assert "holds something already" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
