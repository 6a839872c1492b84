"""What a run leaves behind: a checkpoint like its base, or a plain PEFT adapter; text beside it, no pickle."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from dllm.core.trainers.artifacts import trained_over_4bit
from dllm.core.trainers.fine_tune import fine_tune
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.backbone import unwrap
from dllm.models.lora import LoraSettings
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.args import DataArguments, ModelArguments
from memdlm import MemBD3LMConfig, MemBD3LMTrainer, MemDLMConfig, MemDLMTrainer

TEXT = "Some words to learn pieces from, and some more words. " * 5
SIZES = {
    "llada": {"n_layers": 3},
    "llada_moe": {"num_hidden_layers": 3, "num_experts": 4},
    "llada2_moe": {"num_hidden_layers": 3, "num_experts": 4, "n_group": 2},
    "fast_dllm_v2": {"num_hidden_layers": 3, "bd_size": 8},
    "rotary_encoder": {"num_hidden_layers": 3},
}
# Fast-dLLM v2 predicts the next token, in blocks.
TRAINERS = {family: (MemDLMConfig, MemDLMTrainer) for family in SIZES} | {
    "fast_dllm_v2": (MemBD3LMConfig, MemBD3LMTrainer)
}
FLAGS = {"rotary_encoder": {"mem_inner_target_modules": "up_proj,down_proj"}}  # it has no gate
LORA = LoraSettings(r=3, alpha=6, dropout=0.0)
BESIDE = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "training_args.json", "README.md"}
FULL = {"config.json", "model.safetensors", *BESIDE}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", *BESIDE}
# In a process of its own, which knows nothing of memdlm. Arguments: folders.
LOAD = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
import dllm.models
assert not any(name.startswith("memdlm") for name in sys.modules)
ids = torch.arange(3, 24).reshape(3, 7)
for folder in sys.argv[1:]:
    with torch.no_grad():
        found = {
            "masked": AutoModelForMaskedLM.from_pretrained(folder)(ids).logits,
            "causal": AutoModelForCausalLM.from_pretrained(folder)(ids).logits,
            "states": AutoModel.from_pretrained(folder)(ids).last_hidden_state,
        }
    save_file(found, folder + ".found")
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, pathlib.Path]:
    """One tiny checkpoint per family; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    return {name: make_tiny_checkpoint(folder / name, name, TEXT, 300, **sizes) for name, sizes in SIZES.items()}


@pytest.fixture
def train(stored, rows, tmp_path):
    """A function (family, lora, base, **flags) -> trainer after two steps with memory."""

    def make(family: str = "llada_moe", lora: LoraSettings | None = None, base: pathlib.Path | None = None, **flags):
        config, trainer_class = TRAINERS[family]
        settings = {"max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0, "per_device_train_batch_size": 4}
        settings |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
        settings |= {"mem_enabled": True, "mem_inner_rank": 2, "mem_inner_layer_fraction": 0.4, **flags}
        trainer = trainer_class(
            model=load_model(str(base or stored[family]), lora=lora),
            args=config(output_dir=str(tmp_path / family), **settings),
            processing_class=load_tokenizer(str(base or stored[family])),
            train_dataset=rows,
            eval_dataset=rows[:4],
        )
        trainer.train()
        return trainer

    return make


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(3, 24).reshape(3, 7)).logits


def names(folder: pathlib.Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def shapes(path: pathlib.Path) -> dict[str, tuple[list[int], str]]:
    with safe_open(path, framework="pt") as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a mapping)
        return {name: (view.get_shape(), view.get_dtype()) for name, view in views.items()}


