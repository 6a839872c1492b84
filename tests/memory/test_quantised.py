"""Memory over 4-bit linears with LoRA and activation checkpointing, on the CPU."""

import pytest
import torch

pytest.importorskip("bitsandbytes")
from bitsandbytes.nn import Linear4bit

from dllm.core.schedulers import LinearAlphaScheduler
from dllm.data.collators import PaddingCollator
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.lora import LoraSettings
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


def _load(folder):
    """The model in 4-bit with LoRA matrices of which none is zero, activation checkpointing on, in train mode."""
    lora = LoraSettings(r=4, alpha=8.0, dropout=0.0)
    model = load_model(str(folder), load_in_4bit=True, dtype="float32", lora=lora)
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


def _batch(config: MemoryConfig, mask_token_id: int) -> dict:
    collator = MemoryCollator(
        PaddingCollator(2), config=config, scheduler=LinearAlphaScheduler(), mask_token_id=mask_token_id
    )
    return collator(_rows(3))


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
