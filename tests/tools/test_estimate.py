"""The estimate against what is counted: parameters, LoRA, optimizer, 4-bit, activations, traffic of tiny models."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from dllm.core.losses import token_nll
from dllm.models.layers import set_dropout
from dllm.models.lora import LoraSettings, add_lora
from dllm.models.spec import get_spec
from dllm.tools.estimate import memory
from dllm.tools.estimate.memory import Recipe
from dllm.tools.estimate.shape import read_shape, shape_of
from dllm.utils.parsing import InputError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric import ParametricMemory

# Larger than the usual tiny models: what the formulas leave out (masks, positions) must be small beside the rest.
SIZES = {
    "llada": {"d_model": 64, "n_heads": 4, "n_layers": 3, "mlp_hidden_size": 160, "embedding_size": 320},
    "llada_moe": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_intermediate_size": 48,
    },
    "llada2_moe": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 2,
        "moe_intermediate_size": 48,
        "intermediate_size": 160,
    },
    "fast_dllm_v2": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 160,
        "tie_word_embeddings": False,
    },
}
VOCABULARY, LENGTH, ROWS = 320, 128, 2


def _model(family: str, dtype: torch.dtype = torch.float32):
    spec = get_spec(family)
    model = spec.model_class(spec.config_class(**SIZES[family], vocab_size=VOCABULARY, mask_token_id=1)).to(dtype)
    set_dropout(model, 0.0)
    return model


def _recipe(**settings) -> Recipe:
    return Recipe(**{"length": LENGTH, "batch_size": ROWS, "dtype": "float32", "checkpointing": False, **settings})


@pytest.mark.parametrize("family", SIZES)
def test_numbers_of_parameters_are_exact(family: str, tmp_path) -> None:
    model = _model(family)
    model.config.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**text, "architectures": [type(model).__name__]}))
    shape = read_shape(str(tmp_path), "all-linear")
    assert shape == shape_of(model, "all-linear")
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    in_layers = [parameter for layer in model.backbone.layers for parameter in layer.parameters()]
    assert shape.num_outside == shape.num_parameters - sum(parameter.numel() for parameter in in_layers)
    linears = [
        module for layer in model.backbone.layers for module in layer.modules() if type(module) is torch.nn.Linear
    ]
    assert shape.num_linear == sum(linear.weight.numel() for linear in linears)
    adapted = add_lora(model, LoraSettings(r=3), seed=0)
    assert shape.num_low_rank(3) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_lora_on_some_linears(make_model) -> None:
    model = make_model("llada_moe")
    shape = shape_of(model, "q_proj,experts.1.up_proj")
    adapted = add_lora(model, LoraSettings(r=5, target_modules="q_proj,experts.1.up_proj"), seed=0)
    assert shape.num_low_rank(5) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    with pytest.raises(InputError, match="no linear of the layers has that name"):
        shape_of(make_model("llada_moe"), "lm_head")


@pytest.mark.parametrize("family", ["llada", "llada_moe", "llada2_moe"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_fast_weights_are_those_of_the_memory(make_model, family: str, fraction: float) -> None:
    model = make_model(family)
    config = MemoryConfig(enabled=True, inner_rank=3, inner_layer_fraction=fraction)
    fast = ParametricMemory(model, config).fast
    assert shape_of(model).num_fast(3, fraction, config.target_roles) == fast.numel


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_and_moments_are_those_of_adamw(dtype: str) -> None:
    model = _model("llada", getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    recipe, shape = _recipe(dtype=dtype), shape_of(model)
    moments = sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")
    assert memory.optimizer_memory(shape.num_parameters, recipe) == moments
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters())
    assert memory.estimate_memory(shape, recipe).gradients == gradients
    assert memory.weight_memory(shape, recipe) == sum(parameter.nbytes for parameter in model.parameters())


def test_4bit_linears_are_as_large_as_those_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(256, 512, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    state = linear.weight.quant_state
    parts = [linear.weight, state.absmax, state.state2.absmax]
    # Beside these each linear has two code tables of 16 and 256 numbers, which are left out.
    assert sum(part.nbytes for part in parts) == pytest.approx(memory.QUANTISED * 256 * 512, rel=1e-3)


def _saved_bytes(model, autocast: bool) -> int:
    """Bytes of all storages that autograd keeps between forward and backward, but for weights and the batch."""
    ids = torch.randint(2, VOCABULARY, (ROWS, LENGTH))
    positions = torch.arange(ROWS * LENGTH)[::2].contiguous()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), ids, positions)}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    precision = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
        logits = model(input_ids=ids, logit_positions=positions).logits
        token_nll(logits, ids.reshape(-1)[positions]).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


CASES = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "autocast": {"bf16": True},
    "lora, dropout": {"lora_rank": 8, "lora_dropout": 0.05, "dropout_mask_bytes": 4},  # so large on a CPU
    "lora, bfloat16": {"lora_rank": 8, "dtype": "bfloat16"},
    "lora, autocast": {"lora_rank": 8, "bf16": True},
    "checkpointing, lora, bfloat16": {"checkpointing": True, "lora_rank": 8, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_autograd_keeps(family: str, case: str) -> None:
    recipe = _recipe(**CASES[case])
    model = _model(family, getattr(torch, recipe.dtype))
    shape = shape_of(model, "all-linear" if recipe.lora_rank else None)
    if recipe.lora_rank:
        model = add_lora(model, LoraSettings(r=recipe.lora_rank, dropout=recipe.lora_dropout), seed=0)
    model.train()
    if recipe.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = memory.activation_memory(shape, recipe) + memory.head_memory(shape, recipe, with_logits=False)
    expected += memory.copied_memory(shape, recipe)
    # Left out are masks, positions and some of the routing; these are small models, whose small parts weigh more.
    assert expected == pytest.approx(_saved_bytes(model, recipe.autocast), rel=0.08)


def test_sharding_divides_what_it_should() -> None:
    shape = shape_of(_model("llada"))
    for engine, divided in (
        ("ddp", set()),
        ("zero1", {"optimizer"}),
        ("zero2", {"optimizer", "gradients"}),
        ("zero3", {"optimizer", "gradients", "weights"}),
        ("fsdp2", {"optimizer", "gradients", "weights"}),
    ):
        one, eight = (memory.estimate_memory(shape, _recipe(engine=engine, num_gpus=n)) for n in (1, 8))
        for name in ("weights", "gradients", "optimizer"):
            ratio = getattr(one, name) / getattr(eight, name)
            assert ratio == (8 if name in divided else 1), (engine, name)
        assert one.buffers == 0 and one.activations == eight.activations
        assert (eight.buffers > 0) == (engine != "ddp")


def test_buckets_of_ddp_are_a_second_copy_unless_the_gradients_live_in_them() -> None:
    shape = shape_of(_model("llada"))
    beside, inside = (memory.estimate_memory(shape, _recipe(num_gpus=2, bucket_view=view)) for view in (False, True))
    assert beside.buffers == beside.gradients and inside.buffers == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Weights + moments (and float32 copy) + gradients + flat copy of them + float32 copy of that.
        ({"engine": "zero1", "num_gpus": 2}, 160 + 480 + 80 + 80 + 160),
        ({"engine": "zero2", "num_gpus": 2}, 160 + 480 + 80 + 80 + 160),
        ({"engine": "zero2", "num_gpus": 2, "bf16": False}, 320 + 480 + 160 + 160),  # float32 gradients
        ({"engine": "zero3", "num_gpus": 2}, 80 + 480 + 80 + 80 + 160),
        ({"engine": "zero3", "num_gpus": 1}, 160 + 960 + 160 + 50 * (2 + 4)),  # moved 50 at a time
        # Whole gradients at the end of backward are more than the step's shares.
        ({"engine": "zero1", "num_gpus": 8}, 160 + 120 + 160),
        ({"engine": "fsdp2", "num_gpus": 4}, 80 + 160 + 80),
        # With several micro-batches whole bfloat16 gradients, or float32 ones.
        ({"engine": "fsdp2", "num_gpus": 4, "accumulation": 3}, 80 + 160 + 160),
        ({"engine": "fsdp2", "num_gpus": 4, "accumulation": 3, "bf16": False}, 80 + 160 + 320),
    ],
)
def test_the_optimizer_step_is_a_moment_of_its_own(monkeypatch, settings: dict, expected: int) -> None:
    for name in ("activation_memory", "head_memory", "layer_memory", "buffer_memory"):
        monkeypatch.setattr(memory, name, lambda *_: 0.0)
    monkeypatch.setattr(memory, "SUB_GROUP", 50)
    shape = replace(shape_of(_model("llada")), num_parameters=80)
    found = memory.estimate_memory(shape, _recipe(**{"bf16": True, **settings}))
    assert found.peak == expected


@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_whole_where_not_every_micro_batch_reduces(bf16: bool) -> None:
    shape, width = shape_of(_model("llada")), 2 if bf16 else 4
    whole = width * shape.num_parameters
    for engine, gathers in (("fsdp2", 2), ("zero2", 0), ("zero3", 2)):
        one, four = (_recipe(engine=engine, num_gpus=8, accumulation=m, bf16=bf16) for m in (1, 4))
        sent = memory.traffic(shape, four) - memory.traffic(shape, one)
        reductions = sent / (7 / 8 * whole) / 3 - gathers  # of each further micro-batch
        held = memory.estimate_memory(shape, four).gradients
        assert reductions == pytest.approx(0 if engine == "fsdp2" else 1), engine
        assert held == (whole if engine == "fsdp2" else whole / 8), engine


def test_without_deepspeed_the_peak_is_the_larger_of_two_moments() -> None:
    shape = shape_of(_model("llada"))
    recipe = _recipe()
    found = memory.estimate_memory(shape, recipe)
    layer = memory.layer_memory(shape.layers[0], shape.hidden, recipe.tokens, recipe)
    lasting = found.weights + found.optimizer
    assert found.peak == lasting + max(found.activations + found.head, found.gradients + layer)
    # Gradients of earlier micro-batches are there during the forward, too.
    again = memory.estimate_memory(shape, replace(recipe, accumulation=2))
    assert again.peak == lasting + found.gradients + max(found.activations + found.head, layer)


def _ring(num_gpus: int, numbers: int) -> float:
    """Numbers that one GPU sends in a reduce-scatter, and as many in an all-gather, by playing the ring."""
    return sum(numbers / num_gpus for _ in range(num_gpus - 1))


@pytest.mark.parametrize("num_gpus", [2, 8])
def test_traffic_is_that_of_rings(num_gpus: int) -> None:
    shape = shape_of(_model("llada_moe"))
    sent = 4 * _ring(num_gpus, shape.num_parameters)
    for engine, rounds in (
        ("ddp", 2),
        ("zero1", 2),
        ("zero2", 3 + 1),  # each of three micro-batches reduces
        ("zero3", 3 * (2 + 1)),
        ("fsdp2", 3 * 2 + 1),
    ):
        recipe = _recipe(engine=engine, num_gpus=num_gpus, accumulation=3)
        assert memory.traffic(shape, recipe) == pytest.approx(rounds * sent), engine
    # One flat all-reduce of the fast weights' gradients per inner step.
    plain = _recipe(num_gpus=num_gpus)
    fast = shape.num_fast(4, 0.5, memory.GATED)
    more = replace(plain, fast_weight_rank=4, fast_weight_fraction=0.5, inner_steps=3)
    extra = memory.traffic(shape, more) - memory.traffic(shape, plain)
    assert fast > 0 and extra == pytest.approx(3 * 4 * 2 * _ring(num_gpus, fast))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 7/8 of: all-reduce 2 * 1000 numbers; or reduce-scatter 1000, and gather. bfloat16 is 2 bytes.
        ({"engine": "ddp", "bf16": True}, 7000),  # float32 weights, hence gradients
        ({"engine": "ddp", "dtype": "bfloat16"}, 3500),
        ({"engine": "zero2", "bf16": True, "accumulation": 3}, 7000),  # 3 * 1750 and 1750
        ({"engine": "zero3", "bf16": True, "accumulation": 3}, 15750),  # 3 * (2 * 1750 + 1750)
        ({"engine": "fsdp2", "bf16": True, "accumulation": 3}, 12250),  # 3 * 2 * 1750 + 1750
        # LoRA of 40 numbers: frozen weights are gathered only; 70 bytes of adapter in bfloat16, 140 in float32.
        ({"engine": "ddp", "bf16": True, "lora_rank": 4}, 280),
        ({"engine": "zero1", "bf16": True, "lora_rank": 4}, 140),
        ({"engine": "zero3", "bf16": True, "lora_rank": 4, "accumulation": 3}, 11130),  # 3 * (2 * (1750 + 70) + 70)
        ({"engine": "fsdp2", "bf16": True, "lora_rank": 4, "accumulation": 3}, 11480),  # 3 * 2 * (1750 + 140) + 140
        ({"engine": "fsdp2", "lora_rank": 4, "accumulation": 3}, 21980),  # 3 * 2 * (3500 + 140) + 140
    ],
)
def test_what_is_reduced_and_what_is_gathered_have_their_own_sizes(monkeypatch, settings: dict, expected: int) -> None:
    shape = replace(shape_of(_model("llada"), "all-linear"), num_parameters=1000)
    monkeypatch.setattr(type(shape), "num_low_rank", lambda *_: 40)
    assert memory.traffic(shape, _recipe(num_gpus=8, **settings)) == pytest.approx(expected)


def test_one_gpu_sends_nothing() -> None:
    shape = shape_of(_model("llada"))
    assert all(memory.traffic(shape, _recipe(engine=engine)) == 0 for engine in memory.ENGINES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "zero4"}, "engine 'zero4' is unknown; allowed: ddp, fsdp2"),
        ({"load_in_4bit": True}, "4-bit weights cannot be trained themselves"),
        ({"load_in_4bit": True, "lora_rank": 2, "engine": "zero3"}, "4-bit weights are not sharded"),
        ({"optim_8bit": True, "engine": "zero2"}, "the 8-bit optimizer runs under ddp alone"),
    ],
)
def test_combinations_that_do_not_exist(settings, message) -> None:
    with pytest.raises(InputError, match=message):
        _recipe(**settings)


def test_a_family_of_other_layers_is_refused(make_model) -> None:
    with pytest.raises(InputError, match="rotary_encoder has no gated feed-forward part"):
        shape_of(make_model("rotary_encoder"))
