"""examples/llada/pt.py and run_pt.sh, run as a user runs them, on a tiny configuration and the CPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from dllm.models.auto import load_model
from dllm.models.scratch import new_model
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.args import ModelArguments
from dllm.utils.parsing import InputError

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "examples" / "llada"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pretraining")
    model = make_tiny_checkpoint(folder / "tiny", "llada_moe", num_hidden_layers=2, num_experts=4)
    (model / "model.safetensors").unlink()  # a configuration and a tokenizer are enough to start from
    texts = [" ".join(str(n * n) for n in range(start, start + 5 + start % 17)) for start in range(60)]
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MODEL": str(model),
        "DATASET": f"{data}[train]",
        "OUTPUT": str(folder),
        "NUM_GPU": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _run(environment, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, cwd=environment["OUTPUT"], capture_output=True, text=True, timeout=300
    )


def test_pretrains_from_scratch_and_goes_on_from_the_result(environment) -> None:
    folder = pathlib.Path(environment["OUTPUT"])
    flags = ["--from_scratch", "True", "--max_steps", "12", "--logging_steps", "6", "--warmup_steps", "0"]
    flags += ["--max_length", "64", "--save_strategy", "no", "--learning_rate", "2e-2", "--output_dir", f"{folder}/a"]
    done = _run(environment, ["bash", str(SCRIPTS / "run_pt.sh"), *flags])
    assert done.returncode == 0, done.stderr[-2000:]
    logs = json.loads((folder / "a" / "trainer_state.json").read_text())["log_history"]
    first, second = (entry["loss"] for entry in logs if "loss" in entry)
    assert second < first - 1  # in nats; digits are soon known

    final = folder / "a" / "checkpoint-final"
    load_model(str(final))
    command = [sys.executable, str(SCRIPTS / "pt.py"), "--model_name_or_path", str(final), "--use_cpu", "True"]
    command += ["--dataset_args", environment["DATASET"].replace("[train]", "[train,test:9]"), "--max_length", "64"]
    command += ["--packing", "True", "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no"]
    command += ["--mem_enabled", "True", "--output_dir", f"{folder}/b", "--per_device_train_batch_size", "4"]
    done = _run(environment, command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "packing: " in done.stderr and "% full" in done.stderr
    logs = json.loads((folder / "b" / "trainer_state.json").read_text())["log_history"]
    (loss, _) = (entry for entry in logs if "loss" in entry)
    assert loss["loss"] < first - 1 and "memory_gap" in loss
    assert json.loads((folder / "b" / "eval_results.json").read_text())["eval_ppl"] > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--streaming", "True"), "give --max_steps"),
        (("--mem_enabled", "True", "--mem_inner_target", "prompt"), "plain text has no prompt"),
        (("--packing", "True", "--mem_enabled", "True", "--mem_scope", "row"), "mem_scope=row and packing"),
        (("--packing", "True", "--attn_implementation", "flex_attention"), "flex_attention trains on a GPU only"),
        (("--lora", "True"), "--lora needs weights that were trained before"),
    ],
)
def test_wrong_flags_end_with_one_line(environment, flags: tuple[str, ...], message: str) -> None:
    command = [sys.executable, str(SCRIPTS / "pt.py"), "--model_name_or_path", environment["MODEL"]]
    command += ["--dataset_args", environment["DATASET"], "--use_cpu", "True", "--output_dir", "bad", *flags]
    done = _run(environment, [*command, "--max_length", "64", "--from_scratch", "True"])
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert "tokenising" not in done.stderr  # refused before anything is loaded


def test_a_new_model_depends_on_the_seed_alone(environment) -> None:
    args = ModelArguments(environment["MODEL"])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second, other = (new_model(args, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state) and first.dtype == torch.float32
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    for flag in ("load_in_4bit", "lora"):
        with pytest.raises(InputError, match=f"--{flag} needs weights that were trained before"):
            new_model(ModelArguments(environment["MODEL"], **{flag: True}))
