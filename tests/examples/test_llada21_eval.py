"""The four evaluation scripts of examples/llada21: what they start, and that one runs to lm-eval's table."""

import json
import pathlib
import re

import pytest

from dllm.models.tiny import make_tiny_checkpoint
from memdlm import MemoryConfig
from memdlm.eval.harness import MemoryBlockEvalConfig

SCRIPTS = ("llada21/eval_run.sh", "llada21/eval_ruler.sh")


def _twin(script: str) -> str:
    return script.replace("/", "/mem/")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_and_its_twin_start_one_benchmark(started, script: str) -> None:
    plain, twin = started(script), started(_twin(script))
    assert plain["--model"] == "llada21" and plain["--device"] == "cpu"
    assert plain["--tasks"] == {SCRIPTS[0]: "babilong_longctx"}.get(script, "niah_multivalue,ruler_vt,ruler_cwe")
    assert plain.pop("--output_path") != twin.pop("--output_path")
    plain_args, twin_args = plain.pop("--model_args"), twin.pop("--model_args")
    assert plain == twin
    assert plain_args.pop("answers_dir") != twin_args.pop("answers_dir")
    memory = {name.removeprefix("mem_"): twin_args.pop(name) for name in list(twin_args) if name.startswith("mem_")}
    assert plain_args == twin_args
    assert memory.pop("enabled") is True
    # The defaults of MemoryConfig are the published values.
    assert len(memory) > 5 and memory == {name: vars(MemoryConfig())[name] for name in memory}
    assert plain_args["pretrained"] == "inclusionAI/LLaDA2.1-mini"
    config = MemoryBlockEvalConfig(**plain_args).sampler_config({})
    assert (config.block_size, config.steps_per_block, config.editing_threshold) == (32, 32, 0.5)


def test_flags_win_over_the_script(started) -> None:
    flags = ("--block_size", "16", "--steps=8", "--cfg", "0", "--extra_model_args", "preset=None,threshold=0.9")
    options = started(SCRIPTS[0], *flags, "--tasks", "memdlm_babilong")
    config = MemoryBlockEvalConfig(**options["--model_args"]).sampler_config({})
    assert (config.block_size, config.steps_per_block, config.threshold) == (16, 8, 0.9)
    assert config.editing_threshold is None and "--metadata" not in options


def test_flags_are_those_of_the_other_family(helper, run_script) -> None:
    words = {
        adapter: [word for action in helper.make_parser(adapter, "x.sh")._actions for word in action.option_strings]
        for adapter in ("llada", "llada21")
    }
    assert words["llada"] == words["llada21"]
    done = run_script(_twin(SCRIPTS[1]), "-h")
    assert done.returncode == 0 and "denoising steps of a block" in done.stdout and "mem_inner_rank" in done.stdout


def test_several_gpus_are_launched_by_path(helper) -> None:
    options = helper.parse("llada21", "x.sh", ["--tasks", "x", "--output_path", "y", "--", "--num_gpu", "2"])
    words = helper.command("llada21", options)
    assert words[:4] == ["accelerate", "launch", "--num_processes", "2"] and "memdlm/eval/llada21.py" in words


def test_the_memory_twin_runs_to_the_table(run_script, tmp_path) -> None:
    sizes = {"num_hidden_layers": 2, "num_experts": 4, "n_group": 2, "topk_group": 1}
    checkpoint = str(make_tiny_checkpoint(tmp_path / "tiny", "llada2_moe", **sizes))
    task, metadata = "memdlm_ruler_niah_single", '{"lengths": 512, "num_samples": 3}'
    done = run_script(
        _twin(SCRIPTS[1]),
        *("--model_name_or_path", checkpoint, "--num_gpu", "0", "--limit", "2", "--max_new_tokens", "8"),
        *("--max_length", "1024", "--tasks", task, "--metadata", metadata, "--output_path", str(tmp_path / "out")),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(rf"\|{task}\s*\|.*\|acc ", done.stdout) and "|acc@512|" in done.stdout
    (file,) = pathlib.Path(tmp_path / "out").glob("*/results_*.json")
    config = json.loads(file.read_text())["config"]
    assert (config["num_requests"], config["num_memories_written"], config["model"]) == (2, 2, "llada21")
