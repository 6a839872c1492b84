"""4-bit + LoRA with memory, with the flags of the training scripts: really quantised, it learns, evaluations in between
change nothing, and adapters come back over the 4-bit base."""

import importlib.util
import json
import logging
import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from lm_eval.api.instance import Instance
from safetensors.torch import load_file
from torch import nn

from dllm.core.trainers.artifacts import trained_over_4bit
from dllm.models import quant, spec_of
from dllm.models.auto import load_model
from dllm.models.backbone import unwrap
from dllm.models.lora import LoraSettings
from dllm.models.tiny import make_tiny_checkpoint
from dllm.tools.merge_adapter import MergeArguments, merge_adapter
from dllm.utils import one_line_errors
from memdlm import fine_tune as scripts
from memdlm.eval.harness import MemoryMDLMHarness
from memdlm.trainer import MemDLMTrainer

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Widths are multiples of 64: others are unpacked with wrong scales on CPUs. Larger weights than usual: the frozen head
# must be able to say something.
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_experts": 4, "vocab_size": 320, "initializer_range": 0.1}
CHECKPOINTS = {
    "llada": ("llada_moe", {**SIZES, "expert_intermediate_size": 64}),
    "llada21": ("llada2_moe", {**SIZES, "moe_intermediate_size": 64, "n_group": 2}),
}
SENTENCE = "the cat sat on the mat "
TEXT = f"Say it twice: {SENTENCE * 2}" * 3
FLAGS = {
    "max_steps": "30",
    "logging_steps": "1",
    "save_strategy": "no",
    "max_length": "96",
    "truncation": "right",
    "load_preprocessed_data": "False",
    "per_device_train_batch_size": "4",
    "gradient_accumulation_steps": "1",
    "learning_rate": "3e-3",
    "lr_scheduler_type": "constant",
    "warmup_steps": "0",
    "disable_tqdm": "True",
}
EVALUATED = {"eval_strategy": "steps", "eval_steps": "10"}
# Stands in for `accelerate` and writes down what the script would start.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$CALL"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    """Folder with a tiny checkpoint for each folder of scripts, and rows that are easy to learn."""
    folder = tmp_path_factory.mktemp("4bit")
    for script, (family, sizes) in CHECKPOINTS.items():
        make_tiny_checkpoint(folder / script, family, TEXT, **sizes)
    rows = [{"instruction": f"Say it {n} times.", "output": SENTENCE * (n % 4 + 1)} for n in range(36)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "accelerate").write_text(STAND_IN)
    (folder / "accelerate").chmod(0o755)
    return folder


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def load_script(script: str):
    """The module behind the training scripts of a folder."""
    spec = importlib.util.spec_from_file_location(f"sft_{script}", ROOT / "examples" / script / "sft.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


def launched(made: pathlib.Path, script: str, name: str, **flags: str) -> list[str]:
    """The words that run_local_memory.sh starts Python with, from the path of sft.py on."""
    changes = {"PATH": f"{made}{os.pathsep}{os.environ['PATH']}", "CALL": str(made / "call"), "NUM_GPU": "0"}
    changes |= {"MODEL": str(made / script), "OUTPUT_DIR": str(made / name)}
    changes |= {"DATASET": f"{made}/rows.jsonl[train,test:4]"}
    words = [word for key, value in {**FLAGS, **flags}.items() for word in (f"--{key}", value)]
    command = ["bash", str(ROOT / "examples" / script / "run_local_memory.sh"), *words]
    subprocess.run(command, env={**os.environ, **changes}, check=True, timeout=60)
    started = (made / "call").read_text().split("\0")[:-1]
    assert started[0] == "launch" and "--cpu" in started
    return started[started.index(f"examples/{script}/sft.py") :]


@pytest.fixture(scope="module")
def run(made):
    """A function (folder of scripts, name, **flags) -> (trainer, logged lines): the script's run, in this process."""

    def start(script: str, name: str, **flags: str) -> tuple[MemDLMTrainer, list[str]]:
        module, heard, trained = load_script(script), Lines(), []
        fine_tune = scripts.fine_tune
        logging.getLogger("dllm").addHandler(heard)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", launched(made, script, name, **flags))
            patch.setitem(sys.modules, module.__name__, module)
            patch.setattr(scripts, "fine_tune", lambda *given: trained.append(fine_tune(*given)))
            module.main()
        logging.getLogger("dllm").removeHandler(heard)
        return trained[0], heard.lines

    return start


@pytest.fixture(scope="module")
def finished(run):
    """The runs with evaluations in between, by folder of scripts."""
    return {script: run(script, f"{script}-run", **EVALUATED) for script in CHECKPOINTS}


def logged(trainer: MemDLMTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.randint(0, 250, (3, 7), generator=torch.Generator().manual_seed(1))  # [3, 7]
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("script", CHECKPOINTS)
def test_the_base_is_really_in_4bit_and_the_log_says_how_much(made, finished, script: str) -> None:
    trainer, lines = finished[script]
    plain = load_model(str(made / script))
    wanted = {name: part for name, part in plain.named_modules() if isinstance(part, nn.Linear)}
    del wanted[spec_of(plain).head]
    share = sum(part.weight.numel() for part in wanted.values()) / sum(p.numel() for p in plain.parameters())
    assert share > 0.6
    assert [line for line in lines if "4-bit" in line] == [
        f"4-bit NF4: {len(wanted)} linears, {share:.1%} of the weights"
    ]
    packed = {
        name.replace(".base_layer", ""): part
        for name, part in unwrap(trainer.model).named_modules()
        if isinstance(part, Linear4bit)
    }
    assert packed.keys() == wanted.keys()
    for name, part in packed.items():
        weight, state = part.weight, part.weight.quant_state
        assert weight.dtype == torch.uint8 and 2 * weight.numel() == wanted[name].weight.numel(), name
        assert state.quant_type == "nf4" and state.nested and state.state2 is not None, name  # scales quantised too
        assert part.support_avx512bf16_for_cpu is False, name  # repacked weights would have no gradient
        back = dequantize_4bit(weight, state)
        # A weight is off by at most half the widest gap of NF4 times its block's largest, and 8-bit scales.
        error = (back - wanted[name].weight).abs().max() / wanted[name].weight.abs().max()
        assert 0 < error < 0.16, name


@pytest.mark.parametrize("script", CHECKPOINTS)
def test_the_loss_falls_with_memory_on(finished, script: str) -> None:
    trainer, _ = finished[script]
    losses, evaluated = logged(trainer, "loss"), logged(trainer, "eval_loss")
    assert len(losses) == 30 and sum(losses[-5:]) < 0.75 * sum(losses[:5])
    first, second, third, last = evaluated
    assert first > second > third == last and last < 0.9 * first
    gaps = logged(trainer, "memory_gap")
    assert len(gaps) == 30 and min(gaps) > 0
    memory = logged(trainer, "eval_memory_loss")
    assert all(with_memory < without for with_memory, without in zip(memory, evaluated, strict=True))


def test_evaluations_in_between_change_nothing(made, run, finished) -> None:
    evaluated, _ = finished["llada"]
    plain, _ = run("llada", "llada-plain")
    assert (len(logged(plain, "eval_loss")), len(logged(evaluated, "eval_loss"))) == (1, 4)
    for name in ("loss", "grad_norm", "loss_without_memory", "mem_inner_loss_2"):
        assert logged(plain, name) == logged(evaluated, name), name
    files = [made / name / "checkpoint-final" / "adapter_model.safetensors" for name in ("llada-plain", "llada-run")]
    first, second = map(load_file, files)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("script", CHECKPOINTS)
def test_the_adapter_comes_back_over_the_4bit_base(made, finished, script: str) -> None:
    trainer, _ = finished[script]
    folder = str(made / f"{script}-run" / "checkpoint-final")
    assert trained_over_4bit(folder) is True
    again = load_model(folder, load_in_4bit=True)
    assert any(isinstance(part, Linear4bit) for part in again.modules())
    assert torch.equal(logits(again), logits(trainer.model))
    without = logits(load_model(str(made / script), load_in_4bit=True))
    full = logits(load_model(folder))
    # The rounding of the base is there, and what was learned is more than it.
    assert 0 < (logits(again) - full).norm() < (logits(again) - without).norm()


def test_in_bfloat16_it_comes_back_as_it_was_trained(made, tmp_path) -> None:
    options = {"load_in_4bit": True, "dtype": "bfloat16"}
    model = load_model(str(made / "llada"), lora=LoraSettings(r=4, alpha=8, dropout=0.0), **options)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    again = load_model(str(tmp_path / "adapter"), is_trainable=True, **options)
    assert torch.equal(logits(again), logits(model))
    # For inference norms, routers, embedding and head stay in bfloat16, where training had them in float32.
    frozen = logits(load_model(str(tmp_path / "adapter"), **options)).float()
    assert 0 < (frozen - logits(model)).norm() < 0.1 * frozen.norm()


def test_evaluation_in_4bit_with_memory(made, finished) -> None:
    memory = {"mem_enabled": True, "mem_inner_rank": 4, "mem_inner_lr": 1.0, "mem_prompt_mask_ratio": 0.5}
    folder = str(made / "llada-run" / "checkpoint-final")
    asked = [
        Instance("generate_until", {}, (text, {"max_gen_toks": 4, "until": []}), 0, metadata=("task", index, 1))
        for index, text in enumerate(("Say it 2 times.", "the cat sat on the"))
    ]
    harness = MemoryMDLMHarness(pretrained=folder, device="cpu", load_in_4bit=True, batch_size=2, **memory)
    assert torch.equal(logits(harness.lm), logits(finished["llada"][0].model))
    targets = [target.get_base_layer() for target in harness.memory.fast.targets.values()]
    assert targets and all(isinstance(target, Linear4bit) for target in targets)
    answers = harness.generate_until(asked)
    assert answers == harness.generate_until(asked[::-1])[::-1] and all(answers)
    info = harness.get_model_info()
    assert info["num_memories_written"] == 2 and info["num_failed_adaptations"] == 0
    choice = Instance("loglikelihood", {}, ("the cat sat", " on the mat"), 0, metadata=("task", 0, 1))
    plain = MemoryMDLMHarness(pretrained=folder, device="cpu", load_in_4bit=True, mc_num=4)
    with_memory = MemoryMDLMHarness(pretrained=folder, device="cpu", load_in_4bit=True, mc_num=4, **memory)
    (value, _), (without, _) = (each.loglikelihood([choice])[0] for each in (with_memory, plain))
    assert value != without and value < 0 and without < 0


def test_the_adapter_goes_into_the_full_precision_base(made, finished, tmp_path, caplog) -> None:
    folder = made / "llada-run" / "checkpoint-final"
    assert merge_adapter(MergeArguments(str(folder), str(tmp_path / "merged"))).relative < 1e-5
    assert any(message.startswith("the adapter was trained over a 4-bit base") for message in caplog.messages)
    merged = logits(load_model(str(tmp_path / "merged")))
    # Sums in another order.
    torch.testing.assert_close(merged, logits(load_model(str(folder))), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged, logits(finished["llada"][0].model), atol=1e-2)


def test_widths_that_bitsandbytes_unpacks_wrongly_are_named(tmp_path, caplog) -> None:
    narrow = make_tiny_checkpoint(tmp_path / "narrow", "llada", TEXT, 320, d_model=64, mlp_hidden_size=96, n_layers=2)
    load_model(str(narrow), load_in_4bit=True)
    (warning,) = [message for message in caplog.messages if "wrong rows" in message]
    assert "gives 2 linears" in warning and "multiple of 64" in warning  # ff_out of each layer


def test_without_bitsandbytes_the_run_ends_with_one_line(made, monkeypatch, capsys) -> None:
    module = load_script("llada")
    monkeypatch.setattr(sys, "argv", launched(made, "llada", "absent"))
    monkeypatch.setattr(quant, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(SystemExit) as caught, one_line_errors():
        module.main()
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("4-bit needs bitsandbytes, which is not installed: pip install 'memdlm[quant]'")
    assert not list((made / "absent").glob("checkpoint-*"))
