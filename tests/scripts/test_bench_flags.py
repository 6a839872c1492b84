"""What the benchmarks of decoding and of writing a memory refuse or read from their flags; run in this process."""

import importlib.util
import json
import pathlib
import sys

import pytest

from dllm.utils.parsing import InputError

BENCH = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "bench"
SIZES = ("--hidden_size", "32", "--num_layers", "2", "--num_heads", "4", "--vocab_size", "200", "--rounds", "1")
SIZES = (*SIZES, "--warmup_rounds", "0")


def _run(script: str, monkeypatch, *flags: str) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(sys, "argv", [script, *SIZES, *flags])
    spec = importlib.util.spec_from_file_location(f"bench_{script}", BENCH / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.main()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("mem_inner_target", "prompt"),
        ("mem_pad_unmask_mode", "none"),
        ("mem_mask_ratio_epsilon", "0.001"),
        ("mem_distill_temperature", "1"),
        ("mem_inner_gradient_checkpointing", "false"),
    ],
)
def test_adapt_has_no_flags_that_do_nothing(monkeypatch, capsys, flag: str, value: str) -> None:
    with pytest.raises(SystemExit):
        _run("adapt", monkeypatch, "--prompt_length", "20", f"--{flag}", value)
    assert f"unknown flag --{flag}" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["max_new_tokens", "steps"])
def test_adapt_refuses_settings_of_decoding_when_nothing_is_decoded(monkeypatch, flag: str) -> None:
    with pytest.raises(InputError, match="no effect with --batch_size 1"):
        _run("adapt", monkeypatch, "--prompt_length", "20", f"--{flag}", "4")


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_adapt_stops_when_a_memory_could_not_be_written(monkeypatch, batch_size: str) -> None:
    with pytest.raises(InputError, match="could not be written: no position of its 1 tokens") as error:
        flags = ("--prompt_length", "1", "--mem_prompt_mask_ratio", "0.001", "--batch_size", batch_size)
        _run("adapt", monkeypatch, *flags)
    assert "\n" not in str(error.value)


def test_sampling_strips_the_names_of_the_caches(monkeypatch, tmp_path) -> None:
    path = tmp_path / "out.json"
    flags = ("--prompt_length", "8", "--max_new_tokens", "4", "--block_size", "2", "--caches", "none, prefix")
    _run("sampling", monkeypatch, *flags, "--json", str(path))
    assert list(json.loads(path.read_text())["sides"]) == ["all logits", "cache none", "cache prefix"]
