"""Relay by the training scripts: run_relay.sh as a user runs it, the arms, memory, LoRA and LLaDA in this process."""

import json
import os
import pathlib
import runpy
import subprocess
import sys

import pytest

from dllm.models.auto import load_model
from dllm.models.relay_norm import relay_keys
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils import parse_args
from dllm.utils.parsing import InputError
from memdlm.decoding import Decoder, LoadFlags, MemoryFlags
from memdlm.relay import RelayBlockSampler, RelayMDLMSampler

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = {"fast_dllm_v2": ROOT / "examples/fast_dllm_v2/sft.py", "llada_moe": ROOT / "examples/llada/sft.py"}
SIZES = {
    "fast_dllm_v2": {"hidden_size": 32, "num_hidden_layers": 2, "bd_size": 8},
    "llada_moe": {"hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4},
}
SAMPLERS = {"fast_dllm_v2": RelayBlockSampler, "llada_moe": RelayMDLMSampler}
FLAGS = ("--max_steps", "3", "--logging_steps", "1", "--save_strategy", "no", "--max_length", "128")
FLAGS = (*FLAGS, "--gradient_accumulation_steps", "1", "--learning_rate", "1e-2")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {family: str(make_tiny_checkpoint(folder / family, family, **sizes)) for family, sizes in SIZES.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(3, 20)]
    path = tmp_path_factory.mktemp("data") / "count.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{path}[train,test:4]"


@pytest.fixture
def train(models, data, tmp_path, monkeypatch):
    """A function (family, *flags) -> (logs, metrics, folder of the model), by the script in this process."""

    def run(family: str, *flags: str):
        folder = tmp_path / "out"
        words = ["--training_objective", "relay", "--model_name_or_path", models[family], "--dataset_args", data]
        words += ["--output_dir", str(folder), "--use_cpu", "True", "--disable_tqdm", "True", *FLAGS, *flags]
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS[family]), *words])
        runpy.run_path(str(SCRIPTS[family]))["main"]()
        logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        metrics = json.loads((folder / "eval_results.json").read_text())
        return [entry for entry in logs if "loss" in entry], metrics, folder / "checkpoint-final"

    return run


def _sampler(folder: pathlib.Path):
    words = ["--model_name_or_path", str(folder), "--device", "cpu"]
    return Decoder.from_flags(*parse_args(LoadFlags, MemoryFlags, args=words)).sampler


def test_the_published_run_on_a_cpu(models, data, tmp_path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **{"MODEL": models["fast_dllm_v2"], "DATASET": data, "NUM_GPU": "0", "OUTPUT_DIR": str(tmp_path / "out")},
        **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    }
    done = subprocess.run(
        ["bash", str(ROOT / "examples/fast_dllm_v2/run_relay.sh"), *FLAGS],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    first, *_, last = (entry for entry in logs if "loss" in entry)
    assert first["loss"] == pytest.approx(first["relay_loss_1"] + first["relay_loss_2"], abs=1e-3)
    assert first["relay_mask_ratio_1"] == 1 and first["relay_refills"] == 2
    # The gate begins at zero; its weight moves once there is a state to weigh.
    assert last["relay_gate_norm"] > 0 and last["relay_bias_norm"] > 0
    assert isinstance(_sampler(tmp_path / "out" / "checkpoint-final"), RelayBlockSampler)


@pytest.mark.parametrize(
    ("arm", "flags"),
    [("relay_sg", ()), ("rollout", ()), ("mask_uniform", ("--complementary_masks", "True"))],
)
def test_what_it_is_compared_with(train, arm: str, flags: tuple[str, ...]) -> None:
    logs, metrics, folder = train("fast_dllm_v2", "--relay_arm", arm, *flags)
    assert len(logs) == 3 and 1 < metrics["eval_loss"] < 8
    assert ("eval_relay_loss_2" in metrics) == (arm != "mask_uniform")
    has_relay = relay_keys(load_model(str(folder)).config) is not None
    assert has_relay == (arm == "relay_sg") == ("relay_gate_norm" in logs[-1])


@pytest.mark.parametrize("family", SIZES)
def test_with_a_memory_and_adapters(train, models, family: str) -> None:
    memory = ("--mem_enabled", "True", "--mem_inner_rank", "4", "--mem_inner_layer_fraction", "0.5")
    logs, metrics, folder = train(family, *memory, "--lora", "True", "--lora_r", "2", "--relay_gate", "default")
    assert all("memory_gap" in entry and entry["relay_gate_norm"] > 0 for entry in logs)
    assert "eval_memory_loss" in metrics and "eval_relay_loss_2" in metrics
    assert (folder / "adapter_model.safetensors").is_file()
    sampler = _sampler(folder)
    assert isinstance(sampler, SAMPLERS[family])
    assert float(sampler.channel.norm.bias.abs().sum()) > 0  # the adapter's own norm, trained


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--relay_arm", "sg"), "relay_arm"),
        (("--relay_arm", "rollout", "--relay_gate", "default"), "relay_gate"),
        (("--relay_num_steps", "2", "--relay_bptt_window", "3"), "relay_bptt_window must be at most relay_num_steps=2"),
        (("--complementary_masks", "True"), "complementary_masks belongs to random masks"),
        (("--mem_inner_lr", "1.0"), "mem_inner_lr has no effect without --mem_enabled True"),
    ],
)
def test_what_cannot_be_is_said(train, capsys, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises((InputError, SystemExit)) as refused:
        train("fast_dllm_v2", *flags)
    assert message in f"{refused.value} {capsys.readouterr().err}"
