"""The scripts of examples/llada, run as a user runs them, on a tiny checkpoint and the CPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dllm.models.tiny import make_tiny_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "llada"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("examples")
    model = make_tiny_checkpoint(folder / "tiny", "llada_moe", num_hidden_layers=3, num_experts=4)
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(3, 40)]
    data = folder / "count.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MODEL": str(model),
        "DATASET": f"{folder}/rows[train,test:4]",
        "RAW": f"{data}[train,test:4]",
        "OUTPUT": str(folder),
        "NUM_GPU": "0",
        "NUM_PROC": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _run(environment: dict[str, str], script: str, *flags: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *flags],
        env={**environment, **changes},
        cwd=environment["OUTPUT"],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_process_then_train_in_four_bits_without_and_with_memory(environment) -> None:
    folder = pathlib.Path(environment["OUTPUT"])
    made = _run(environment, "data_process.sh", "--output_dir", str(folder / "rows"), DATASET=environment["RAW"])
    assert made.returncode == 0, made.stderr[-2000:]
    flags = ["--max_steps", "4", "--logging_steps", "2", "--save_strategy", "no", "--max_length", "128"]
    for script, name in (("run_local.sh", "plain"), ("run_local_memory.sh", "memory")):
        done = _run(environment, script, *flags, OUTPUT_DIR=str(folder / name))
        assert done.returncode == 0, done.stderr[-2000:]
        assert "4-bit NF4" in done.stderr
        assert (folder / name / "checkpoint-final" / "adapter_model.safetensors").is_file()
        logs = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
        losses = [entry for entry in logs if "loss" in entry]
        assert len(losses) == 2 and all(("memory_gap" in entry) == (name == "memory") for entry in losses)
        metrics = json.loads((folder / name / "eval_results.json").read_text())
        assert ("eval_memory_loss" in metrics) == (name == "memory") and metrics["eval_ppl"] > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mem_inner_lrr", "0.1"), "unknown flag --mem_inner_lrr; the closest known one is --mem_inner_lr"),
        (("--mem_scope", "row"), "mem_scope has no effect without --mem_enabled True"),
        (("--lora", "False"), "4-bit weights cannot be trained themselves: add --lora True"),
    ],
)
def test_wrong_flags_end_with_one_line(environment, flags: tuple[str, ...], message: str) -> None:
    command = [
        sys.executable,
        str(SCRIPTS / "sft.py"),
        "--model_name_or_path",
        environment["MODEL"],
        "--use_cpu",
        "True",
    ]
    command += ["--load_in_4bit", "True", "--lora", "True", *flags]
    done = subprocess.run(command, env=environment, cwd=environment["OUTPUT"], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
