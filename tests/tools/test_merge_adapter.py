"""Merging an adapter: W + s B A and nothing else, read back with the logits of base + adapter; and what is refused."""

import json
import pathlib
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dllm.models.auto import load_model, load_tokenizer
from dllm.models.lora import LoraSettings
from dllm.models.relay_norm import RELAY_NORM, RelayKeys, relay_keys, save_relay_keys
from dllm.models.tiny import make_tiny_checkpoint
from dllm.tools import merge_adapter as tool
from dllm.tools.merge_adapter import MergeArguments, merge_adapter
from dllm.utils.parsing import InputError

TEXT = "Some words to learn pieces from, and some more words. " * 5
FAMILIES = ["llada", "llada_moe", "llada2_moe", "fast_dllm_v2"]
# Larger weights than usual: near-uniform predictions would hide what the adapter does.
STRONG = {
    "llada": {"n_layers": 2, "init_std": 0.1},
    "llada_moe": {"num_hidden_layers": 2, "num_experts": 4, "initializer_range": 0.1},
    "llada2_moe": {"num_hidden_layers": 2, "num_experts": 4, "n_group": 2, "initializer_range": 0.1},
    "fast_dllm_v2": {"num_hidden_layers": 2, "initializer_range": 0.1},
}
LORA = LoraSettings(r=3, alpha=7, dropout=0.0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, pathlib.Path]:
    """One tiny checkpoint per family, and LLaDA with the embedding as head; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    made = {name: make_tiny_checkpoint(folder / name, name, TEXT, 300, **STRONG[name]) for name in FAMILIES}
    tied = make_tiny_checkpoint(folder / "tied", "llada", TEXT, 300, **STRONG["llada"], weight_tying=True)
    return {**made, "tied llada": tied}


def shaken(model):
    """`model` with trainable parameters as after training (B starts at zero, which would hide it)."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1
    return model.eval()


def save_adapter(base: pathlib.Path, folder: pathlib.Path, **settings) -> pathlib.Path:
    """An adapter of `base` made with PEFT itself."""
    config = LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"], **settings})
    shaken(get_peft_model(load_model(str(base)), config)).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(stored, tmp_path) -> pathlib.Path:
    shaken(load_model(str(stored["llada_moe"]), lora=LORA)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def run(adapter: pathlib.Path, output: pathlib.Path, **settings):
    return merge_adapter(MergeArguments(str(adapter), str(output), **settings))


@torch.no_grad()
def logits(folder: pathlib.Path, **settings) -> torch.Tensor:
    ids = torch.randint(0, 250, (3, 7), generator=torch.Generator().manual_seed(1))  # [3, 7]
    return load_model(str(folder), **settings)(input_ids=ids).logits


def error_of(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_are_the_formula_and_the_rest_is_the_base(stored, tmp_path, family: str) -> None:
    base, adapter, folder = stored[family], tmp_path / "adapter", tmp_path / "merged"
    shaken(load_model(str(base), lora=LORA)).save_pretrained(adapter)
    found = run(adapter, folder)
    merged, plain = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    lora = load_file(adapter / "adapter_model.safetensors")
    assert merged.keys() == plain.keys()
    for name, weight in plain.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" not in lora:
            assert torch.equal(merged[name], weight), name
            continue
        a, b = (lora.pop(f"{stem}.lora_{which}.weight").double() for which in "AB")
        # Rounded to float32 once or twice.
        torch.testing.assert_close(merged[name], (weight.double() + 7 / 3 * b @ a).float(), atol=1e-6, rtol=1e-6)
    assert not lora
    # Sums in another order.
    torch.testing.assert_close(logits(folder), logits(adapter), atol=1e-4, rtol=1e-4)
    assert found.relative < 1e-5 < 1e-2 < found.effect and found.largest < 1e-3
    assert (folder / "config.json").read_text() == (base / "config.json").read_text()


def test_the_folder_is_a_checkpoint_like_its_base(stored, adapter, tmp_path) -> None:
    base = stored["llada_moe"]
    run(adapter, tmp_path / "new" / "merged")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["merged"]
    names = {path.name for path in (tmp_path / "new" / "merged").iterdir()}
    assert names == {path.name for path in base.iterdir()} and "chat_template.jinja" in names
    merged, own = load_tokenizer(str(tmp_path / "new" / "merged")), load_tokenizer(str(base))
    assert merged.get_vocab() == own.get_vocab() and merged.chat_template == own.chat_template
    assert merged.special_tokens_map == own.special_tokens_map


def test_the_adapter_s_own_tokenizer_and_template_win(stored, adapter, tmp_path) -> None:
    tokenizer = load_tokenizer(str(stored["llada_moe"]))
    tokenizer.chat_template = "mine"
    tokenizer.save_pretrained(adapter)
    run(adapter, tmp_path / "merged")
    assert load_tokenizer(str(tmp_path / "merged")).chat_template == "mine"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llada_moe", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        ("llada_moe", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llada_moe", {"use_dora": True, "target_modules": ["up_proj", "o_proj"]}),
        ("llada_moe", {"use_rslora": True}),
        ("llada", {"target_modules": ["wte"]}),
        # One weight in the base, two in the merged checkpoint.
        ("fast_dllm_v2", {"target_modules": ["embed_tokens"]}),
        ("fast_dllm_v2", {"target_modules": ["lm_head"]}),
        ("fast_dllm_v2", {"modules_to_save": ["embed_tokens"]}),
        ("fast_dllm_v2", {"modules_to_save": ["lm_head"]}),
    ],
)
@pytest.mark.filterwarnings("ignore:Model")
def test_adapters_beyond_the_layers_and_other_kinds(stored, tmp_path, family: str, settings: dict) -> None:
    adapter = save_adapter(stored[family], tmp_path / "adapter", **settings)
    assert run(adapter, tmp_path / "merged").effect > 1e-3
    # Sums in another order.
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(adapter), atol=1e-4, rtol=1e-4)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "merged/model.safetensors").items()}
    own = {name: tuple(tensor.shape) for name, tensor in load_file(stored[family] / "model.safetensors").items()}
    extra = {"lm_head.weight"} if family == "fast_dllm_v2" else set()
    assert shapes.keys() == own.keys() | extra and all(shapes[name] == own[name] for name in own)


