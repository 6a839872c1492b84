"""A written memory as a LoRA adapter that plain PEFT loads."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from dllm.models.auto import load_model
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.parsing import InputError
from memdlm.memory import MemoryConfig, ParametricMemory

PROMPT = list(range(8, 28))
ALL_ROLES = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def _memory(model, **settings) -> ParametricMemory:
    adapter = {} if "inner_adapter_type" in settings else {"inner_rank": 4, "inner_alpha": 6.0}
    settings = {"inner_layer_fraction": 0.6, "prompt_mask_ratio": 0.4, **adapter, **settings}
    return ParametricMemory(model, MemoryConfig.for_decoding(**settings))


@pytest.mark.parametrize(
    ("roles", "fraction", "num_targets"),
    [("gate_proj,up_proj,down_proj", 0.6, 6), (ALL_ROLES, 0.6, 14), (ALL_ROLES, 1.0, 21)],
)
def test_plain_peft_loads_the_adapter_with_equal_logits(
    make_model, tmp_path, roles: str, fraction: float, num_targets: int
) -> None:
    memory = _memory(make_model("llada"), inner_target_modules=roles, inner_layer_fraction=fraction)
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    with memory.attached():
        memory.adapt([PROMPT])
        memory.export_adapter(tmp_path / "adapter")
        memory.place(memory.write_prompts([PROMPT]), shared=True)
        expected = memory.lm(input_ids=ids).logits
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 6.0, "LORA")
    assert len(config["target_modules"]) == num_targets
    base = make_model("llada")
    plain = base(input_ids=ids).logits
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    names = {name for name, _ in peft.named_parameters() if "lora_" in name}
    assert len(names) == 2 * num_targets
    assert not any(name.startswith("base_model.model.model.transformer.ff_out.") for name in names)  # the head
    # float32: PEFT scales B A x, the fast weights scale A x.
    assert torch.allclose(peft(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_attention_of_a_model_with_experts_is_exported(make_model, tmp_path) -> None:
    memory = _memory(make_model("llada_moe"), inner_target_modules="q_proj,o_proj")
    ids = torch.tensor([PROMPT])
    with memory.attached():
        memory.adapt([PROMPT])
        memory.export_adapter(tmp_path)  # an empty folder
        expected = memory.lm(input_ids=ids).logits
    peft = PeftModel.from_pretrained(make_model("llada_moe"), tmp_path).eval()
    assert torch.allclose(peft(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)  # float32, as above


def test_an_exported_adapter_loads_by_the_name_of_its_base(tmp_path) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", "llada")
    memory = _memory(load_model(str(base)), inner_layer_fraction=0.3)
    ids = torch.tensor([PROMPT])
    with memory.attached():
        memory.adapt([PROMPT])
        expected = memory.lm(input_ids=ids).logits
        memory.export_adapter(tmp_path / "adapter")
        values = memory.values()
    assert torch.allclose(load_model(str(tmp_path / "adapter"))(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.transformer.blocks.3.ff_out.lora_B.weight"
    assert torch.equal(stored[key], values["transformer.blocks.3.ff_out.B"][0])


def test_what_is_no_lora_of_plain_linears_is_refused(make_model, tmp_path) -> None:
    target = tmp_path / "adapter"

    def refusal(model, **settings) -> str:
        memory = _memory(model, **settings)
        with memory.attached():
            memory.adapt([PROMPT])
            with pytest.raises(InputError) as error:
                memory.export_adapter(target)
        assert "\n" not in str(error.value) and not target.exists()
        return str(error.value)

    assert "routed experts" in refusal(make_model("llada_moe"))
    assert "dense fast weights" in refusal(make_model("llada"), inner_adapter_type="full")
    adapted = get_peft_model(make_model("llada"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert "PEFT adapter already" in refusal(adapted, inner_target_modules="q_proj")
    assert "PEFT adapter already" in refusal(adapted, inner_target_modules="up_proj")


def test_a_quantised_base_is_refused(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    base = make_tiny_checkpoint(tmp_path / "base", "llada", init_std=0.1)
    memory = _memory(load_model(str(base), load_in_4bit=True, dtype="float32"))
    with memory.attached():
        memory.adapt([PROMPT])
        with pytest.raises(InputError, match="the base is quantised"):
            memory.export_adapter(tmp_path / "adapter")


def test_one_memory_in_place_and_a_free_folder_are_needed(make_model, tmp_path) -> None:
    memory = _memory(make_model("llada"))
    with memory.attached():
        with pytest.raises(InputError, match="0 are in place"):
            memory.export_adapter(tmp_path)
        memory.adapt([PROMPT, PROMPT[::-1]])
        with pytest.raises(InputError, match="2 are in place"):
            memory.export_adapter(tmp_path)
        memory.adapt([PROMPT])
        (tmp_path / "letter.txt").write_text("dear")
        with pytest.raises(InputError, match="holds something already"):
            memory.export_adapter(tmp_path)
        with pytest.raises(InputError, match="cannot be written"):
            memory.export_adapter(tmp_path / "letter.txt" / "adapter")
    assert [entry.name for entry in tmp_path.iterdir()] == ["letter.txt"]
