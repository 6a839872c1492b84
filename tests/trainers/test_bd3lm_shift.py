"""Block diffusion where the logit at p - 1 predicts token p, and complementary masks."""

import pytest
import torch
from transformers import AutoTokenizer

from dllm.core.attention import block_causal_mask
from dllm.core.trainers import BD3LMConfig, BD3LMTrainer
from dllm.data.collators import BlockPaddingCollator, PaddingCollator
from dllm.models.auto import load_model
from memdlm import MemBD3LMConfig, MemBD3LMTrainer
from memdlm.relay import RelayBD3LMConfig, RelayBD3LMTrainer

DEFAULTS = {
    "use_cpu": True,
    "per_device_train_batch_size": 12,
    "per_device_eval_batch_size": 12,
    "max_steps": 1,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 1,
}
CONFIGS = {
    BD3LMTrainer: BD3LMConfig,
    MemBD3LMTrainer: MemBD3LMConfig,
    RelayBD3LMTrainer: RelayBD3LMConfig,
}
COMPLEMENTS = {"complementary_masks": True, "loss_weight_type": "uniform"}


@pytest.fixture
def load(fast_dllm_checkpoint):
    """A function that loads the tiny Fast-dLLM v2 anew, in float64."""
    return lambda: load_model(str(fast_dllm_checkpoint), dtype="float32").double()


@pytest.fixture
def make_trainer(load, fast_dllm_checkpoint, rows, tmp_path):
    """A function (**settings) -> trainer of a fresh Fast-dLLM v2 on rows of unequal length."""

    def make(kind=BD3LMTrainer, data=None, collator=None, **settings):
        uneven = [
            {**row, "input_ids": row["input_ids"][: 20 - i % 5], "labels": row["labels"][: 20 - i % 5]}
            for i, row in enumerate(rows)
        ]
        config = CONFIGS[kind]
        return kind(
            model=load(),
            args=config(output_dir=str(tmp_path), **{**DEFAULTS, **settings}),
            processing_class=AutoTokenizer.from_pretrained(fast_dllm_checkpoint),
            train_dataset=data or uneven,
            eval_dataset=data or uneven,
            data_collator=collator,
        )

    return make


def _losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def _nll(model, clean: torch.Tensor, is_masked: torch.Tensor, size: int) -> torch.Tensor:
    """-log p of the masked positions, 0 elsewhere, [B, L]: the logits of each block from a forward of its own on the
    clean blocks before it and the block itself, noised; position p from those at p - 1."""
    noised = torch.where(is_masked, model.config.mask_token_id, clean)
    logits = []
    for start in range(0, clean.shape[1], size):
        ids = torch.cat([clean[:, :start], noised[:, start : start + size]], dim=1)
        logits.append(model(ids, attention_mask=block_causal_mask(ids.shape[1], size)).logits[:, start:])
    log_p = torch.cat(logits, dim=1).log_softmax(dim=-1)
    nll = torch.zeros(clean.shape, dtype=torch.float64)
    for b, p in is_masked.nonzero().tolist():
        nll[b, p] = -log_p[b, p - 1, clean[b, p]]
    return nll


@pytest.mark.parametrize("time_per, size", [("block", 8), ("row", 8), ("row", 24)])  # 24: rows of a single block
def test_the_logged_loss_is_the_formula(make_trainer, load, time_per: str, size: int) -> None:
    trainer = make_trainer(block_size=size, time_per=time_per)
    batch = trainer.data_collator(trainer.train_dataset)
    assert batch["input_ids"].shape == (12, 24)
    nll = _nll(load().eval(), batch["input_ids"], batch["is_masked"], size).flatten()[batch["loss_positions"]]
    expected = (nll / (batch["loss_t"] + 1e-6)).sum() / batch["num_maskable"].sum()
    trainer.train()
    # The weights are float32.
    assert _losses(trainer) == pytest.approx([float(expected)], rel=1e-5)


def test_the_block_size_is_the_checkpoints_own(make_trainer) -> None:
    assert make_trainer().block_size == 8
    assert make_trainer(block_size=4).block_size == 4


def test_a_rows_first_position_is_never_asked_for(make_trainer, rows) -> None:
    whole = [{**row, "labels": row["input_ids"]} for row in rows]
    trainer = make_trainer(data=whole, **COMPLEMENTS)
    batch = trainer.data_collator(trainer.train_dataset)
    asked = torch.cat([batch["loss_positions"], batch["complement"]["loss_positions"]])
    assert sorted(asked.tolist()) == [p for p in range(12 * 24) if p % 24]
    assert torch.equal(batch["noised_ids"][:, 0], batch["input_ids"][:, 0])


def _naive_complementary_loss(trainer, model, batch: dict, norm: str) -> float:
    masks = batch["is_masked"], batch["maskable"] & ~batch["is_masked"]
    first, second = (_nll(model, batch["input_ids"], is_masked, trainer.block_size) for is_masked in masks)
    assert torch.equal((first > 0) ^ (second > 0), batch["maskable"])
    rows, counts = (first + second).sum(dim=1), batch["maskable"].sum(dim=1)
    means = {"token": rows.sum() / counts.sum(), "sequence": (rows / counts).mean(), "batch": rows.mean()}
    return float(means[norm])


