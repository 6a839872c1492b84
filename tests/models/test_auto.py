"""Loading: what comes back equals what was stored, and what cannot be loaded as asked is one line."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, PeftModelForCausalLM
from safetensors.torch import load_file, save_file
from torch import nn

import dllm.utils
import memdlm.models
from dllm.models import auto, quant, spec_of
from dllm.models.auto import LoraSettings, load_model, load_tokenizer
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils import InputError, ModelArguments

TEXT = "Some words to learn pieces from, and some more words. " * 5
FAMILIES = ("llada", "llada_moe", "fast_dllm_v2")
# Odd and different sizes, so that a transposed or confused dimension shows.
SIZES = {
    "llada": {"d_model": 24, "n_heads": 2, "n_kv_heads": 1, "n_layers": 3, "mlp_hidden_size": 40},
    "llada_moe": {
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "expert_intermediate_size": 20,
        "dense_intermediate_size": 40,
        "moe_layer_freq": [0, 1, 1],
    },
    "fast_dllm_v2": {
        "hidden_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "intermediate_size": 40,
        "tie_word_embeddings": False,
    },
}
SMALL = LoraSettings(r=3, alpha=6, dropout=0.0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, pathlib.Path]:
    """One tiny checkpoint per family; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    return {name: make_tiny_checkpoint(folder / name, name, TEXT, 300, **SIZES[name]) for name in FAMILIES}


@pytest.fixture
def copy(stored, tmp_path) -> pathlib.Path:
    """A LLaDA-MoE checkpoint to damage."""
    return pathlib.Path(shutil.copytree(stored["llada_moe"], tmp_path / "copy"))


def edit(path: pathlib.Path, **changes) -> None:
    """Sets fields of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def error_of(call) -> str:
    """The message of the InputError that a call raises; it must be one line."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def ids() -> torch.Tensor:
    return torch.randint(0, 250, (3, 7), generator=torch.Generator().manual_seed(1))  # [3, 7]


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids()).logits


