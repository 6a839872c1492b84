"""Memory over 4-bit and 8-bit linears with LoRA and activation checkpointing, on the CPU."""

import pytest
import torch

pytest.importorskip("bitsandbytes")
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import BitsAndBytesConfig

from dllm.core.schedulers import LinearAlphaScheduler
from dllm.data.collators import PaddingCollator
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.lora import LoraSettings, add_lora
from dllm.models.spec import load_config
from dllm.models.tiny import make_tiny_checkpoint
from memdlm import MemDLMConfig, MemDLMTrainer
from memdlm.memory.collator import MemoryCollator, inner_plan
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric import ParametricMemory

FAMILIES = ["llada", "llada_moe"]
# Larger weights than usual: near-uniform predictions would hide what the memory does.
STRONG = {"llada": {"init_std": 0.1}, "llada_moe": {"initializer_range": 0.1, "num_experts": 4}}
MEMORY = {"inner_rank": 4, "inner_alpha": 8.0, "inner_layer_fraction": 0.4}
NUDGE = 0.02  # of one fast weight, for the finite difference


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folder of a tiny checkpoint, by family; widths are multiples of 32, which bitsandbytes' fast kernel takes."""
    folder = tmp_path_factory.mktemp("nf4")
    return {family: make_tiny_checkpoint(folder / family, family, **STRONG[family]) for family in FAMILIES}


LORA = LoraSettings(r=4, alpha=8.0, dropout=0.0)


def _load(folder):
    """The model in 4-bit with LoRA matrices of which none is zero, activation checkpointing on, in train mode."""
    return _for_training(load_model(str(folder), load_in_4bit=True, dtype="float32", lora=LORA))


def _load_8bit(folder):
    """As `_load`, in 8-bit, for which `load_model` has no setting."""
    config, spec = load_config(folder)
    assert spec is not None
    quantised = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[spec.head])
    options = {"dtype": torch.float32, "quantization_config": quantised, "device_map": {"": "cpu"}}
    return _for_training(add_lora(spec.model_class.from_pretrained(folder, config=config, **options), LORA, seed=0))