def test_a_checkpoint_trained_with_memory_is_one_like_its_base(train, stored, tmp_path) -> None:
    expected = {}
    for family, base in stored.items():
        trainer, folder = train(family, **FLAGS.get(family, {})), tmp_path / "saved" / family
        trainer.save_model(str(folder))
        assert names(folder) == FULL
        assert shapes(folder / "model.safetensors") == shapes(base / "model.safetensors")
        assert (folder / "config.json").read_text() == (base / "config.json").read_text()
        before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
        assert any(not torch.equal(before[name], after[name]) for name in before)
        lm = unwrap(trainer.model)
        expected[folder] = (logits(lm), logits(load_model(str(folder))))
        assert torch.equal(*expected[folder])
    code = [sys.executable, "-c", LOAD, *map(str, expected)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, (wanted, _) in expected.items():
        found = load_file(f"{folder}.found")
        # The other process may use another number of threads: float32 sums in another order.
        torch.testing.assert_close(found["masked"], wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(found["masked"], found["causal"])
        assert found["states"].shape == (3, 7, load_model(str(folder)).config.hidden_size)


def test_what_config_json_leaves_open_stays_open(train, stored, tmp_path) -> None:
    base = pathlib.Path(shutil.copytree(stored["llada_moe"], tmp_path / "open"))
    config = json.loads((base / "config.json").read_text())
    # The tokenizer names a padding token; Trainer would write it, and its own use_cache, into the configuration.
    del config["pad_token_id"]
    (base / "config.json").write_text(json.dumps({**config, "use_cache": True, "eos_token_id": 5}))
    stored = load_model(str(base)).config.to_dict()
    assert (stored["pad_token_id"], stored["use_cache"], stored["eos_token_id"]) == (None, True, 5)
    trainer = train(base=base)
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_model(str(tmp_path / "saved")).config.to_dict()
    assert {**saved, "_name_or_path": str(base)} == stored
    tokenizer = load_tokenizer(str(tmp_path / "saved"))
    assert tokenizer.get_vocab() == trainer.processing_class.get_vocab() and tokenizer.pad_token is not None


@pytest.mark.parametrize("family", ["llada_moe", "fast_dllm_v2"])
def test_an_adapter_trained_with_memory_is_a_plain_one(train, stored, tmp_path, family: str) -> None:
    trainer, folder = train(family, LORA), tmp_path / "saved"
    trainer.save_model(str(folder))
    assert names(folder) == ADAPTER
    assert all("lora_" in name for name in shapes(folder / "adapter_model.safetensors"))
    for auto in (AutoModelForMaskedLM, AutoModelForCausalLM):
        base = auto.from_pretrained(stored[family])
        plain = logits(base)
        loaded = PeftModel.from_pretrained(base, str(folder))
        assert torch.equal(logits(loaded), logits(trainer.model)) and not torch.equal(logits(loaded), plain)
    assert torch.equal(logits(load_model(str(folder))), logits(trainer.model))


def test_checkpoints_hold_text_and_safetensors_and_trainer_s_own_state(train, tmp_path) -> None:
    train(save_strategy="steps", save_steps=1, save_total_limit=1)
    folder = tmp_path / "llada_moe" / "checkpoint-2"
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert FULL | state <= names(folder)
    assert not (names(folder) - state) & {"training_args.bin", "pytorch_model.bin"}
    for name in names(folder) - state:
        # A pickle in a zip archive, as torch.save writes it, or a bare one.
        assert (folder / name).read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04"), name
    for name in state - {"trainer_state.json", "rng_state.pth"}:
        assert torch.load(folder / name, weights_only=True)


def test_the_settings_are_readable_and_without_tokens(train, stored, tmp_path) -> None:
    trainer = train(hub_token="hf_secret", seed=7)
    trainer.save_model(str(tmp_path / "saved"))
    text = (tmp_path / "saved" / "training_args.json").read_text()
    record = json.loads(text)
    assert (record["trainer"], record["base_model"]) == ("MemDLMTrainer", str(stored["llada_moe"]))
    arguments = record["arguments"]
    assert (arguments["seed"], arguments["mem_inner_rank"], arguments["learning_rate"]) == (7, 2, 1e-2)
    assert "hf_secret" not in text
    assert record["base_in_4bit"] is False and trained_over_4bit(str(tmp_path / "saved")) is False
    assert trained_over_4bit(str(stored["llada_moe"])) is None


@pytest.fixture
def hub(tmp_path, monkeypatch) -> pathlib.Path:
    """Stands in for the Hub: what is uploaded lies below this folder, by name of the repository."""
    folder = tmp_path / "hub"

    def create_repo(_, repo_id: str, **__) -> SimpleNamespace:
        name = repo_id if "/" in repo_id else f"someone/{repo_id}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=name)

    def upload_folder(_, *, repo_id: str, folder_path, ignore_patterns=None, path_in_repo="", **__) -> None:
        there = names(pathlib.Path(folder_path))
        for name in filter_repo_objects(there, ignore_patterns=ignore_patterns):
            target = folder / repo_id / (path_in_repo or "") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(pathlib.Path(folder_path) / name, target)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return folder


def test_push_to_hub_uploads_a_model_that_loads(train, hub) -> None:
    flags = {"push_to_hub": True, "hub_model_id": "people/model", "save_strategy": "steps", "save_steps": 1}
    trainer = train(eval_strategy="steps", eval_steps=1, **flags)
    folder = hub / "people" / "model"
    assert not names(folder)  # nothing before the end
    trainer.save_model()  # pushes
    assert names(folder) == FULL
    assert torch.equal(logits(load_model(str(folder))), logits(trainer.model))
    assert AutoTokenizer.from_pretrained(folder).chat_template == trainer.processing_class.chat_template
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and {"masked-diffusion", "llada_moe"} <= set(card.data.tags)
    # A folder of this machine is no base that the Hub knows.
    assert card.data.base_model is None and "made from `llada_moe`" in card.text
    assert "MemDLMTrainer" in card.text and 'model_name_or_path="model"' in card.text and "2 steps" in card.text
    assert "| eval_loss |" in card.text and "| learning_rate | 0.01 |" in card.text
    assert "More" not in card.text and str(hub.parent) not in card.text


@pytest.fixture
def tune(stored, rows, tmp_path):
    """A function () -> the output folder of a run of two steps that ends with an upload."""

    def run() -> pathlib.Path:
        settings = {"max_steps": 2, "save_steps": 1, "warmup_steps": 0, "disable_tqdm": True, "use_cpu": True}
        settings |= {"push_to_hub": True, "hub_model_id": "people/model"}
        fine_tune(
            MemDLMTrainer,
            ModelArguments(model_name_or_path=str(stored["llada"])),
            DataArguments(dataset_args="rows"),
            MemDLMConfig(output_dir=str(tmp_path / "tuned"), **settings),
            load_rows=lambda *_: {"train": rows, "test": rows[:4]},
        )
        return tmp_path / "tuned"

    return run


def test_a_fine_tuned_model_is_pushed_and_nothing_half_written_with_it(tune, hub) -> None:
    output = tune()
    folder = hub / "people" / "model"
    assert names(folder) >= FULL
    assert not [name for name in names(folder) if name.startswith((".saving", "checkpoint-"))]
    assert torch.equal(logits(load_model(str(folder))), logits(load_model(str(output / "checkpoint-final"))))


def test_a_hub_that_cannot_be_reached_costs_nothing_that_was_trained(tune, tmp_path, hub, monkeypatch) -> None:
    def fail(*_, **__):
        raise ConnectionError("the Hub is not there")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    with pytest.raises(ConnectionError, match="the Hub is not there"):
        tune()
    assert names(tmp_path / "tuned" / "checkpoint-final") == FULL
    assert (tmp_path / "tuned" / "eval_results.json").is_file()
    assert not (tmp_path / "tuned" / ".saving").exists()


def test_an_adapter_is_pushed_on_request(train, stored, hub) -> None:
    trainer = train(lora=LORA)
    unwrap(trainer.model).name_or_path = "people/base"
    assert not hub.exists()
    trainer.push_to_hub(license="mit", tags="mine")
    folder = hub / "someone" / "llada_moe"
    assert names(folder) == ADAPTER
    loaded = load_model(str(folder), base_model_name_or_path=str(stored["llada_moe"]))
    assert torch.equal(logits(loaded), logits(trainer.model))
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("peft", "people/base", "mit")
    assert {"lora", "mine"} <= set(card.data.tags) and "adapter of `people/base`" in card.text
    assert "None yet." in card.text
