"""The adapter `llada21`: memory per prompt under block decoding, adapters over a base, the launcher."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from dllm.core.eval import launch
from dllm.core.samplers import BlockSampler, BlockSamplerConfig
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.lora import LoraSettings
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.parsing import InputError
from memdlm import MemoryConfig, ParametricMemory
from memdlm.eval.harness import MemoryBlockEvalConfig, MemoryBlockHarness

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = {"num_hidden_layers": 4, "hidden_size": 32, "num_experts": 4, "n_group": 2, "topk_group": 1}
MEMORY = {"mem_enabled": True, "mem_inner_rank": 4, "mem_inner_layer_fraction": 0.5, "mem_inner_lr": 1.0}
# So that of each prompt here some position is drawn, short as they are.
MEMORY["mem_prompt_mask_ratio"] = 0.5
BLOCKS = {"block_size": 4, "threshold": 0.2, "editing_threshold": 0.1, "max_post_steps": 2}
TEXTS = ["def f(x): return x + 1", "The old man and the sea", "import json, sys, pathlib", "a b c d e f g h i"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base") / "m"
    return str(make_tiny_checkpoint(folder, "llada2_moe", initializer_range=0.1, **SIZES))


@pytest.fixture
def make_harness(base):
    """A function (**arguments) -> harness over a float64 model."""

    def make(**arguments) -> MemoryBlockHarness:
        model = load_model(base).double()
        return MemoryBlockHarness(model=model, tokenizer=load_tokenizer(base), **{**BLOCKS, **arguments})

    return make


def generations(texts=TEXTS, length: int = 6) -> list[Instance]:
    settings = {"max_gen_toks": length, "until": []}
    return [
        Instance("generate_until", {}, (text, settings), 0, metadata=("task", index, 1))
        for index, text in enumerate(texts)
    ]


def test_each_prompt_is_decoded_with_its_own_memory(make_harness, base) -> None:
    answers = make_harness(batch_size=4, **MEMORY).generate_until(generations())
    assert answers == make_harness(batch_size=1, **MEMORY).generate_until(generations())
    # Written before the cache is filled: what is read from there has the memory in it.
    assert answers == make_harness(batch_size=3, use_cache=False, **MEMORY).generate_until(generations())
    assert answers != make_harness(batch_size=4).generate_until(generations())
    model, tokenizer = load_model(base).double(), load_tokenizer(base)
    settings = {name.removeprefix("mem_"): value for name, value in MEMORY.items()}
    memory = ParametricMemory(model, MemoryConfig.for_decoding(**settings))
    sampler = BlockSampler(model, tokenizer)
    for text, answer in zip(TEXTS, answers, strict=True):
        prompt = tokenizer.encode(text)
        with memory.attached():
            memory.adapt([prompt])
            config = BlockSamplerConfig(max_new_tokens=6, early_stop=True, **BLOCKS)
            ids = sampler.sample([prompt], config).answers[0].tolist()
        ids = ids[: next((i for i, token in enumerate(ids) if token in sampler.end_token_ids), 6)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == answer


def test_choices_share_the_memory_of_their_context_across_blocks(make_harness) -> None:
    """The memory is that of the context, not of what stands before a later block of the continuation."""
    context = "The old man and the boy went to"
    asked = [
        Instance("loglikelihood", {}, (context, each), 0, metadata=("task", 0, 1))
        for each in (" the sea and then to the old harbour again", " x")
    ]
    harness = make_harness(batch_size=4, mc_num=6, **MEMORY)
    values = harness.loglikelihood(asked)
    assert (harness.store.num_written, harness.get_model_info()["num_memories_written"]) == (1, 1)
    alone = [make_harness(mc_num=6, **MEMORY).loglikelihood([one])[0] for one in reversed(asked)][::-1]
    plain = make_harness(batch_size=4, mc_num=6).loglikelihood(asked)
    for (value, greedy), (single, single_greedy), (without, _) in zip(values, alone, plain, strict=True):
        assert value == pytest.approx(single, abs=1e-8) and greedy == single_greedy
        assert abs(value - without) > 1e-6


def test_a_configuration_without_mask_token_takes_the_tokenizers(base, tmp_path) -> None:
    """As published checkpoints have it."""
    folder = tmp_path / "published"
    folder.mkdir()
    for path in pathlib.Path(base).iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    del config["mask_token_id"]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    arguments = {"device": "cpu", **BLOCKS, **MEMORY}
    found = MemoryBlockHarness(pretrained=str(folder), **arguments).generate_until(generations())
    assert found == MemoryBlockHarness(pretrained=base, **arguments).generate_until(generations())


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> str:
    """A folder laid out like the released LLaDA2.1-mini-MemDLM adapter: its base named as on the Hub, tokenizer and
    leftovers of training beside it."""
    folder = tmp_path_factory.mktemp("adapter") / "LLaDA2.1-mini-MemDLM"
    targets = "query_key_value,dense,gate_proj,up_proj,down_proj"
    model = load_model(base, lora=LoraSettings(r=4, alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"base_model_name_or_path": "inclusionAI/LLaDA2.1-mini", "task_type": "CAUSAL_LM"}
    path.write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nbase_model: inclusionAI/LLaDA2.1-mini\nlibrary_name: peft\n---\n")
    (folder / "training_args.bin").write_bytes(b"not to be read")
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "config.json").exists()
    return str(folder)


def test_a_released_adapter_is_evaluated_however_it_is_named(base, adapter, tmp_path, monkeypatch) -> None:
    arguments = {"device": "cpu", **BLOCKS, **MEMORY}
    named = {
        "on the base": {"pretrained": base, "adapter_model_name_or_path": adapter},
        "over a base": {"pretrained": adapter, "base_model_name_or_path": base},
    }
    answers = {
        name: MemoryBlockHarness(**names, **arguments).generate_until(generations()) for name, names in named.items()
    }
    folder = tmp_path / "models" / "inclusionAI"
    folder.mkdir(parents=True)
    (folder / "LLaDA2.1-mini").symlink_to(base)
    monkeypatch.setenv("BASE_MODELS_DIR", str(tmp_path / "models"))
    answers["by its own file"] = MemoryBlockHarness(pretrained=adapter, **arguments).generate_until(generations())
    assert len({tuple(each) for each in answers.values()}) == 1
    assert answers["on the base"] != MemoryBlockHarness(pretrained=base, **arguments).generate_until(generations())


def test_an_adapter_of_another_family_is_refused(adapter, tmp_path) -> None:
    other = str(make_tiny_checkpoint(tmp_path / "other", "llada_moe", num_hidden_layers=2, num_experts=4))
    with pytest.raises(InputError, match=r"does not fit .*; give the base that it was trained on") as caught:
        MemoryBlockHarness(pretrained=adapter, base_model_name_or_path=other, device="cpu", block_size=8)
    assert "\n" not in str(caught.value)


def test_arguments_of_sampler_and_memory_stand_side_by_side() -> None:
    config = MemoryBlockEvalConfig(pretrained="m", **BLOCKS, **MEMORY)
    memory = config.memory()
    assert memory is not None and (memory.inner_lr, config.editing_threshold) == (1.0, 0.1)
    with pytest.raises(InputError, match="mem_inner_lr has no effect without mem_enabled=True"):
        MemoryBlockEvalConfig(pretrained="m", mem_inner_lr=1.0)
    with pytest.raises(InputError, match="threshold must be in"):
        MemoryBlockEvalConfig(pretrained="m", threshold=2.0, **MEMORY)


def test_two_offline_tasks_under_lm_eval(base, monkeypatch) -> None:
    # Seconds per evaluation: lm-eval asks pip for the list of packages.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    harness = MemoryBlockHarness(
        pretrained=base, device="cpu", batch_size=2, preset="speed", max_new_tokens=8, **MEMORY
    )
    metadata = {"lengths": 400, "num_samples": 2, "pretrained": base}
    manager = TaskManager(include_path=str(launch.TASKS_DIR), include_defaults=False, metadata=metadata)
    tasks = ["memdlm_babilong_qa1", "memdlm_ruler_niah_single"]
    results = simple_evaluate(harness, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    assert results is not None and set(results["results"]) == set(tasks)
    info = harness.get_model_info()
    assert (info["num_requests"], info["num_memories_written"], info["num_failed_adaptations"]) == (4, 4, 0)


def test_launched_by_path(base, tmp_path) -> None:
    command = [sys.executable, str(ROOT / "memdlm" / "eval" / "llada21.py"), "--tasks", "memdlm_babilong_qa1"]
    arguments = f"pretrained={base},steps=8,block_size=16,mem_enabled=True"
    command += ["--metadata", '{"lengths": "0k"}', "--limit", "2", "--device", "cpu", "--model_args", arguments]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_path", "out"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "llada21 (" in done.stdout and "memdlm_babilong_qa1" in done.stdout
    (results,) = (tmp_path / "out").rglob("results*.json")
    config = json.loads(results.read_text())["config"]
    assert (config["model"], config["eval_config"]["steps"], config["num_memories_written"]) == ("llada21", 8, 2)
