"""The training scripts of examples/fast_dllm_v2, run as a user runs them, on a tiny checkpoint and the CPU."""

import json
import os
import pathlib
import runpy
import subprocess
import sys

import pytest

from dllm.models.auto import load_model
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils import parse_args
from dllm.utils.parsing import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "fast_dllm_v2"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("examples")
    model = make_tiny_checkpoint(folder / "tiny", "fast_dllm_v2", hidden_size=32, num_hidden_layers=2)
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(3, 20)]
    data = folder / "count.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MODEL": str(model),
        "DATASET": f"{data}[train,test:4]",
        "OUTPUT": str(folder),
        "NUM_GPU": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def test_plain_fine_tuning(environment) -> None:
    folder = pathlib.Path(environment["OUTPUT"]) / "plain"
    flags = ["--max_steps", "4", "--logging_steps", "2", "--save_strategy", "no", "--max_length", "256"]
    flags += ["--gradient_accumulation_steps", "1", "--learning_rate", "1e-3"]
    done = subprocess.run(
        ["bash", str(SCRIPTS / "run_local.sh"), *flags],
        env={**environment, "OUTPUT_DIR": str(folder)},
        cwd=environment["OUTPUT"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in logs if "loss" in entry]) == 2
    # Every token once, uniformly: near log of the vocabulary at first, and an evaluation of the same kind.
    metrics = json.loads((folder / "eval_results.json").read_text())
    assert 3 < metrics["eval_loss"] < 8 and metrics["eval_ppl"] > 1
    model = load_model(str(folder / "checkpoint-final"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.fixture(scope="module")
def published():
    """The class of the plain objective's flags."""
    return runpy.run_path(str(SCRIPTS / "sft.py"))["BD3LMArguments"]


@pytest.mark.parametrize(
    "flags, complements, weights",
    [
        ((), True, "uniform"),
        (("--complementary_masks", "False"), False, "uniform"),
        (("--complementary_masks", "True"), True, "uniform"),
        (("--mem_enabled", "True"), False, "uniform"),
        (("--edit_ratio", "0.1"), False, "uniform"),
        (("--loss_weight_type", "scheduler"), False, "scheduler"),
    ],
)
def test_the_published_objective_is_the_default(published, flags, complements: bool, weights: str) -> None:
    (args,) = parse_args(published, args=["--output_dir", "out", "--use_cpu", "True", *flags])
    assert args.complementary_masks is complements and args.loss_weight_type == weights


def test_what_excludes_complementary_masks_is_refused_beside_them(published, capsys) -> None:
    with pytest.raises((InputError, SystemExit)):
        words = ["--output_dir", "out", "--use_cpu", "True", "--mem_enabled", "True", "--complementary_masks", "True"]
        parse_args(published, args=words)
    assert "complementary_masks and mem_enabled exclude each other" in capsys.readouterr().err


def test_flags_of_another_objective_end_with_one_line(environment) -> None:
    command = [sys.executable, str(SCRIPTS / "sft.py"), "--model_name_or_path", environment["MODEL"]]
    command += ["--use_cpu", "True", "--relay_threshold", "0.9"]
    done = subprocess.run(command, env=environment, cwd=environment["OUTPUT"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown flag --relay_threshold" in done.stderr and "Traceback" not in done.stderr
