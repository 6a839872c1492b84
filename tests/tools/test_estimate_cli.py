"""The command line of the estimate, and that docs/scaling.md shows what it prints."""

import functools
import pathlib
import re

import pytest

from dllm.tools.estimate import __main__ as tool
from dllm.utils.parsing import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]
DENSE = "scripts/bench/configs/llada_8b.json"


@pytest.fixture
def run(monkeypatch, capsys):
    """A function (flags) -> what the tool prints, run in the root of the repository."""
    monkeypatch.chdir(ROOT)

    def call(flags: str) -> str:
        monkeypatch.setattr("sys.argv", ["estimate", *flags.split()])
        tool.main()
        return capsys.readouterr().out

    return call


def test_docs_show_what_the_tool_prints(run, monkeypatch) -> None:
    # A model of 15,000 experts takes seconds to build.
    monkeypatch.setattr(tool, "read_shape", functools.cache(tool.read_shape))
    text = (ROOT / "docs" / "scaling.md").read_text()
    commands = re.findall(r"^python -m dllm\.tools\.estimate (--.*)$", text, re.MULTILINE)
    assert len(commands) >= 6
    for flags in commands:
        shown = run(flags)
        # Libraries that are loaded meanwhile may have printed something before it.
        table = shown[re.search(r"^\w+: [\d.]+ billion", shown, re.MULTILINE).start() :]
        assert table.strip() in text, flags


def test_every_term_of_a_case(run) -> None:
    flags = f"--model_name_or_path {DENSE} --engine zero2 --num_gpus 8 --max_length 4096 --terms True --markdown True"
    lines = [line for line in run(flags).splitlines() if line.startswith("|")]
    headings, values = ([cell.strip() for cell in lines[index].strip("|").split("|")] for index in (0, 2))
    row = dict(zip(headings, values, strict=True))
    number = 8_015_581_184
    assert float(row["weights"]) == round(2 * number / 2**30, 2)
    assert float(row["gradients"]) == round(2 * number / 8 / 2**30, 2)
    assert float(row["optimizer"]) == round(12 * number / 8 / 2**30, 2)
    assert float(row["GiB sent per step"]) == round(2 * 7 / 8 * 2 * number / 2**30, 2)
    assert row["fits"] == "yes" and row["length"] == "4,096"
    # The optimizer step: bfloat16 weights, 12 bytes of float32 and 2 + 2 + 4 of gradients for an eighth of the numbers.
    assert float(row["peak + overhead"]) == pytest.approx((2 + 12 / 8 + 8 / 8) * number / 2**30 + 2, abs=0.06)


def test_the_end_of_the_forward_may_take_more_than_the_step(run) -> None:
    flags = f"--model_name_or_path {DENSE} --engine zero2 --num_gpus 8 --max_length 32768 --terms True --markdown True"
    lines = [line for line in run(flags).splitlines() if line.startswith("|")]
    headings, values = ([cell.strip() for cell in lines[index].strip("|").split("|")] for index in (0, 2))
    row = dict(zip(headings, values, strict=True))
    parts = sum(float(row[name]) for name in ("weights", "optimizer", "buffers", "activations", "head"))
    assert float(row["peak + overhead"]) == pytest.approx(parts + 2, abs=0.1)


def test_all_leaves_out_what_cannot_be(run) -> None:
    shown = run(f"--model_name_or_path {DENSE} --lora True --load_in_4bit True --max_length 4096 --markdown True")
    assert re.findall(r"^\| (\w+) \| 8 ", shown, re.MULTILINE) == ["ddp", "zero1", "zero2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": "4096,"}, r"--max_length '4096,': give whole numbers of at least 2"),
        ({"num_gpus": "0"}, r"--num_gpus '0': give whole numbers of at least 1"),
        ({"lora_r": 8}, "--lora_r has no effect without --lora"),
        ({"inner_steps": 3}, "--inner_steps has no effect without --fast_weight_rank"),
        ({"loss_share": 0.0}, r"--loss_share must lie in \(0, 1\]"),
        ({"optim": "sgd"}, "--optim 'sgd' is unknown; allowed: adamw, adamw_8bit"),
        ({"overhead_gib": float("nan")}, "--overhead_gib must be a finite number, got nan"),
        ({"gpu_memory_gib": float("inf")}, "--gpu_memory_gib must be a finite number, got inf"),
        ({"dtype": "int8"}, "--dtype 'int8' is unknown"),
    ],
)
def test_wrong_settings(settings, message) -> None:
    with pytest.raises(InputError, match=message):
        tool.EstimateArguments("model", **settings)


def test_wrong_engines_and_models_are_one_line(run, capsys, tmp_path) -> None:
    for flags, message in (
        (f"--model_name_or_path {DENSE} --engine zero5", "engine 'zero5' is unknown; allowed: ddp"),
        (f"--model_name_or_path {tmp_path}", "config.json of"),
        ("--model_name_or_path /no/such/model", "there is no folder /no/such/model: give one with a config.json"),
        ("--model_name_or_path ./absent", "there is no folder ./absent"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(flags)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.count("\n") == 1