def shake(model) -> None:
    """Gives every LoRA matrix values as after training (B starts at zero, which would hide it)."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


# Plain models


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_logits_are_those_of_the_checkpoint(stored, family):
    model = load_model(str(stored[family]))
    saved = load_file(stored[family] / "model.safetensors")
    assert set(model.state_dict()) == set(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert not model.training and model.dtype == torch.float32


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_is_the_one_asked_for_and_auto_the_stored_one(stored, tmp_path, name):
    model = load_model(str(stored["llada_moe"]), dtype=name)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, name)}
    model.save_pretrained(tmp_path / "again")
    shutil.copy(stored["llada_moe"] / "tokenizer.json", tmp_path / "again")
    assert load_model(str(tmp_path / "again")).dtype == getattr(torch, name)


def test_attention_kernels_agree(stored):
    eager = load_model(str(stored["llada_moe"]), attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    # float32 sums in another order: logits are about 1, so 1e-5 is a hundred roundings.
    torch.testing.assert_close(logits(eager), logits(load_model(str(stored["llada_moe"]))), atol=1e-5, rtol=0)


def test_a_published_config_needs_no_edit(copy):
    # Published LLaDA-MoE names the model type of dense LLaDA, and remote code.
    before = logits(load_model(str(copy)))
    edit(copy / "config.json", model_type="llada", auto_map={"AutoModel": "modeling.LLaDAMoEModelLM"})
    model = load_model(str(copy))
    assert spec_of(model).name == "llada_moe"
    assert torch.equal(logits(model), before)
    assert load_tokenizer(str(copy), model=model).mask_token == "<|mask|>"


def test_shards_load_like_one_file(copy):
    model = load_model(str(copy))
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="20KB")
    assert len(list(copy.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load_model(str(copy))), logits(model))


def test_public_names_take_model_arguments(stored):
    args = ModelArguments(model_name_or_path=str(stored["llada_moe"]), dtype="bfloat16")
    assert dllm.utils.get_model(args).dtype == torch.bfloat16
    assert dllm.utils.get_model(model_args=args, dtype="float32").dtype == torch.float32
    assert memdlm.models.get_model(model_name_or_path=args.model_name_or_path).dtype == torch.float32
    assert memdlm.models.get_tokenizer(args).mask_token == dllm.utils.get_tokenizer(model_args=args).mask_token
    assert "lora_q" in error_of(lambda: dllm.utils.get_model(args, lora_q=1))
    assert "name a model" in error_of(dllm.utils.get_model)


def test_a_hub_name_loads_from_the_cache_without_network(copy, tmp_path):
    cached = tmp_path / "hub" / "models--some--tiny"
    shutil.copytree(copy, cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    code = "import dllm.utils as u; m = u.get_model(model_name_or_path='some/tiny'); t = u.get_tokenizer("
    code += "model_name_or_path='some/tiny', model=m); print(type(m).__name__, m.name_or_path, t.mask_token)"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].split() == ["LLaDAMoEModelLM", "some/tiny", "<|mask|>"], done.stderr[-2000:]


# Damaged or unfit checkpoints


def test_a_folder_that_is_not_there(tmp_path):
    assert "is no folder here" in error_of(lambda: load_model(str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    assert "no config.json" in error_of(lambda: load_model(str(tmp_path / "empty")))


@pytest.mark.parametrize("keep", [0, 5, 3000, -1])
def test_a_truncated_file_is_named(copy, keep):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = error_of(lambda: load_model(str(copy)))
    assert str(file) in message and "cut short" in message and "again" in message


def test_a_missing_shard_is_named(copy):
    load = load_model(str(copy))
    (copy / "model.safetensors").unlink()
    load.save_pretrained(copy, max_shard_size="20KB")
    gone = sorted(copy.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert gone.name in error_of(lambda: load_model(str(copy)))


def test_missing_weights_and_index(copy):
    (copy / "model.safetensors").unlink()
    assert "safetensors" in error_of(lambda: load_model(str(copy)))
    (copy / "model.safetensors.index.json").write_text("{ half")
    assert "damaged" in error_of(lambda: load_model(str(copy)))


def test_tensors_must_be_exactly_those_of_the_model(copy):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.q_proj.weight"

    def message(changed: dict[str, torch.Tensor]) -> str:
        save_file({key: tensor.contiguous() for key, tensor in changed.items()}, file, metadata={"format": "pt"})
        return error_of(lambda: load_model(str(copy)))

    assert f"lacks {name}" in message({key: tensor for key, tensor in tensors.items() if key != name})
    assert "has extra.weight too much" in message({**tensors, "extra.weight": torch.zeros(2)})
    assert f"another shape for {name} [24, 23]" in message({**tensors, name: tensors[name][:, :-1]})
    assert "and 5 more" in message({key: tensors[key] for key in list(tensors)[8:]})


def test_a_config_of_another_size_or_family(copy):
    edit(copy / "config.json", expert_intermediate_size=28)
    assert "another shape" in error_of(lambda: load_model(str(copy)))
    edit(copy / "config.json", architectures=["GPT2LMHeadModel"], model_type="gpt2")
    assert "known: llada" in error_of(lambda: load_model(str(copy)))
    (copy / "config.json").write_text("{ half")
    assert "config.json" in error_of(lambda: load_model(str(copy)))


def test_a_quantised_checkpoint_is_refused(copy):
    edit(copy / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised already" in error_of(lambda: load_model(str(copy)))


def test_wrong_settings(stored):
    path = str(stored["llada_moe"])
    assert "allowed: auto, float32" in error_of(lambda: load_model(path, dtype="int8"))
    assert "nonsense" in error_of(lambda: load_model(path, attn_implementation="nonsense"))
    assert "no effect" in error_of(lambda: load_model(path, is_trainable=True))
    assert "no effect" in error_of(lambda: load_model(path, base_model_name_or_path=path))
    assert "at least 1" in error_of(lambda: LoraSettings(r=0))
    assert "above 0" in error_of(lambda: LoraSettings(alpha=0))
    assert "[0, 1)" in error_of(lambda: LoraSettings(dropout=1.0))
    assert "allowed: none" in error_of(lambda: LoraSettings(bias="some"))


# Mask token and tokenizer


def _without_mask_token(folder: pathlib.Path, rename: bool = False) -> None:
    edit(folder / "config.json", mask_token_id=None)
    edit(folder / "tokenizer_config.json", mask_token=None)
    if rename:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_text((folder / name).read_text().replace("<|mask|>", "<|other|>"))


def test_no_mask_token_is_an_error(copy):
    _without_mask_token(copy, rename=True)
    for load in (load_model, load_tokenizer):
        message = error_of(lambda load=load: load(str(copy)))
        assert "no mask token" in message and "<|mask|>" in message and "tokenizer_config.json" in message


def test_the_mask_token_is_found_by_the_family_s_name(copy):
    _without_mask_token(copy)
    assert load_model(str(copy)).config.mask_token_id is None  # the configuration stays that of the checkpoint
    tokenizer = load_tokenizer(str(copy))
    assert tokenizer.mask_token == "<|mask|>"
    assert tokenizer("a<|mask|>").input_ids[-1] == tokenizer.mask_token_id


def test_the_mask_token_is_found_by_its_id(copy):
    mask = json.loads((copy / "config.json").read_text())["mask_token_id"]
    _without_mask_token(copy, rename=True)
    edit(copy / "config.json", mask_token_id=mask)
    assert load_tokenizer(str(copy)).mask_token == "<|other|>"


def test_tokenizer_and_config_must_agree_on_the_mask_token(copy):
    edit(copy / "config.json", mask_token_id=5)
    assert "5" in error_of(lambda: load_tokenizer(str(copy)))
    edit(copy / "config.json", mask_token_id=10**6)
    assert "outside" in error_of(lambda: load_model(str(copy)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_gets_what_it_lacks(stored, tmp_path, family):
    whole = load_tokenizer(str(stored[family]))
    folder = pathlib.Path(shutil.copytree(stored[family], tmp_path / "bare"))
    edit(folder / "tokenizer_config.json", pad_token=None, bos_token=None, eos_token=None, mask_token=None)
    edit(folder / "config.json", pad_token_id=None)
    edit(folder / "tokenizer_config.json", chat_template=None, padding_side="left")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    bare = load_tokenizer(str(folder))
    assert bare.padding_side == "right"
    assert (bare.pad_token_id, bare.bos_token_id, bare.eos_token_id, bare.mask_token_id) == (
        whole.pad_token_id,
        whole.bos_token_id,
        whole.eos_token_id,
        whole.mask_token_id,
    )
    chat = [{"role": "user", "content": "Some words"}, {"role": "assistant", "content": "and more"}]
    assert bare.apply_chat_template(chat, tokenize=False) == whole.apply_chat_template(chat, tokenize=False)
    assert len(bare) == len(whole)


def test_the_checkpoint_s_own_chat_template_stays(copy):
    (copy / "chat_template.jinja").write_text("mine")
    assert load_tokenizer(str(copy)).chat_template == "mine"


def test_every_token_needs_an_embedding(stored, copy):
    shutil.rmtree(copy)
    make_tiny_checkpoint(copy, "llada_moe", TEXT, 262, **SIZES["llada_moe"])
    small = load_model(str(copy))
    message = error_of(lambda: load_tokenizer(str(stored["llada_moe"]), model=small))
    assert "262 embeddings" in message
    assert len(load_tokenizer(str(copy), model=small)) == 262


def test_no_tokenizer_files(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in error_of(lambda: load_tokenizer(str(copy)))


# LoRA


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_of_the_layers_and_nothing_else(stored, family):
    plain = load_model(str(stored[family]))
    model = load_model(str(stored[family]), lora=SMALL)
    spec = spec_of(plain)
    wanted = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and name != spec.head}
    got = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        for name, parameter in model.named_parameters()
        if "lora_A" in name
    }
    assert got == wanted and all(name.startswith(spec.layers) for name in got)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    assert torch.equal(logits(model), logits(plain))  # B is zero


def test_named_targets_and_their_check(stored):
    model = load_model(str(stored["llada"]), lora=LoraSettings(r=2, target_modules="q_proj, ff_out"))
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "ff_out"}
    assert model.get_submodule("base_model.model.model.transformer.ff_out").__class__ is nn.Linear
    for family, wrong in (("llada", "query"), ("llada_moe", "lm_head"), ("llada_moe", "gate")):
        settings = LoraSettings(target_modules=f"q_proj,{wrong}")
        message = error_of(lambda family=family, settings=settings: load_model(str(stored[family]), lora=settings))
        assert wrong in message and "allowed: all-linear" in message and "up_proj" in message


def test_lora_is_seeded_and_leaves_the_global_state_alone(stored):
    def matrices(seed: int) -> torch.Tensor:
        model = load_model(str(stored["llada_moe"]), lora=SMALL, seed=seed)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = matrices(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(matrices(1), first)
    assert not torch.equal(matrices(2), first)


def test_lora_flags_of_model_arguments(stored):
    args = ModelArguments(str(stored["llada_moe"]), lora=True, lora_r=5, lora_alpha=7, target_modules="up_proj")
    config = dllm.utils.get_model(args).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (5, 7, 0.05, {"up_proj"})
    config = dllm.utils.get_model(ModelArguments(str(stored["llada_moe"]), lora=True)).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (32, 64, 0.05, "none")


# Adapters


@pytest.fixture
def adapter(stored, tmp_path) -> pathlib.Path:
    """An adapter of the LLaDA-MoE checkpoint with matrices as after training."""
    model = load_model(str(stored["llada_moe"]), lora=SMALL)
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def expected(base: pathlib.Path, **options) -> torch.Tensor:
    model = load_model(str(base), lora=SMALL, **options)
    shake(model)
    return logits(model)


def test_an_adapter_loads_over_its_base_in_each_spelling(stored, adapter):
    base = stored["llada_moe"]
    over = load_model(str(base), adapter_model_name_or_path=str(adapter))
    alone = load_model(str(adapter))
    given = load_model(str(adapter), base_model_name_or_path=str(base))
    for model in (over, alone, given):
        assert isinstance(model, PeftModel) and not model.training
        assert torch.equal(logits(model), expected(base))
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_can_be_trained_on(stored, adapter):
    model = load_model(str(adapter), is_trainable=True)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    args = ModelArguments(str(stored["llada_moe"]), lora=True, adapter_model_name_or_path=str(adapter))
    assert any(p.requires_grad for p in dllm.utils.get_model(args).parameters())
    args = ModelArguments(str(adapter), lora=True, lora_r=9)
    assert "--lora_r has no effect" in error_of(lambda: dllm.utils.get_model(args))
    assert "exclude each other" in error_of(lambda: load_model(str(adapter), lora=SMALL))


def test_the_adapter_s_base_can_have_moved(stored, adapter, tmp_path, monkeypatch):
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    assert "pass base_model_name_or_path" in error_of(lambda: load_model(str(adapter)))
    base = stored["llada_moe"]
    assert torch.equal(logits(load_model(str(adapter), base_model_name_or_path=str(base))), expected(base))
    edit(adapter / "adapter_config.json", base_model_name_or_path=base.name)
    monkeypatch.setenv("BASE_MODELS_DIR", str(base.parent))
    assert torch.equal(logits(load_model(str(adapter))), expected(base))


def test_tokenizer_of_an_adapter(stored, adapter):
    assert load_tokenizer(str(adapter)).mask_token == "<|mask|>"
    own = load_tokenizer(str(stored["llada_moe"]))
    own.chat_template = "mine"
    own.save_pretrained(adapter)
    assert load_tokenizer(str(adapter)).chat_template == "mine"


def test_a_published_causal_lm_adapter_loads(stored, adapter):
    edit(adapter / "adapter_config.json", task_type="CAUSAL_LM")
    model = load_model(str(adapter))
    assert isinstance(model, PeftModelForCausalLM)
    assert torch.equal(logits(model), expected(stored["llada_moe"]))
    positions = torch.tensor([0, 5, 20])
    with torch.no_grad():
        some = model(input_ids=ids(), attention_mask=torch.ones_like(ids()), logit_positions=positions).logits
    # The head runs on three rows instead of 21: float32 products of another shape differ in the last bits.
    torch.testing.assert_close(some, logits(model).flatten(0, 1)[positions], atol=1e-6, rtol=0)


def test_an_adapter_of_another_base_is_refused(stored, adapter, tmp_path):
    def message(base: pathlib.Path) -> str:
        return error_of(lambda: load_model(str(base), adapter_model_name_or_path=str(adapter)))

    assert "does not fit" in message(stored["llada"])
    sizes = {**SIZES["llada_moe"], "expert_intermediate_size": 28}
    assert "does not fit" in message(make_tiny_checkpoint(tmp_path / "wide", "llada_moe", TEXT, 300, **sizes))
    sizes = {**SIZES["llada_moe"], "num_hidden_layers": 2, "moe_layer_freq": [0, 1]}
    assert "too much" in message(make_tiny_checkpoint(tmp_path / "low", "llada_moe", TEXT, 300, **sizes))
    sizes = {**SIZES["llada_moe"], "num_hidden_layers": 4, "moe_layer_freq": [0, 1, 1, 1]}
    assert "lacks" in message(make_tiny_checkpoint(tmp_path / "high", "llada_moe", TEXT, 300, **sizes))


def test_a_damaged_adapter_is_named(stored, adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    assert str(file) in error_of(lambda: load_model(str(adapter)))
    file.unlink()
    assert "has no adapter_model.safetensors" in error_of(lambda: load_model(str(adapter)))
    edit(adapter / "adapter_config.json", peft_type="PROMPT_TUNING")
    assert "kinds like LoRA" in error_of(lambda: load_model(str(adapter)))
    base = str(stored["llada_moe"])
    assert "adapter_config.json" in error_of(lambda: load_model(base, adapter_model_name_or_path=base))


# 4-bit


@pytest.mark.parametrize("family", FAMILIES)
def test_4bit_covers_the_linears_of_the_layers_and_spares_the_rest(stored, family):
    plain = load_model(str(stored[family]))
    model = load_model(str(stored[family]), load_in_4bit=True)
    linears = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
    linears.remove(spec_of(plain).head)
    count, share = quant.quantised_share(model)
    weights = sum(plain.get_parameter(f"{name}.weight").numel() for name in linears)
    assert count == len(linears)
    assert share == pytest.approx(weights / sum(p.numel() for p in plain.parameters()))
    packed = {f"{name}.weight" for name in linears}
    for name, parameter in model.named_parameters():
        assert (parameter.dtype == torch.uint8) == (name in packed), name
        if name not in packed:
            assert torch.equal(parameter, plain.get_parameter(name)), name
    # NF4 keeps a weight to about a tenth of its block's largest, so the logits stay those of this model.
    similarity = torch.cosine_similarity(logits(model).flatten(), logits(plain).flatten(), dim=0)
    assert similarity > 0.9


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_4bit_computes_in_the_dtype_asked_for(stored, name):
    model = load_model(str(stored["llada_moe"]), load_in_4bit=True, dtype=name)
    assert logits(model).dtype == getattr(torch, name)
    trained = load_model(str(stored["llada_moe"]), load_in_4bit=True, dtype=name, lora=SMALL)
    rest = {parameter.dtype for parameter in trained.parameters() if parameter.dtype != torch.uint8}
    assert rest == {torch.float32}
    assert not trained.get_base_model().is_gradient_checkpointing


@pytest.mark.parametrize("family", FAMILIES)
def test_4bit_gradients_are_the_same_before_and_after_an_evaluation(tmp_path, family):
    # Sizes that the inference kernel of bitsandbytes takes (multiples of 32): the default ones.
    path = make_tiny_checkpoint(tmp_path / "tiny", family, TEXT, 320)
    model = load_model(str(path), load_in_4bit=True, lora=SMALL)
    shake(model)

    def gradients() -> list[torch.Tensor]:
        model.train()
        loss = model(input_ids=ids()).logits.square().mean()
        return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))

    first = gradients()
    evaluated = logits(model)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
    assert torch.equal(logits(model), evaluated)
    assert any(gradient.abs().max() > 0 for gradient in first)


def test_an_adapter_comes_back_over_a_4bit_base(stored, adapter, tmp_path):
    base = stored["llada_moe"]
    model = load_model(str(adapter), load_in_4bit=True, is_trainable=True)
    assert torch.equal(logits(model), expected(base, load_in_4bit=True))
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "again"))
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
    again = load_model(str(tmp_path / "again"), load_in_4bit=True)
    assert torch.equal(logits(again), logits(model))


def test_4bit_that_cannot_be_is_an_error(stored, monkeypatch):
    path = str(stored["llada_moe"])
    with monkeypatch.context() as patch:
        patch.setattr(quant, "is_bitsandbytes_available", lambda: False)
        assert "pip install 'memdlm[quant]'" in error_of(lambda: load_model(path, load_in_4bit=True))
    with monkeypatch.context() as patch:
        # As if this version of transformers left the linears alone.
        patch.setattr(auto, "nf4_config", lambda *_: None)
        assert "4-bit" in error_of(lambda: load_model(path, load_in_4bit=True))


def test_dropout_is_a_setting_and_leaves_the_configuration_alone(tmp_path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "tiny", "llada", attention_dropout=0.3, residual_dropout=0.3)
    off = auto.get_model(model_name_or_path=str(folder))
    kept = auto.get_model(model_name_or_path=str(folder), dropout=None)
    blocks = [model.backbone.layers[0] for model in (off, kept)]
    assert [(block.dropout.p, block.attention_dropout) for block in blocks] == [(0.0, 0.0), (0.3, 0.3)]
    assert off.config.to_dict() == kept.config.to_dict()


@pytest.mark.parametrize("in_4bit", [False, True])
def test_a_tied_head_stays_tied_under_lora(tmp_path, in_4bit):
    if in_4bit:
        pytest.importorskip("bitsandbytes")
    path = make_tiny_checkpoint(tmp_path / "tied", "fast_dllm_v2", TEXT, 300, hidden_size=32, num_hidden_layers=2)
    model = load_model(str(path), load_in_4bit=in_4bit, lora=SMALL)
    base = model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight and not base.lm_head.weight.requires_grad
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    again = load_model(str(tmp_path / "adapter"), load_in_4bit=in_4bit)
    # float32, and weights at other addresses.
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)
