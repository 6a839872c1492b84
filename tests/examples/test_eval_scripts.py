"""The six evaluation scripts of examples/llada: what they start, and that they run to lm-eval's table."""

import json
import pathlib
import re

import pytest
import torch

from dllm.models.tiny import make_tiny_checkpoint
from memdlm import MemoryConfig

PLAIN = ("eval_run.sh", "eval_ruler.sh", "eval_longbench.sh")
ALL = (*PLAIN, *(f"mem/{name}" for name in PLAIN))
FLAGS = (
    *("model_name_or_path", "adapter_model_name_or_path", "base_model_name_or_path", "num_gpu", "max_length"),
    *("max_new_tokens", "steps", "block_size", "cfg", "tasks", "metadata", "extra_model_args", "output_path", "limit"),
)


def test_each_script_starts_its_benchmark_on_the_cpu(started) -> None:
    model = "inclusionAI/LLaDA-MoE-7B-A1B-Base"
    wanted = {
        "eval_run.sh": ("babilong_longctx", {"max_length": 4096, "max_new_tokens": 16, "steps": 16, "block_size": 16}),
        "eval_ruler.sh": ("niah_multivalue,ruler_vt,ruler_cwe", {"max_length": 8192}),
    }
    for script, (tasks, sizes) in wanted.items():
        options = started(f"llada/{script}")
        assert options["--tasks"] == tasks and options["--model"] == "llada" and options["--device"] == "cpu"
        answers = options["--model_args"].pop("answers_dir")
        assert pathlib.Path(answers).parent == pathlib.Path(options["--output_path"])
        assert options["--model_args"] == {"pretrained": model, **sizes}


def test_every_default_task_is_one_of_lm_eval(started) -> None:
    import lm_eval.tasks

    folder = pathlib.Path(lm_eval.tasks.__file__).parent
    files = [path for name in ("babilong", "ruler", "longbench") for path in (folder / name).glob("*.yaml")]
    known = {name for path in files for name in re.findall(r"^(?:task|group): ([\w-]+)", path.read_text(), re.M)}
    counts = {}
    for script in PLAIN:
        tasks = started(f"llada/{script}")["--tasks"].split(",")
        counts[script] = len(set(tasks))
        assert set(tasks) <= known, set(tasks) - known
    assert counts == {"eval_run.sh": 1, "eval_ruler.sh": 3, "eval_longbench.sh": 12}


@pytest.mark.parametrize("script", PLAIN)
def test_a_twin_differs_from_its_script_by_the_published_memory(started, script: str) -> None:
    plain, twin = started(f"llada/{script}"), started(f"llada/mem/{script}")
    assert plain.pop("--output_path") != twin.pop("--output_path")
    plain_args, twin_args = plain.pop("--model_args"), twin.pop("--model_args")
    assert plain == twin
    assert plain_args.pop("answers_dir") != twin_args.pop("answers_dir")
    memory = {name.removeprefix("mem_"): twin_args.pop(name) for name in list(twin_args) if name.startswith("mem_")}
    assert plain_args == twin_args
    assert memory.pop("enabled") is True
    # The defaults of MemoryConfig are the published values.
    assert len(memory) > 5 and memory == {name: vars(MemoryConfig())[name] for name in memory}


def test_flags_win_over_the_script_and_extra_arguments_over_flags(started) -> None:
    options = started(
        "llada/mem/eval_run.sh",
        *(
            "--model_name_or_path",
            "a folder/with,comma",
            "--base_model_name_or_path=base",
            "--adapter_model_name_or_path",
        ),
        *("", "--steps=8", "--cfg", "1.5", "--limit", "2", "--output_path", "here", "--max_length", "512"),
        *("--extra_model_args", 'mem_num_inner_steps=3,mem_inner_target_modules="up_proj,down_proj",ids=[1,2]'),
        *("--extra_model_args", '{"steps": 4, "early_stop": true}'),
    )
    arguments = options["--model_args"]
    assert arguments["pretrained"] == "a folder/with,comma" and arguments["base_model_name_or_path"] == "base"
    assert "adapter_model_name_or_path" not in arguments
    assert (arguments["steps"], arguments["cfg"], arguments["early_stop"]) == (4, 1.5, True)
    assert (arguments["block_size"], arguments["max_length"]) == (16, 512)
    assert (arguments["mem_enabled"], arguments["mem_num_inner_steps"]) == (True, 3)
    assert arguments["mem_inner_target_modules"] == "up_proj,down_proj" and arguments["ids"] == [1, 2]
    assert (options["--limit"], options["--output_path"]) == ("2", "here")


