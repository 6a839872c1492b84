"""BD3LMTrainer: objective, accumulation, 4-bit with LoRA, with and without memory; and MDLM on LLaDA2."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from dllm.core.attention import block_causal_mask
from dllm.core.trainers import BD3LMConfig, BD3LMTrainer, MDLMConfig, MDLMTrainer
from dllm.data.collators import PaddingCollator
from memdlm import MemBD3LMConfig, MemBD3LMTrainer, MemDLMConfig, MemDLMTrainer

DEFAULTS = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 1,
}
MEMORY = {"mem_enabled": True, "mem_inner_rank": 4, "mem_inner_alpha": 8.0, "mem_inner_layer_fraction": 0.4}
TRAINERS = {
    BD3LMTrainer: BD3LMConfig,
    MDLMTrainer: MDLMConfig,
    MemBD3LMTrainer: MemBD3LMConfig,
    MemDLMTrainer: MemDLMConfig,
}


@pytest.fixture
def make_trainer(load_llada2, llada2_tokenizer, rows, tmp_path):
    """A function (class, **settings) -> trainer of a fresh LLaDA2 on the twelve rows of twenty tokens."""

    def make(kind, model=None, data=None, collator=None, **settings):
        args = TRAINERS[kind](output_dir=str(tmp_path), **{**DEFAULTS, **settings})
        return kind(
            model=load_llada2() if model is None else model,
            args=args,
            processing_class=llada2_tokenizer,
            train_dataset=data or rows,
            eval_dataset=data or rows,
            data_collator=collator,
        )

    return make


def _losses(trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def _assert_same_run(first, second) -> None:
    assert _losses(first) == _losses(second) and _losses(first)
    for name, value in first.lm.state_dict().items():
        assert torch.equal(value, second.lm.state_dict()[name]), name


@torch.no_grad()
def _naive_loss(model, batch: dict, size: int) -> float:
    """Each block from a forward of its own on [clean blocks before it, noised block], weighed by the t of the block."""
    times = dict(zip(batch["loss_positions"].tolist(), batch["loss_t"].tolist(), strict=True))
    length, total = batch["input_ids"].shape[1], 0.0
    for b, (clean, noised) in enumerate(zip(batch["input_ids"], batch["noised_ids"], strict=True)):
        for start in range(0, length, size):
            ids = torch.cat([clean[:start], noised[start : start + size]])[None]
            logits = model(ids, attention_mask=block_causal_mask(ids.shape[1], size)).logits[0].double()
            for p in range(start, ids.shape[1]):
                if batch["is_masked"][b, p]:
                    log_p = torch.log_softmax(logits[p], dim=-1)
                    total -= float(log_p[clean[p]]) / (times[b * length + p] + 1e-6)
    return total / int(batch["num_maskable"].sum())


@pytest.mark.parametrize("time_per", ["block", "row"])
def test_the_logged_loss_is_the_formula(make_trainer, load_llada2, time_per: str) -> None:
    trainer = make_trainer(BD3LMTrainer, block_size=8, time_per=time_per, max_steps=1, per_device_train_batch_size=12)
    batch = trainer.data_collator(trainer.train_dataset)
    assert batch["input_ids"].shape == (12, 24)  # filled up to whole blocks
    trainer.train()
    # One batch holds all rows, so the order does not matter; logits are float32, and the log rounds to float32.
    assert _losses(trainer) == pytest.approx([_naive_loss(load_llada2().eval(), batch, 8)], rel=1e-5)


def test_a_shorter_last_block_is_handled(make_trainer, load_llada2) -> None:
    collator = PaddingCollator(1)
    trainer = make_trainer(BD3LMTrainer, block_size=8, max_steps=1, per_device_train_batch_size=12, collator=collator)
    batch = trainer.data_collator(trainer.train_dataset)
    assert batch["input_ids"].shape == (12, 20)
    trainer.train()
    assert _losses(trainer) == pytest.approx([_naive_loss(load_llada2().eval(), batch, 8)], rel=1e-5)


def test_block_size_is_the_familys_own(make_trainer) -> None:
    assert make_trainer(BD3LMTrainer).block_size == 32
    assert make_trainer(BD3LMTrainer, block_size=8).block_size == 8


@pytest.mark.parametrize("time_per", ["block", "row"])
def test_one_block_is_mdlm_bitwise(make_trainer, time_per: str) -> None:
    plain, block = make_trainer(MDLMTrainer), make_trainer(BD3LMTrainer, block_size=20, time_per=time_per)
    plain.train()
    block.train()
    _assert_same_run(plain, block)
    assert plain.evaluate()["eval_loss"] == block.evaluate()["eval_loss"]


def test_two_accumulated_batches_of_two_are_one_of_four(make_trainer, load_llada2) -> None:
    results = []
    for batch_size, accumulated in ((4, 1), (2, 2)):
        trainer = make_trainer(
            BD3LMTrainer,
            model=load_llada2().double(),
            block_size=4,
            optim="sgd",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
        )
        trainer.train()
        results.append((_losses(trainer), trainer.lm.state_dict()))
    # Every row has as many maskable positions, so the mean of two means is the mean; the loss weights are float32.
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], rtol=1e-6, atol=1e-9)


def test_a_rows_loss_does_not_depend_on_the_rows_beside_it(make_trainer, rows) -> None:
    uneven = [{**row, "input_ids": row["input_ids"][: 20 - i], "labels": row["labels"][: 20 - i]} for i, row in
              enumerate(rows)]  # fmt: skip
    single = make_trainer(BD3LMTrainer, data=uneven, block_size=4, per_device_eval_batch_size=1).evaluate()
    together = make_trainer(BD3LMTrainer, data=uneven, block_size=4, per_device_eval_batch_size=12).evaluate()
    assert single["eval_nll"] == pytest.approx(together["eval_nll"], rel=1e-5)  # float32


@pytest.mark.parametrize("kind", [BD3LMTrainer, MDLMTrainer])
def test_loss_falls_when_rows_repeat(make_trainer, rows, kind) -> None:
    settings = {} if kind is MDLMTrainer else {"block_size": 4}
    trainer = make_trainer(kind, data=rows[:4], max_steps=80, **settings)
    before = trainer.evaluate()["eval_nll"]
    trainer.train()
    assert trainer.evaluate()["eval_nll"] < 0.6 * before


@torch.no_grad()
def test_mdlm_on_llada2_is_the_formula_under_full_attention(make_trainer) -> None:
    trainer = make_trainer(MDLMTrainer, per_device_eval_batch_size=12)
    batch = trainer.eval_collator(trainer.eval_dataset)
    log_p = torch.log_softmax(trainer.lm.eval()(batch["noised_ids"]).logits.double(), dim=-1)
    nll = -log_p.gather(2, batch["input_ids"][..., None])[..., 0]
    expected = float((nll * batch["is_masked"] / (batch["t"][:, None] + 1e-6)).sum() / batch["num_maskable"].sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [BD3LMTrainer, MemBD3LMTrainer, MemDLMTrainer])
def test_four_bit_with_lora(make_trainer, llada2_checkpoint, kind, checkpointing: bool) -> None:
    pytest.importorskip("bitsandbytes")
    from dllm.models.auto import load_model
    from dllm.models.lora import LoraSettings

    lora = LoraSettings(r=4, alpha=8.0, dropout=0.0)
    model = load_model(str(llada2_checkpoint), load_in_4bit=True, dtype="float32", lora=lora)
    settings = MEMORY if kind in (MemBD3LMTrainer, MemDLMTrainer) else {}
    if kind is not MemDLMTrainer:
        settings = {**settings, "block_size": 8}
    trainer = make_trainer(kind, model=model, max_steps=20, gradient_checkpointing=checkpointing, **settings)
    before = trainer.evaluate()["eval_nll"]
    trainer.train()
    assert trainer.evaluate()["eval_nll"] < before
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_memory_off_or_learning_rate_zero_is_block_diffusion_bitwise(make_trainer) -> None:
    plain = make_trainer(BD3LMTrainer, block_size=8)
    off = make_trainer(MemBD3LMTrainer, block_size=8)
    still = make_trainer(MemBD3LMTrainer, block_size=8, mem_inner_lr=0.0, **MEMORY)
    for trainer in (plain, off, still):
        trainer.train()
    _assert_same_run(plain, off)
    _assert_same_run(plain, still)
    assert plain.evaluate()["eval_loss"] == still.evaluate()["eval_loss"]


@pytest.mark.parametrize("scope", ["batch", "row"])
@pytest.mark.parametrize("kind", [MemBD3LMTrainer, MemDLMTrainer])
def test_memory_trains_and_logs_both_losses(make_trainer, kind, scope: str) -> None:
    settings = {"block_size": 8} if kind is MemBD3LMTrainer else {}
    trainer = make_trainer(kind, mem_scope=scope, **settings, **MEMORY)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in entries:
        assert entry["loss_with_memory"] == pytest.approx(entry["loss"], rel=1e-5)  # one batch a step: the same number
        assert entry["memory_gap"] > 0 and entry["mem_change"] > 0
    metrics = trainer.evaluate()
    assert metrics["eval_memory_loss"] < metrics["eval_loss"]


def test_lora_with_memory_saves_the_adapter_alone(make_trainer, load_llada2, tmp_path) -> None:
    model = get_peft_model(load_llada2(), LoraConfig(r=2, target_modules="all-linear"))
    trainer = make_trainer(MemBD3LMTrainer, model=model, block_size=8, gradient_checkpointing=True, **MEMORY)
    trainer.train()
    assert all(math.isfinite(loss) for loss in _losses(trainer)) and len(_losses(trainer)) == 3
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, torch.nn.Linear))
    trainer.save_model(str(tmp_path / "final"))
    with safe_open(tmp_path / "final" / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in key for key in file.keys())  # noqa: SIM118  (safe_open is no mapping)


def test_bad_input_is_refused_in_one_line(make_trainer) -> None:
    cases = [
        (BD3LMTrainer, {"block_size": 0}, "block_size must be at least 1 and a whole number, got 0"),
        (BD3LMTrainer, {"time_per": "token"}, "choose block or row"),
        (MemBD3LMTrainer, {**MEMORY, "mem_inner_target": "prompt"}, "clean half carries the answers"),
        (MemBD3LMTrainer, {**MEMORY, "mem_inner_target": "disjoint"}, "clean half carries the answers"),
    ]
    for kind, settings, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            make_trainer(kind, **settings)
        assert "\n" not in str(error.value)