def test_a_tied_head_that_cannot_be_parted_is_refused(stored, tmp_path) -> None:
    adapter = save_adapter(stored["tied llada"], tmp_path / "adapter", target_modules=["wte"])
    assert "is the head too" in error_of(lambda: run(adapter, tmp_path / "merged"))
    within = save_adapter(stored["tied llada"], tmp_path / "within")
    assert run(within, tmp_path / "merged").relative < 1e-5


def test_a_relay_goes_into_the_merged_configuration(stored, tmp_path) -> None:
    base, adapter = stored["llada_moe"], tmp_path / "adapter"
    keys = RelayKeys(layer=1, positions="all", gate="zero")
    model = load_model(str(base), lora=LORA, prepare=lambda plain: plain.backbone.add_relay_norm(keys))
    shaken(model).save_pretrained(adapter)
    save_relay_keys(adapter, keys)
    run(adapter, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert relay_keys(config) == keys
    assert {**config, **keys.as_config()} == {**json.loads((base / "config.json").read_text()), **keys.as_config()}
    merged, lora = load_file(tmp_path / "merged/model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for part in ("weight", "bias"):
        trained = lora[f"base_model.model.model.{RELAY_NORM}.{part}"]
        assert torch.equal(merged[f"model.{RELAY_NORM}.{part}"], trained) and bool(trained.any())


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_the_base_s_or_the_one_asked_for(stored, adapter, tmp_path, name: str) -> None:
    found = run(adapter, tmp_path / "merged", dtype=name)
    tensors = load_file(tmp_path / "merged" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {getattr(torch, name)}
    assert 0 < found.relative <= tool.TOLERANCES[getattr(torch, name)]
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "merged"))
    run(adapter, tmp_path / "twice")
    assert load_model(str(tmp_path / "twice")).dtype == getattr(torch, name)


def test_a_float64_base(stored, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(stored["llada"], base)
    wide = {name: tensor.double() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(wide, base / "model.safetensors", metadata={"format": "pt"})
    edit(base / "config.json", dtype="float64")
    assert run(save_adapter(base, tmp_path / "adapter"), tmp_path / "merged").relative <= 1e-4


def test_of_a_4bit_base_the_output_says_what_follows(stored, adapter, tmp_path, caplog) -> None:
    record = adapter / "training_args.json"
    for content, said in ((None, "if the adapter was"), ('{"base_in_4bit": true}', "the adapter was"), ("{}", "")):
        caplog.clear()
        if content is not None:
            record.write_text(content)
        if said:
            run(adapter, tmp_path / f"merged {said}")
            (warning,) = [entry.message for entry in caplog.records if entry.levelname == "WARNING"]
            assert warning.startswith(f"{said} trained over a 4-bit base") and str(stored["llada_moe"]) in warning
    assert "training_args.json is damaged" in error_of(lambda: run(adapter, tmp_path / "other"))
    record.write_text('{"base_in_4bit": false}')
    caplog.clear()
    run(adapter, tmp_path / "full")
    assert not [entry for entry in caplog.records if entry.levelname == "WARNING"]


def test_a_merge_that_computes_something_else_leaves_nothing(adapter, tmp_path, monkeypatch) -> None:
    def unload(model, _) -> object:
        return model.unload()  # forgets the adapter

    monkeypatch.setattr(tool, "_merged", unload)
    message = error_of(lambda: run(adapter, tmp_path / "merged"))
    assert "computes something else" in message and "nothing was written" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_weights_that_are_not_finite_are_refused(adapter, tmp_path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path)
    assert "cannot be merged" in error_of(lambda: run(adapter, tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_what_is_refused(stored, adapter, tmp_path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    assert "holds something already" in error_of(lambda: run(adapter, taken))
    assert "cannot be made" in error_of(lambda: run(adapter, taken / "notes.txt" / "below"))
    assert "is no PEFT adapter" in error_of(lambda: run(stored["llada_moe"], tmp_path / "out"))
    assert "--dtype int8 is unknown" in error_of(lambda: run(adapter, tmp_path / "out", dtype="int8"))
    other = str(stored["llada"])
    assert "does not fit" in error_of(lambda: run(adapter, tmp_path / "out", base_model_name_or_path=other))
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    assert "pass base_model_name_or_path" in error_of(lambda: run(adapter, tmp_path / "out"))
    assert (taken / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "taken"]


def test_the_base_can_have_moved(stored, adapter, tmp_path) -> None:
    moved = shutil.copytree(stored["llada_moe"], tmp_path / "moved")
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    run(adapter, tmp_path / "merged", base_model_name_or_path=str(moved))
    assert (tmp_path / "merged" / "config.json").read_text() == (moved / "config.json").read_text()


def test_the_command_line(adapter, tmp_path, monkeypatch, capsys, caplog) -> None:
    words = ["--adapter_model_name_or_path", str(adapter), "--output_dir", str(tmp_path / "merged")]
    monkeypatch.setattr(sys, "argv", ["merge_adapter", *words])
    tool.main()
    assert "its logits differ from base + adapter by at most" in caplog.messages[-1]
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    with pytest.raises(SystemExit) as caught:
        tool.main()
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith("holds something already: delete it, or give a new folder")
