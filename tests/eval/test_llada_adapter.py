"""The adapter `llada`: memory per prompt, adapters over a base, and the launcher."""

import json
import os
import pathlib
import subprocess
import sys

import lm_eval.tasks
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from dllm.core.eval import Interrupted, launch
from dllm.core.samplers import MDLMSampler, MDLMSamplerConfig
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.lora import LoraSettings
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.parsing import InputError
from memdlm import MemoryConfig, ParametricMemory
from memdlm.eval.harness import MemoryMDLMHarness

SIZES = {"num_hidden_layers": 4, "hidden_size": 32, "num_experts": 4, "initializer_range": 0.1}
MEMORY = {"mem_enabled": True, "mem_inner_rank": 4, "mem_inner_layer_fraction": 0.5, "mem_inner_lr": 1.0}
# So that of each prompt here some position is drawn, short as they are.
MEMORY["mem_prompt_mask_ratio"] = 0.5
TEXTS = ["def f(x): return x + 1", "The old man and the sea", "import json, sys, pathlib", "a b c d e f g h i"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(make_tiny_checkpoint(tmp_path_factory.mktemp("base") / "m", "llada_moe", **SIZES))


@pytest.fixture
def make_harness(base):
    """A function (**arguments) -> harness over a float64 model."""

    def make(**arguments) -> MemoryMDLMHarness:
        model = load_model(base).double()
        return MemoryMDLMHarness(model=model, tokenizer=load_tokenizer(base), **arguments)

    return make


def generations(texts=TEXTS, length: int = 6) -> list[Instance]:
    settings = {"max_gen_toks": length, "until": []}
    return [
        Instance("generate_until", {}, (text, settings), 0, metadata=("task", index, 1))
        for index, text in enumerate(texts)
    ]


def choices(context: str, *continuations: str) -> list[Instance]:
    return [Instance("loglikelihood", {}, (context, each), 0, metadata=("task", 0, 1)) for each in continuations]


# Memory.


def test_each_prompt_is_decoded_with_its_own_memory(make_harness, base):
    harness = make_harness(batch_size=4, **MEMORY)
    answers = harness.generate_until(generations())
    assert answers == make_harness(batch_size=1, **MEMORY).generate_until(generations())
    assert answers == make_harness(batch_size=3, mem_batch_size=2, **MEMORY).generate_until(generations())
    assert answers == make_harness(batch_size=4, **MEMORY).generate_until(generations()[::-1])[::-1]
    assert answers != make_harness(batch_size=4).generate_until(generations())
    model, tokenizer = load_model(base).double(), load_tokenizer(base)
    settings = {name.removeprefix("mem_"): value for name, value in MEMORY.items()}
    memory = ParametricMemory(model, MemoryConfig.for_decoding(**settings))
    sampler = MDLMSampler(model, tokenizer)
    for text, answer in zip(TEXTS, answers, strict=True):
        prompt = tokenizer.encode(text)
        with memory.attached():
            memory.adapt([prompt])
            ids = sampler.sample([prompt], MDLMSamplerConfig(max_new_tokens=6, early_stop=True)).answers[0].tolist()
        ids = ids[: next((i for i, token in enumerate(ids) if token in sampler.end_token_ids), 6)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == answer
    info = harness.get_model_info()
    assert (info["num_memories_written"], info["num_memories_reused"], info["num_failed_adaptations"]) == (4, 0, 0)
    assert info["adaptation_seconds"] > 0 and info["num_fast_weights"] == harness.memory.fast.numel
    assert "adaptation_seconds" not in make_harness().get_model_info()


def test_choices_share_the_memory_of_their_context(make_harness):
    asked = [
        *choices("The old man and the boy went to", " the sea", " a b c", " x"),
        *choices("def f(x, y, z=3): return", " x + 1", " None"),
        *choices("The old man and the boy went to", " another sea"),
    ]
    harness = make_harness(batch_size=4, mc_num=6, **MEMORY)
    values = harness.loglikelihood(asked)
    assert harness.store.num_written == 2
    alone = [make_harness(batch_size=1, mc_num=6, **MEMORY).loglikelihood([one])[0] for one in asked]
    plain = make_harness(batch_size=4, mc_num=6).loglikelihood(asked)
    for (value, greedy), (single, single_greedy), (without, _) in zip(values, alone, plain, strict=True):
        assert value == pytest.approx(single, abs=1e-8) and greedy == single_greedy
        assert abs(value - without) > 1e-6
    # A text of several blocks has one memory per block.
    text = Instance("loglikelihood_rolling", {}, (" ".join(TEXTS),), 0, metadata=("task", 0, 1))
    blocks = make_harness(max_length=16, mc_num=3, **MEMORY)
    (value,) = blocks.loglikelihood_rolling([text])
    (without,) = make_harness(max_length=16, mc_num=3).loglikelihood_rolling([text])
    assert blocks.store.num_written > 2 and abs(value - without) > 1e-6


def test_nothing_stays_on_the_model_and_an_error_leaves_nothing_either(make_harness, monkeypatch):
    harness = make_harness(**MEMORY)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        before = harness.lm(ids).logits
        harness.generate_until(generations())
        assert torch.equal(harness.lm(ids).logits, before)
        monkeypatch.setattr(MDLMSampler, "sample", lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
        with pytest.raises(ZeroDivisionError):
            harness.generate_until(generations())
        assert torch.equal(harness.lm(ids).logits, before)
    assert not harness.memory.fast.is_attached


def test_a_prompt_that_cannot_be_adapted_to_is_answered_without(make_harness, capsys):
    # Of one token nothing is drawn at this ratio, so nothing can be asked.
    settings = {**MEMORY, "mem_prompt_mask_ratio": 0.3}
    harness = make_harness(batch_size=3, mc_num=3, **settings)
    answers = harness.generate_until(generations([TEXTS[0], "x", TEXTS[1]]))
    assert (
        "1 request(s) answered without memory so far; the first: no position of its 1 tokens" in capsys.readouterr().err
    )
    assert answers[1] == make_harness().generate_until(generations(["x"]))[0]
    assert answers[0] == make_harness(**settings).generate_until(generations(TEXTS[:1]))[0]
    assert answers[0] != make_harness().generate_until(generations(TEXTS[:1]))[0]
    values = harness.loglikelihood(choices("x", " y z", " a"))
    assert [value for value, _ in values] == pytest.approx(
        [value for value, _ in make_harness(mc_num=3).loglikelihood(choices("x", " y z", " a"))], abs=1e-9
    )
    info = harness.get_model_info()
    (failure,) = info["failed_adaptations"]
    assert info["num_failed_adaptations"] == 1 and "(1 tokens)" in failure["prompt"]
    assert info["num_answered_without_memory"] == 3
    assert info["answered_without_memory"] == [{"request": "x", "reason": failure["reason"]}] * 3


def test_the_share_of_adaptation(make_harness, capsys):
    for settings, forwards in (
        ({}, 2 * 0.5 + 2 * 2 * 0.5),
        ({"mem_num_inner_steps": 3, "mem_num_inner_epochs": 2}, 3 * 0.5 + 2 * 3 * 2 * 0.5),
        ({"mem_inner_loss_type": "distill"}, 3 * 0.5 + 2 * 3 * 0.5),
        ({"mem_masking_strategy": "pre_only"}, 0.5 + 2 * 0.5),
    ):
        assert make_harness(**MEMORY, **settings).forwards_per_write() == pytest.approx(forwards)
    assert make_harness().forwards_per_write() == 0
    capsys.readouterr()
    # 9 tokens twice: 2 writes of 3 forwards over 9 tokens, 2 x 3 forwards over 9 + 3 tokens.
    harness = make_harness(**MEMORY)
    text = harness.tokenizer.decode(harness.tokenizer.encode(TEXTS[0])[:9])
    length = len(harness.tokenizer.encode(text))
    harness.generate_until(generations([text, text + "!"], length=3))
    lengths = [length, len(harness.tokenizer.encode(text + "!"))]
    adapting, decoding = 3 * sum(lengths), sum(3 * (length + 3) for length in lengths)
    line = f"2 memories to write, {adapting / (adapting + decoding):.0%} of the work"
    assert line in capsys.readouterr().err


def test_one_memory_for_all_rows_needs_batches_of_one(make_harness):
    with pytest.raises(InputError, match="mem_scope=batch is one memory for all rows"):
        make_harness(batch_size=2, **MEMORY, mem_scope="batch")
    answers = make_harness(**MEMORY, mem_scope="batch").generate_until(generations())
    assert answers != make_harness().generate_until(generations())


# Adapters.


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> str:
    """A folder laid out like a published adapter: its base named as on the Hub, tokenizer and leftovers of training."""
    folder = tmp_path_factory.mktemp("adapter") / "LLaDA-MoE-MemDLM"
    targets = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    model = load_model(base, lora=LoraSettings(r=4, alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"base_model_name_or_path": "inclusionAI/LLaDA-MoE-7B-A1B-Base", "task_type": "CAUSAL_LM"}
    path.write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nbase_model: inclusionAI/LLaDA-MoE-7B-A1B-Base\nlibrary_name: peft\n---\n")
    (folder / "training_args.bin").write_bytes(b"not to be read")
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "config.json").exists()
    return str(folder)


def test_an_adapter_is_evaluated_however_it_is_named(base, adapter, tmp_path, monkeypatch):
    named = {
        "on the base": {"pretrained": base, "adapter_model_name_or_path": adapter},
        "over a base": {"pretrained": adapter, "base_model_name_or_path": base},
    }
    answers = {
        name: MemoryMDLMHarness(device="cpu", **arguments, **MEMORY).generate_until(generations())
        for name, arguments in named.items()
    }
    folder = tmp_path / "models" / "inclusionAI"
    folder.mkdir(parents=True)
    (folder / "LLaDA-MoE-7B-A1B-Base").symlink_to(base)
    monkeypatch.setenv("BASE_MODELS_DIR", str(tmp_path / "models"))
    harness = MemoryMDLMHarness(pretrained=adapter, device="cpu", answers_dir=str(tmp_path / "answers"), **MEMORY)
    answers["by its own file"] = harness.generate_until(generations())
    assert len({tuple(each) for each in answers.values()}) == 1
    assert answers["on the base"] != MemoryMDLMHarness(pretrained=base, device="cpu", **MEMORY).generate_until(
        generations()
    )


def test_an_adapter_of_another_base_is_refused(base, adapter, tmp_path):
    other = make_tiny_checkpoint(tmp_path / "other", "llada_moe", **{**SIZES, "hidden_size": 64})
    for arguments in (
        {"pretrained": str(other), "adapter_model_name_or_path": adapter},
        {"pretrained": adapter, "base_model_name_or_path": str(other)},
    ):
        with pytest.raises(InputError, match=r"does not fit .*; give the base that it was trained on") as caught:
            MemoryMDLMHarness(device="cpu", **arguments)
        assert "\n" not in str(caught.value)


# The launcher.


@pytest.mark.parametrize(
    ("words", "filled"),
    [
        (["--tasks", "x"], ["run", "--model", "llada", "--include_path", "TASKS", "--tasks", "x"]),
        (["run", "--model", "hf"], ["run", "--include_path", "TASKS", "--model", "hf"]),
        (["run", "-M", "hf", "--include_path=y"], ["run", "-M", "hf", "--include_path=y"]),
        (["ls", "tasks"], ["ls", "--include_path", "TASKS", "tasks"]),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_defaults_of_the_command_line(words, filled, monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "TASKS_DIR", tmp_path)
    expected = [str(tmp_path) if word == "TASKS" else word for word in filled]
    assert launch.with_defaults(words, "llada") == expected
    monkeypatch.setattr(launch, "TASKS_DIR", tmp_path / "absent")
    assert "--include_path" not in launch.with_defaults(["--tasks", "x"], "llada")


def test_a_file_of_settings_is_not_overruled(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: hf\ninclude_path: here\n")
    words = ["--config", str(path)]
    assert launch.with_defaults(words, "llada") == ["run", *words]


def _status(monkeypatch, error: BaseException | None, words=("--tasks", "memdlm_babilon,babilong_longctx")) -> int:
    def fail() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["prog"])
    monkeypatch.setattr(launch, "cli_evaluate", fail)
    return launch.launch("llada", list(words))


def test_exit_codes(monkeypatch, capsys):
    assert _status(monkeypatch, None) == 0
    assert sys.argv[:4] == ["prog", "run", "--model", "llada"]
    assert _status(monkeypatch, InputError("two\nlines")) == 2
    assert capsys.readouterr().err == "two lines\n"
    assert _status(monkeypatch, Interrupted("interrupted: 2 of 4 kept")) == 130
    assert _status(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted: 2 of 4 kept\ninterrupted\n"
    for error in (ValueError("something else"), ConnectionError("a socket of the run itself"), KeyError("x")):
        with pytest.raises(type(error)):
            _status(monkeypatch, error)


def test_unknown_tasks_are_told_with_the_closest(monkeypatch, capsys):
    class Manager:
        all_tasks = ["memdlm_babilong", "memdlm_ruler", "arc_easy"]

        def __init__(self, include_path):
            assert include_path == "here"

    monkeypatch.setattr(launch, "TaskManager", Manager)
    words = ["--tasks", "x", "--include_path", "here"]
    assert _status(monkeypatch, ValueError("Tasks not found: memdlm_babilon, arc_eazy"), words) == 2
    assert capsys.readouterr().err == (
        "unknown task memdlm_babilon; the closest known one is memdlm_babilong; unknown task arc_eazy; the closest "
        "known one is arc_easy (`ls tasks` lists all)\n"
    )


@pytest.fixture(scope="module")
def run_adapter(base, tmp_path_factory):
    """A function (*words) -> (finished process, folder of the results), by `python -m memdlm.eval.llada`."""

    def run(*words: str, arguments: str = ""):
        output = tmp_path_factory.mktemp("results")
        command = [sys.executable, "-m", "memdlm.eval.llada", *words, "--device", "cpu", "--limit", "2"]
        command += ["--model_args", f"pretrained={base}{arguments}", "--output_path", str(output), "--log_samples"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=output, env=env, capture_output=True, text=True, timeout=300)
        return done, output

    return run


def test_end_to_end(run_adapter, base):
    words = ("--tasks", "memdlm_babilong_qa1", "--metadata", '{"lengths": "0k"}', "--batch_size", "2")
    memory = ",".join(f"{name}={value}" for name, value in MEMORY.items())
    done, output = run_adapter(*words, arguments=f",steps=4,{memory}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "memdlm_babilong_qa1" in done.stdout and "generate_until: 2 requests" in done.stderr
    (results,) = output.rglob("results*.json")
    config = json.loads(results.read_text())["config"]
    assert config["eval_config"]["pretrained"] == base and config["eval_config"]["mem_inner_lr"] == 1.0
    assert config["eval_config"]["max_length"] is None and config["eval_max_length"] == 4096
    assert (config["model_device"], config["model_dtype"], config["model_attention"]) == (
        "cpu",
        "torch.float32",
        "sdpa",
    )
    assert (config["num_requests"], config["num_memories_written"], config["num_failed_adaptations"]) == (2, 2, 0)
    assert 0 < config["mean_nfe"] <= 4
    assert config["tokens_per_second"] > 0 and config["adaptation_seconds"] > 0


def test_a_task_that_needs_the_network_names_its_offline_twin(monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = pathlib.Path(lm_eval.tasks.__file__).parent / "babilong"

    def load() -> None:
        metadata = {"max_seq_lengths": "1k"}
        TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata).load(["babilong_qa1"])

    monkeypatch.setattr(sys, "argv", ["prog"])
    monkeypatch.setattr(launch, "cli_evaluate", load)
    assert launch.launch("llada", ["--tasks", "babilong_qa1,memdlm_babilong"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("babilong_qa1 needs the data set RMT-team/babilong-1k-samples on the Hugging Face Hub: use ")
    assert "use memdlm_babilong_qa1, which does the same offline" in line


def test_wrong_metadata_is_one_line(monkeypatch, capsys, base):
    def load() -> None:
        metadata = {"lengthz": "1k", "pretrained": base}
        manager = TaskManager(include_path=str(launch.TASKS_DIR), include_defaults=False, metadata=metadata)
        manager.load(["memdlm_babilong_qa1"])

    monkeypatch.setattr(sys, "argv", ["prog"])
    monkeypatch.setattr(launch, "cli_evaluate", load)
    assert launch.launch("llada", ["--tasks", "memdlm_babilong_qa1"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "unknown metadata lengthz; known: lengths" in line