def test_the_default_metadata_goes_with_the_default_tasks_alone(started) -> None:
    assert json.loads(started("llada/eval_run.sh")["--metadata"]) == {"max_seq_lengths": "1k"}
    assert json.loads(started("llada/eval_ruler.sh")["--metadata"]) == {"max_seq_lengths": [4096, 8192]}
    assert "--metadata" not in started("llada/eval_run.sh", "--tasks", "memdlm_babilong")
    given = started("llada/eval_run.sh", "--tasks", "memdlm_babilong", "--metadata", '{"lengths": "2k,4k"}')
    assert json.loads(given["--metadata"]) == {"lengths": "2k,4k"}


def test_several_gpus_are_launched_on_a_free_port(helper) -> None:
    defaults = ["--tasks", "memdlm_ruler", "--output_path", "here", "--"]
    for num_gpu in (1, 4):
        words = helper.command("llada", helper.parse("llada", "eval.sh", [*defaults, "--num_gpu", str(num_gpu)]))
        assert words[:4] == ["accelerate", "launch", "--num_processes", str(num_gpu)]
        launch, rest = words[: words.index("memdlm/eval/llada.py")], words[words.index("memdlm/eval/llada.py") :]
        assert ("--multi_gpu" in launch) == (num_gpu > 1) and "--device" not in rest
        assert (launch[-2:] == ["--main_process_port", "0"]) == (num_gpu > 1)


@pytest.mark.parametrize("script", ALL)
def test_an_unknown_flag_is_one_line_with_all_flags(run_script, script: str) -> None:
    done = run_script(f"llada/{script}", "--step", "4")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and script in done.stderr
    assert all(f"--{name} " in done.stderr for name in FLAGS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", "0"), "argument --steps: 0 must be at least 1"),
        (("--limit", "-1"), "argument --limit: -1 must be above 0"),
        (("--num_gpu", "two"), "argument --num_gpu: invalid whole number value: 'two'"),
        (("--metadata", '{"lengths": 1'), "is no JSON object"),
        (("--extra_model_args", "a=1,b"), "'b' is not KEY=VALUE (put a value with commas in quotes)"),
        (("--tasks",), "argument --tasks: expected one argument"),
    ],
)
def test_a_wrong_value_is_one_line(helper, capsys, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        helper.parse("llada", "eval.sh", ["--tasks", "x", "--", *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpus_that_are_not_there_are_one_line(run_script) -> None:
    done = run_script("llada/eval_run.sh")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "--num_gpu 1, but torch finds 0 CUDA devices" in done.stderr


@pytest.mark.parametrize("script", ALL)
def test_help_lists_the_flags_and_the_defaults(run_script, script: str) -> None:
    done = run_script(f"llada/{script}", "-h")
    assert done.returncode == 0 and done.stderr == ""
    assert all(f"--{name} " in done.stdout for name in FLAGS)
    assert ("mem_inner_rank" in done.stdout) == script.startswith("mem/")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(make_tiny_checkpoint(tmp_path_factory.mktemp("scripts") / "tiny", "llada_moe", num_hidden_layers=2))


@pytest.mark.parametrize(
    "script", [name if name == "mem/eval_ruler.sh" else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_a_script_runs_to_the_table(run_script, checkpoint, tmp_path, script: str) -> None:
    flags = (
        "--model_name_or_path",
        checkpoint,
        "--num_gpu",
        "0",
        "--limit",
        "2",
        "--max_new_tokens",
        "8",
        "--steps",
        "2",
    )
    flags += ("--block_size", "4", "--max_length", "1024", "--output_path", str(tmp_path / "out"))
    task, metadata = "memdlm_ruler_niah_single", '{"lengths": 512, "num_samples": 3}'
    done = run_script(f"llada/{script}", *flags, "--tasks", task, "--metadata", metadata, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(rf"\|{task}\s*\|.*\|acc ", done.stdout) and "|acc@512|" in done.stdout
    (file,) = (tmp_path / "out").glob("*/results_*.json")
    config = json.loads(file.read_text())["config"]
    # 8 tokens in 2 steps, one per block
    assert (config["num_requests"], config["mean_nfe"], config["model_device"]) == (2, 2, "cpu")
    assert config.get("num_memories_written") == (2 if script.startswith("mem/") else None)
    assert len((tmp_path / "out" / "answers" / "answers-0.jsonl").read_text().splitlines()) == 2