@pytest.mark.parametrize("norm, size", [("token", 8), ("sequence", 8), ("batch", 8), ("token", 24)])
def test_complementary_masks_ask_for_every_token_once(make_trainer, load, norm: str, size: int) -> None:
    trainer = make_trainer(block_size=size, loss_norm_type=norm, **COMPLEMENTS)
    batch = trainer.data_collator(trainer.train_dataset)
    expected = _naive_complementary_loss(trainer, load().eval(), batch, norm)
    trainer.train()
    assert _losses(trainer) == pytest.approx([expected], rel=1e-5)


def test_evaluation_takes_complements_into_the_loss_and_not_into_the_likelihood(make_trainer, load) -> None:
    plain = make_trainer(loss_weight_type="uniform").evaluate()
    trainer = make_trainer(per_device_eval_batch_size=5, loss_norm_type="batch", **COMPLEMENTS)
    both = trainer.evaluate()
    assert both["eval_nll"] == pytest.approx(plain["eval_nll"], rel=1e-6)
    batch = trainer.eval_collator(trainer.eval_dataset)
    # With the last batch smaller than the others: the mean over rows all the same.
    expected = _naive_complementary_loss(trainer, load().eval(), batch, "batch")
    assert both["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_padding_mask_holds_for_the_complements_too(make_trainer, load, rows) -> None:
    class WithMask(PaddingCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            return {**batch, "attention_mask": (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()}

    uneven = [rows[0], {**rows[1], **{name: rows[1][name][:17] for name in ("input_ids", "labels")}}]
    trainer = make_trainer(data=uneven, collator=WithMask(3, train_on_padding=False), **COMPLEMENTS)
    batch = trainer.data_collator(trainer.train_dataset)
    assert not batch["attention_mask"].all()
    model, total = load().eval(), 0.0
    for b in range(2):
        seen = slice(0, int(batch["attention_mask"][b].sum()))
        clean, first = batch["input_ids"][b : b + 1, seen], batch["is_masked"][b : b + 1, seen]
        for is_masked in (first, batch["maskable"][b : b + 1, seen] & ~first):
            total += float(_nll(model, clean, is_masked, 8).sum())
    trainer.train()
    assert _losses(trainer) == pytest.approx([total / int(batch["num_maskable"].sum())], rel=1e-5)


def test_loss_falls_when_rows_repeat(make_trainer, rows) -> None:
    trainer = make_trainer(data=rows[:2], max_steps=12, learning_rate=3e-2, gradient_checkpointing=True, **COMPLEMENTS)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before


def test_two_accumulated_batches_of_six_are_one_of_twelve(make_trainer, rows) -> None:
    weights = []
    for batch_size, accumulated in ((12, 1), (6, 2)):
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
        trainer = make_trainer(data=rows, optim="sgd", max_steps=2, **sizes, **COMPLEMENTS)
        trainer.train()
        weights.append(trainer.lm.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-6, atol=1e-9)


def test_memory_trains_on_shifted_blocks(make_trainer) -> None:
    memory = {"mem_enabled": True, "mem_inner_rank": 4, "mem_inner_alpha": 8.0, "mem_inner_layer_fraction": 0.4}
    trainer = make_trainer(MemBD3LMTrainer, max_steps=3, **memory)
    trainer.train()
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        assert entry["loss_with_memory"] == pytest.approx(entry["loss"], rel=1e-5)
        assert entry["memory_gap"] > 0 and entry["mem_change"] > 0


@pytest.mark.parametrize("complements", [False, True])
def test_a_fill_that_is_not_trained_on_is_never_masked(make_trainer, complements: bool) -> None:
    settings = {"block_size": 4, **(COMPLEMENTS if complements else {})}
    trainer = make_trainer(train_on_fill=False, **settings)
    lengths = torch.tensor([len(row["input_ids"]) for row in trainer.train_dataset])
    (batch,) = trainer.get_train_dataloader()
    (filled,) = make_trainer(**settings).get_train_dataloader()
    own = torch.arange(batch["input_ids"].shape[1]) < lengths[batch["example_id"]][:, None]  # [B, L]
    assert not (batch["maskable"] & ~own).any() and (filled["maskable"] & ~own).any()
    for name in ("maskable", "is_masked"):
        assert torch.equal(filled[name] & own, batch[name])


def test_a_fill_that_is_not_trained_on_is_never_masked_in_rollouts(make_trainer) -> None:
    seen = []
    for train_on_fill in (True, False):
        trainer = make_trainer(RelayBD3LMTrainer, block_size=8, train_on_fill=train_on_fill)
        lengths = torch.tensor([len(row["input_ids"]) for row in trainer.train_dataset])
        trainer.get_train_dataloader()
        batch = trainer.next_rows()
        own = torch.arange(batch["input_ids"].shape[1]) < lengths[batch["example_id"]][:, None]  # [B, L]
        assert (batch["noised_ids"] == trainer.rule.mask_token_id)[own].any()
        seen.append(bool((batch["noised_ids"] == trainer.rule.mask_token_id)[~own].any()))
    assert seen == [True, False]


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (BD3LMTrainer, {"train_on_fill": False, "collator": BlockPaddingCollator(0, 4)}, "train_on_fill has no effect"),
        (BD3LMTrainer, {"complementary_masks": True}, "add --loss_weight_type uniform"),
        (BD3LMTrainer, {**COMPLEMENTS, "edit_ratio": 0.1}, "complementary_masks and edit_ratio exclude each other"),
        (
            MemBD3LMTrainer,
            {**COMPLEMENTS, "mem_enabled": True},
            "complementary_masks and mem_enabled exclude each other",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(make_trainer, kind, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_trainer(kind, **settings)
    assert "\n" not in str(error.value)