def _for_training(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _rows(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for index in range(count):
        ids = torch.randint(20, 200, (16,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:], "example_id": index})
    return made


def _batch(config: MemoryConfig, mask_token_id: int, rows: list[dict] | None = None) -> dict:
    collator = MemoryCollator(
        PaddingCollator(2), config=config, scheduler=LinearAlphaScheduler(), mask_token_id=mask_token_id
    )
    return collator(_rows(3) if rows is None else rows)


def _train_once(model, config: MemoryConfig, rows: list[dict] | None = None):
    """(memory, phi_K, gradients by name) of a forward that writes the memory, and its backward."""
    batch = _batch(config, model.config.mask_token_id, rows)
    memory = ParametricMemory(model, config)
    plan = inner_plan(batch)
    model.zero_grad()
    with memory.attached():
        with memory.writing(plan, memory.prefixes(plan), memory.initial(plan, 0)):
            logits = model(input_ids=batch["noised_ids"], logit_positions=batch["loss_positions"]).logits
        torch.nn.functional.cross_entropy(logits, batch["input_ids"].flatten()[batch["loss_positions"]]).backward()
        assert memory.fast.value is not None
        written = memory.fast.value.clone()
    return memory, written, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_lora_alone_learns(gradients: dict[str, torch.Tensor]) -> None:
    assert gradients and all("lora_" in name for name in gradients)
    assert all(bool(value.isfinite().all()) for value in gradients.values())
    assert any(bool(value.any()) for value in gradients.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_weights_sit_on_the_4bit_linears_in_float32(stored, family: str) -> None:
    model = _load(stored[family])
    memory = ParametricMemory(model, MemoryConfig(**MEMORY))
    bases = [target.get_base_layer() for target in memory.fast.targets.values()]
    assert bases and all(isinstance(base, Linear4bit) for base in bases)
    batch = _batch(memory.config, model.config.mask_token_id)
    plan = inner_plan(batch)
    initial = memory.initial(plan, 0)
    assert initial.dtype == torch.float32
    shapes = [tuple(matrix.shape) for matrix in memory.fast.views(initial[0])]
    # The packed weight has another shape: sizes must come from the linear, not from its storage.
    assert shapes == [*((4, base.in_features) for base in bases), *((base.out_features, 4) for base in bases)]
    gradients, finished = [], []
    original = memory.fast.set

    def remember(flat) -> None:
        finished.append(flat)
        original(flat)

    memory.fast.set = remember
    with memory.attached():
        report = memory.write(
            plan,
            initial,
            reduce_gradient=lambda gradient: (gradients.append(gradient), gradient)[1],
        )
        assert finished[-1].dtype == torch.float32 and not torch.equal(finished[-1], initial)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert report.skipped.tolist() == [[0.0], [0.0]] and float(report.change) > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_inner_gradient_is_that_of_a_finite_difference(stored) -> None:
    # The dense family: where a token changes its expert the loss jumps, and no difference is a derivative.
    model = _load(stored["llada"])
    config = MemoryConfig(**MEMORY, num_inner_steps=1)
    memory = ParametricMemory(model, config)
    batch = _batch(config, model.config.mask_token_id)
    plan = inner_plan(batch)
    generator = torch.Generator().manual_seed(8)
    phi = memory.initial(plan, 0) + 0.02 * torch.randn(1, memory.fast.numel, generator=generator)
    gradients = []

    def loss_at(point: torch.Tensor) -> float:
        report = memory.write(
            plan,
            point,
            reduce_gradient=lambda gradient: (gradients.append(gradient), gradient)[1],
        )
        return float(report.losses[0])

    with memory.attached():
        loss_at(phi)
        gradient = gradients[0][0]
        # B of the first and of the last adapted linear.
        for index in (len(memory.fast.targets), len(memory.fast.sizes) - 1):
            start = sum(memory.fast.sizes[:index])
            entry = start + int(gradient[start : start + memory.fast.sizes[index]].abs().argmax())
            nudge = torch.zeros_like(phi)
            nudge[0, entry] = NUDGE
            difference = (loss_at(phi + nudge) - loss_at(phi - nudge)) / (2 * NUDGE)
            # Losses near 7 are exact to 5e-7 in float32, so the quotient to 1e-5, 0.1 % of gradients above 1e-2; the
            # cubic term of the difference is of NUDGE squared.
            assert abs(float(gradient[entry])) > 1e-2
            assert difference == pytest.approx(float(gradient[entry]), rel=5e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_with_memory_changes_no_gradient(stored, family: str) -> None:
    model = _load(stored[family])
    memory = ParametricMemory(model, MemoryConfig(**MEMORY))
    batch = _batch(memory.config, model.config.mask_token_id)
    plan = inner_plan(batch)

    def run() -> torch.Tensor:
        with memory.writing(plan, memory.prefixes(plan), memory.initial(plan, 0)):
            logits = model(input_ids=batch["noised_ids"], logit_positions=batch["loss_positions"]).logits
        return torch.nn.functional.cross_entropy(logits, batch["input_ids"].flatten()[batch["loss_positions"]])

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()
        with memory.attached():
            run().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    first = gradients()
    model.eval()
    with torch.no_grad(), memory.attached():
        run()
    second = gradients()
    assert first and all("lora_" in name for name in first) and first.keys() == second.keys()
    assert all(bool(value.isfinite().all()) for value in first.values())
    assert any(bool(value.any()) for value in first.values())
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_the_same_with_and_without_evaluations_in_between(stored, tmp_path, family: str) -> None:
    trained, rows = [], _rows(8)
    for name, strategy in (("with", {"eval_strategy": "steps", "eval_steps": 1}), ("without", {"eval_strategy": "no"})):
        model = _load(stored[family])
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        args = MemDLMConfig(
            output_dir=str(tmp_path / name),
            use_cpu=True,
            per_device_train_batch_size=4,
            max_steps=3,
            learning_rate=1e-2,
            warmup_steps=0,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            seed=1,
            gradient_checkpointing=True,
            mem_enabled=True,
            **{f"mem_{key}": value for key, value in MEMORY.items()},
            **strategy,
        )
        trainer = MemDLMTrainer(
            model=model,
            args=args,
            processing_class=load_tokenizer(str(stored[family])),
            train_dataset=rows,
            eval_dataset=rows,
        )
        trainer.train()
        logs = trainer.state.log_history
        assert len([entry for entry in logs if "eval_memory_loss" in entry]) == (3 if name == "with" else 0)
        assert all(entry["memory_gap"] > 0 for entry in logs if "memory_gap" in entry)
        after = {key: value.detach().clone() for key, value in model.named_parameters()}
        for key, value in after.items():  # LoRA moves, the packed weights and everything else stay
            assert torch.equal(value, before[key]) == ("lora_" not in key), key
        trained.append(after)
    for key, value in trained[0].items():
        assert torch.equal(value, trained[1][key]), key


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_gets_a_memory_of_its_own_over_4bit(stored, family: str) -> None:
    model = _load(stored[family])
    config = MemoryConfig(**MEMORY, scope="row")
    memory, together, gradients = _train_once(model, config)
    _assert_lora_alone_learns(gradients)
    assert together.shape == (3, memory.fast.numel) and together.dtype == torch.float32
    assert memory.report is not None and float(memory.report.change.min()) > 0
    for index, row in enumerate(_rows(3)):
        alone = _train_once(model, config, [row])[1][0]
        change = float((alone - memory.initial(inner_plan(_batch(config, 0)), 0)[index]).norm())
        # float32 products of another shape, and the inner steps amplify their rounding.
        assert float((together[index] - alone).norm()) < 1e-3 * change


@pytest.mark.parametrize("scope", ["batch", "row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_fast_weights_have_the_size_of_the_linear_over_4bit(stored, family: str, scope: str) -> None:
    model = _load(stored[family])
    config = MemoryConfig(inner_adapter_type="full", inner_layer_fraction=0.4, scope=scope)  # pyright: ignore
    memory, written, gradients = _train_once(model, config)
    _assert_lora_alone_learns(gradients)
    assert memory.report is not None and memory.report.skipped.sum() == 0
    name, target = next(iter(memory.fast.targets.items()))
    base = target.get_base_layer()
    delta = memory.fast.named(written)[f"{name}.D"]
    assert delta.shape == (len(written), base.out_features, base.in_features) and bool(delta.any())
    x = torch.randn(3, 5, base.in_features)
    with torch.no_grad(), memory.attached():
        before = target(x)
        memory.fast.set(written)
        after = target(x)
    # float32 on both sides.
    assert torch.allclose(after - before, x @ delta.transpose(1, 2), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scope", ["batch", "row"])
@pytest.mark.parametrize("objective", ["distill", "distill_reverse", "distill_hidden"])
@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_over_4bit(stored, family: str, objective: str, scope: str) -> None:
    model = _load(stored[family])
    config = MemoryConfig(**MEMORY, inner_loss_type=objective, scope=scope)  # pyright: ignore[reportArgumentType]
    memory, written, gradients = _train_once(model, config)
    _assert_lora_alone_learns(gradients)
    assert memory.report is not None and bool(memory.report.losses.isfinite().all()) and bool(written.isfinite().all())
    # A row's first state may be the anchor itself; the teacher of the last one sees the clean input.
    assert memory.report.skipped[-1].sum() == 0 and float(memory.report.change.min()) > 0
    assert float(memory.report.losses[-1].min()) > 0


@pytest.mark.parametrize(
    "settings",
    [{"inner_adapter_type": "full"}, {**MEMORY, "scope": "row"}, {**MEMORY, "inner_loss_type": "distill"}],
    ids=["full", "row", "distill"],
)
def test_training_over_4bit_moves_lora_alone(stored, tmp_path, settings: dict) -> None:
    model = _load(stored["llada_moe"])
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    args = MemDLMConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=1e-2,
        warmup_steps=0,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=True,
        mem_enabled=True,
        **{f"mem_{key}": value for key, value in settings.items()},
    )
    tokenizer = load_tokenizer(str(stored["llada_moe"]))
    trainer = MemDLMTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=_rows(8))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(entry["mem_change"] > 0 and entry["loss"] > 0 for entry in logs)
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key]) == ("lora_" not in key) and bool(value.isfinite().all()), key


@pytest.mark.parametrize("scope", ["batch", "row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_over_8bit_linears(stored, family: str, scope: str) -> None:
    model = _load_8bit(stored[family])
    ids = torch.tensor([row["input_ids"] for row in _rows(3)])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    config = MemoryConfig(**MEMORY, scope=scope)  # pyright: ignore[reportArgumentType]
    memory, written, gradients = _train_once(model, config)
    bases = [target.get_base_layer() for target in memory.fast.targets.values()]
    assert bases and all(isinstance(base, Linear8bitLt) and base.weight.dtype == torch.int8 for base in bases)
    shapes = [tuple(matrix.shape[1:]) for matrix in memory.fast.views(written)]
    assert shapes == [*((4, base.in_features) for base in bases), *((base.out_features, 4) for base in bases)]
    assert written.dtype == torch.float32 and bool(written.isfinite().all())
    assert memory.report is not None and memory.report.skipped.sum() == 0 and float(memory.report.change.min()) > 0
    _assert_lora_alone_learns(gradients)
    again = _train_once(model, config)
    assert torch.equal(again[1], written) and all(torch.equal(again[2][name], gradients[name]) for name in gradients)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_the_inner_gradient_over_8bit_is_that_over_the_same_weights_in_float32(stored) -> None:
    quantised, plain = _load_8bit(stored["llada"]), _load_8bit(stored["llada"])
    for module in list(plain.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear8bitLt):
                linear = torch.nn.Linear(child.in_features, child.out_features, bias=False)
                linear.weight.data = child.weight.CB * child.weight.SCB[:, None] / 127
                setattr(module, name, linear)
    config = MemoryConfig(**MEMORY, num_inner_steps=1)
    batch = _batch(config, quantised.config.mask_token_id)
    gradients = []
    for model in (quantised, plain):
        memory = ParametricMemory(model, config)
        plan = inner_plan(batch)
        with memory.attached():
            memory.write(
                plan,
                memory.initial(plan, 0),
                reduce_gradient=lambda gradient: (gradients.append(gradient[0]), gradient)[1],
            )
    first, second = gradients
    # 8-bit activations: each is rounded by up to half a percent of the largest of its position.
    assert float((first - second).norm()) < 0.05 * float(second.norm())
