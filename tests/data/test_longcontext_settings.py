"""The metadata form of the long-context tasks, and the tokenizer that it leads to."""

import dataclasses
import json

import pytest
from transformers import AutoTokenizer

from dllm.data.longcontext import LongContextSettings, babilong_dataset, parse_lengths, ruler_dataset
from dllm.data.longcontext.settings import read_metadata
from dllm.utils.parsing import InputError


@pytest.mark.parametrize(
    ("value", "lengths"),
    [
        ("0k", (0,)),
        ("1k", (1024,)),
        (512, (512,)),
        ("512", (512,)),
        ("2k, 1k", (1024, 2048)),
        (["0k", 300, "4K"], (0, 300, 4096)),
        ((1024,), (1024,)),
    ],
)
def test_lengths_in_every_form(value, lengths):
    assert parse_lengths(value) == lengths
    assert LongContextSettings(lengths=value).lengths == lengths


@pytest.mark.parametrize("value", ["", "k", "1.5k", "1k,", -1, 1.0, True, None, [], [[1]], "1m", "1k,1024", ["\u0661"]])
def test_what_is_no_length_is_refused(value):
    with pytest.raises(InputError, match="length"):
        parse_lengths(value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples=0: must be at least 1"),
        ({"num_samples": 1.0}, "num_samples=1.0: must be a whole number"),
        ({"num_samples": True}, "num_samples=True"),
        ({"questions_fit": 0}, "questions_fit=0: must be at least 1"),
        ({"data_seed": "7"}, "data_seed='7': must be a whole number"),
        ({"data_dir": 3}, "data_dir=3: must be a path"),
        ({"tokenizer": ""}, "tokenizer='': must be a path"),
        ({"depths": 0.5}, "depths=0.5: must be a list"),
        ({"depths": []}, "must be a list of numbers from 0 to 1"),
        ({"depths": [0, 1.5]}, "must be a list of numbers from 0 to 1"),
        ({"depths": "0,1"}, "must be a list of numbers from 0 to 1"),
        ({"depths": [0, 0.0]}, "a depth is given twice"),
    ],
)
def test_wrong_values_are_refused(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        LongContextSettings(**settings)
    assert "\n" not in str(caught.value)


def test_every_setting_arrives(tiny_folder):
    given = {
        "lengths": "2k",
        "num_samples": 3,
        "data_seed": 7,
        "questions_fit": 600,
        "tokenizer": str(tiny_folder),
        "data_dir": "somewhere",
        "depths": [0.5],
    }
    defaults = LongContextSettings()
    assert set(given) == {item.name for item in dataclasses.fields(LongContextSettings)}
    settings, _ = read_metadata(given)
    assert dataclasses.asdict(settings) == {**given, "lengths": (2048,), "depths": (0.5,)}
    assert not any(value == defaults.__dict__[name] for name, value in dataclasses.asdict(settings).items())


@pytest.fixture
def memory_arguments():
    """Names of the memory's arguments, which are known once an adapter is loaded."""
    pytest.importorskip("lm_eval")
    from memdlm.eval.harness import MemoryEvalConfig

    return [item.name for item in dataclasses.fields(MemoryEvalConfig) if item.name.startswith("mem_")]


@pytest.mark.usefixtures("memory_arguments")
def test_arguments_of_the_model_are_let_through_and_other_keys_refused(tiny_folder):
    model = {"pretrained": str(tiny_folder), "steps": 4, "block_size": 8, "mc_num": 2, "mem_num_inner_steps": 3}
    model |= {"load_in_4bit": False, "version": 1.0, "config_source": "x.yaml", "seed": 5}
    settings, tokenizer = read_metadata(model)
    assert settings == LongContextSettings()  # the model's own seed changes no document
    assert tokenizer.mask_token is not None
    for task, make in (("memdlm_ruler_vt", ruler_dataset), ("memdlm_babilong_qa1", babilong_dataset)):
        with pytest.raises(InputError) as caught:
            make(task, **model, lenghts="1k", max_seq_lengths=[4096])
        known = "known: lengths, num_samples, data_seed, tokenizer, data_dir, depths, questions_fit"
        assert str(caught.value).startswith(f"{task}: unknown metadata lenghts, max_seq_lengths; {known}")


@pytest.mark.parametrize("key", ["mem_foo", "mem_", "mem_inner_lrr"])
def test_of_the_memory_too_only_known_arguments_pass(tiny_folder, memory_arguments, key):
    assert len(memory_arguments) > 20
    read_metadata({"pretrained": str(tiny_folder), **dict.fromkeys(memory_arguments, 1)})
    with pytest.raises(InputError, match=f"unknown metadata {key}; known: lengths"):
        read_metadata({"pretrained": str(tiny_folder), key: 1})


def test_the_tokenizer_of_the_metadata_goes_before_that_of_the_model(tiny_folder, tmp_path):
    other = tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_folder))
    tokenizer.add_tokens(["xyzzy"])
    tokenizer.save_pretrained(other)
    _, found = read_metadata({"pretrained": str(tiny_folder), "tokenizer": str(other)})
    assert len(found) == len(tokenizer) == len(read_metadata({"pretrained": str(tiny_folder)})[1]) + 1


def test_an_adapter_brings_the_tokenizer_of_its_base(tiny_folder, tmp_path):
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    config["base_model_name_or_path"] = "somewhere/else"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    metadata = {"pretrained": str(tmp_path), "base_model_name_or_path": str(tiny_folder)}
    (doc,) = ruler_dataset("memdlm_ruler_vt", **metadata, num_samples=1, lengths="2k")["test"]
    (same,) = ruler_dataset("memdlm_ruler_vt", pretrained=str(tiny_folder), num_samples=1, lengths="2k")["test"]
    assert doc == same


def test_without_a_usable_tokenizer_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match="memdlm_ruler_vt: no tokenizer to count tokens with: give tokenizer in the"):
        ruler_dataset("memdlm_ruler_vt")
    with pytest.raises(InputError, match=r"absent cannot be read"):
        ruler_dataset("memdlm_ruler_vt", tokenizer=str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"absent is no folder here"):
        ruler_dataset("memdlm_ruler_vt", pretrained=str(tmp_path / "absent"))
