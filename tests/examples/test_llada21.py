"""The training scripts of examples/llada21, run as a user runs them, on a tiny checkpoint and the CPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dllm.models.tiny import make_tiny_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "llada21"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("examples")
    model = make_tiny_checkpoint(folder / "tiny", "llada2_moe", num_hidden_layers=3, num_experts=4, n_group=2)
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


@pytest.fixture(scope="module")
def tokenised(environment) -> None:
    made = _run(
        environment, "data_process.sh", "--output_dir", f"{environment['OUTPUT']}/rows", DATASET=environment["RAW"]
    )
    assert made.returncode == 0, made.stderr[-2000:]


@pytest.mark.parametrize(("script", "objective"), [("run_local.sh", "bd3lm"), ("run_local_memory.sh", "mdlm")])
def test_training_in_four_bits(environment, tokenised, script: str, objective: str) -> None:
    folder = pathlib.Path(environment["OUTPUT"]) / f"{script}-{objective}"
    flags = ["--max_steps", "4", "--logging_steps", "2", "--save_strategy", "no", "--max_length", "128"]
    done = _run(environment, script, *flags, OUTPUT_DIR=str(folder), OBJECTIVE=objective)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4-bit NF4" in done.stderr
    assert (folder / "checkpoint-final" / "adapter_model.safetensors").is_file()
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [entry for entry in logs if "loss" in entry]
    has_memory = script == "run_local_memory.sh"
    assert len(losses) == 2 and all(("memory_gap" in entry) == has_memory for entry in losses)
    assert all({"masked_loss", "edit_loss", "repair_rate"} <= set(entry) for entry in losses)
    metrics = json.loads((folder / "eval_results.json").read_text())
    assert ("eval_memory_loss" in metrics) == has_memory and metrics["eval_ppl"] > 1
    assert {"eval_edit_loss", "eval_repair_rate", "eval_false_edit_rate"} <= set(metrics)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--training_objective", "ar"), "--training_objective ar is unknown; allowed: mdlm, bd3lm"),
        (("--block_size", "8"), "unknown flag --block_size"),
        (
            ("--training_objective=bd3lm", "--mem_enabled", "True", "--mem_inner_target", "disjoint"),
            "clean half carries the answers: use response",
        ),
    ],
)
def test_wrong_flags_end_with_one_line(environment, flags: tuple[str, ...], message: str) -> None:
    command = [sys.executable, str(SCRIPTS / "sft.py"), "--model_name_or_path", environment["MODEL"]]
    command += ["--use_cpu", "True", *flags]
    done = subprocess.run(command, env=environment, cwd=environment["OUTPUT"], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
