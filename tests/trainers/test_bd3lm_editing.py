"""The editing objective: wrong tokens among the visible ones, restored under full attention and in blocks."""

import pytest
import torch

from dllm.core.editing import CORRUPTED, KEPT, MASKED
from dllm.core.trainers import BD3LMConfig, BD3LMTrainer, MDLMConfig, MDLMTrainer
from memdlm import MemBD3LMConfig, MemBD3LMTrainer, MemDLMConfig, MemDLMTrainer
from memdlm.memory.collator import inner_plan

DEFAULTS = {
    "use_cpu": True,
    "per_device_train_batch_size": 12,
    "per_device_eval_batch_size": 12,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 1,
    "edit_ratio": 0.3,
}
MEMORY = {"mem_enabled": True, "mem_inner_rank": 4, "mem_inner_alpha": 8.0, "mem_inner_layer_fraction": 0.4}
BLOCKS = {"block_size": 8}
TRAINERS = {
    "mdlm": (MDLMTrainer, MDLMConfig, {}),
    "bd3lm": (BD3LMTrainer, BD3LMConfig, BLOCKS),
    "mdlm with memory": (MemDLMTrainer, MemDLMConfig, MEMORY),
    "bd3lm with memory": (MemBD3LMTrainer, MemBD3LMConfig, {**BLOCKS, **MEMORY}),
}


@pytest.fixture
def make_trainer(load_llada2, llada2_tokenizer, rows, tmp_path):
    """A function (name, **settings) -> trainer of a fresh LLaDA2 on the twelve rows of twenty tokens."""

    def make(name, data=rows, **settings):
        kind, config, own = TRAINERS[name]
        args = config(output_dir=str(tmp_path), **{**DEFAULTS, **own, **settings})
        return kind(
            model=load_llada2(),
            args=args,
            processing_class=llada2_tokenizer,
            train_dataset=data,
            eval_dataset=data,
        )

    return make


def _entries(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _batch(trainer, collator=None) -> dict:
    batch = (collator or trainer.data_collator)(trainer.train_dataset)
    return {**batch, **batch["edit"]}


@torch.no_grad()
def _nll_and_hits(trainer, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy, whether the likeliest token is the true one) at the loss positions, each in float64 logits."""
    model = trainer.lm.eval()
    logits = model(**trainer.network_inputs(batch)).logits[:, : batch["input_ids"].shape[1]]
    log_p = torch.log_softmax(logits.double(), dim=-1).flatten(0, 1)[batch["loss_positions"]]
    targets = batch["input_ids"].flatten()[batch["loss_positions"]]
    return -log_p.gather(1, targets[:, None])[:, 0], log_p.argmax(dim=1) == targets


@pytest.mark.parametrize("name", ["mdlm", "bd3lm"])
def test_the_logged_values_are_the_formula(make_trainer, name: str) -> None:
    trainer = make_trainer(name, max_steps=1, edit_loss_weight=2.5, edit_keep_ratio=0.2)
    batch = _batch(trainer)
    nll, hits = _nll_and_hits(trainer, batch)
    kind, t = batch["loss_kind"], batch["loss_t"].double()
    assert all((kind == each).sum() > 5 for each in (MASKED, CORRUPTED, KEPT))
    weights = torch.where(kind == MASKED, 1 / (t + 1e-6), 2.5)
    expected = {
        "loss": float((weights * nll).sum() / batch["num_maskable"].sum()),
        "masked_loss": float(nll[kind == MASKED].mean()),
        "edit_loss": float(nll[kind == CORRUPTED].mean()),
        "repair_rate": float(hits[kind == CORRUPTED].double().mean()),
        "false_edit_rate": float((~hits[kind == KEPT]).double().mean()),
    }
    trainer.train()
    (entry,) = _entries(trainer)
    assert {key: entry[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)  # float32, rounded


@pytest.mark.parametrize("name", TRAINERS)
def test_losses_without_wrong_tokens_stay_those_of_a_run_without_editing(make_trainer, name: str) -> None:
    plain, edited = make_trainer(name, edit_ratio=0.0).evaluate(), make_trainer(name).evaluate()
    assert set(edited) - set(plain) == {
        "eval_masked_loss", "eval_edit_loss", "eval_repair_rate", "eval_false_edit_rate"
    }  # fmt: skip
    for key in ("eval_loss", "eval_nll", "eval_ppl"):
        assert plain[key] == edited[key]
    if "memory" in name:
        # The plan no longer shares the outer state's prefix: a pass of its own, in float32.
        assert plain["eval_memory_loss"] == pytest.approx(edited["eval_memory_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["mdlm", "bd3lm"])
def test_evaluation_measures_the_same_positions_each_time(make_trainer, name: str) -> None:
    trainer = make_trainer(name)
    batch = _batch(trainer, trainer.eval_collator)
    nll, hits = _nll_and_hits(trainer, batch)
    metrics = trainer.evaluate()
    assert metrics["eval_edit_loss"] == pytest.approx(float(nll[batch["loss_kind"] == CORRUPTED].mean()), rel=1e-5)
    assert metrics["eval_masked_loss"] == pytest.approx(float(nll[batch["loss_kind"] == MASKED].mean()), rel=1e-5)
    kept = ~hits[batch["loss_kind"] == KEPT]
    assert metrics["eval_false_edit_rate"] == pytest.approx(float(kept.double().mean()))
    again = trainer.evaluate()
    assert all(again[key] == metrics[key] for key in ("eval_edit_loss", "eval_repair_rate", "eval_masked_loss"))
    split = make_trainer(name, per_device_eval_batch_size=5).evaluate()
    assert split["eval_edit_loss"] == pytest.approx(metrics["eval_edit_loss"], rel=1e-5)


def test_false_edits_are_measured_where_nothing_is_kept_in_training(make_trainer) -> None:
    none, some = make_trainer("mdlm", edit_keep_ratio=0.0), make_trainer("mdlm")
    assert not (_batch(none)["loss_kind"] == KEPT).any() and (_batch(some)["loss_kind"] == KEPT).any()
    assert none.evaluate()["eval_false_edit_rate"] == some.evaluate()["eval_false_edit_rate"]


@pytest.mark.parametrize("name", ["mdlm", "bd3lm"])
def test_the_models_own_wrong_tokens(make_trainer, llada2_tokenizer, name: str) -> None:
    trainer = make_trainer(name, edit_source="model")
    trainer.lm.train()
    batch = trainer.data_collator(trainer.train_dataset)
    edited = trainer.with_edits(trainer.model, batch)
    assert trainer.lm.training
    positions = edited["corrupted_positions"]
    masked = {**batch, **batch["edit"]}
    with torch.no_grad():
        logits = trainer.lm.eval()(**trainer.network_inputs(masked)).logits[:, : batch["input_ids"].shape[1]]
    special = set(llada2_tokenizer.all_special_ids)
    assert len(positions) > 10
    for position in positions.tolist():
        order = logits.flatten(0, 1)[position].argsort(descending=True).tolist()
        true = int(batch["input_ids"].flatten()[position])
        wanted = next(token for token in order if token != true and token not in special)
        assert int(edited["noised_ids"].flatten()[position]) == wanted
    same = torch.ones_like(batch["input_ids"], dtype=torch.bool).flatten()
    same[positions] = False
    assert torch.equal(edited["noised_ids"].flatten()[same], batch["noised_ids"].flatten()[same])


@pytest.mark.parametrize("name", ["bd3lm", "bd3lm with memory"])
def test_asking_the_model_under_autocast_cuts_off_no_gradient(make_trainer, name: str) -> None:
    """Copies of weights that autocast makes without gradients must not reach the training forward."""
    trainer = make_trainer(name, edit_source="model", bf16=True, max_steps=1)
    before = {key: value.clone() for key, value in trainer.lm.named_parameters()}
    trainer.train()
    still = [key for key, value in trainer.lm.named_parameters() if torch.equal(value, before[key])]
    assert still == []


@pytest.mark.parametrize("source", ["random", "model"])
@pytest.mark.parametrize("name", TRAINERS)
def test_both_losses_fall(make_trainer, name: str, source: str) -> None:
    trainer = make_trainer(name, edit_source=source, max_steps=20, logging_steps=10)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_edit_loss"] < before["eval_edit_loss"] and after["eval_masked_loss"] < before["eval_masked_loss"]
    assert all({"masked_loss", "edit_loss", "repair_rate"} <= set(entry) for entry in _entries(trainer))


@pytest.mark.parametrize("name", ["mdlm", "bd3lm"])
def test_training_repairs_rows_of_one_token(make_trainer, name: str) -> None:
    rows = [{"input_ids": [30 + i] * 20, "labels": [-100] * 8 + [30 + i] * 12, "example_id": i} for i in range(12)]
    settings = {"max_steps": 80, "per_device_train_batch_size": 6, "edit_loss_weight": 4.0}
    trainer = make_trainer(name, data=rows, **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_repair_rate"] < 0.2 and after["eval_repair_rate"] > 0.6
    assert before["eval_false_edit_rate"] > 0.5 and after["eval_false_edit_rate"] < 0.3


@pytest.mark.parametrize("name", ["mdlm", "bd3lm"])
def test_inner_learning_rate_zero_is_editing_without_memory_bitwise(make_trainer, name: str) -> None:
    plain, memory = make_trainer(name), make_trainer(f"{name} with memory", mem_inner_lr=0.0)
    plain.train()
    memory.train()
    assert [entry["loss"] for entry in _entries(plain)] == [entry["loss"] for entry in _entries(memory)]
    for key, value in plain.lm.state_dict().items():
        assert torch.equal(value, memory.lm.state_dict()[key]), key


@pytest.mark.parametrize("source", ["random", "model"])
@pytest.mark.parametrize("name", ["mdlm with memory", "bd3lm with memory"])
def test_no_inner_state_shows_a_wrong_token_or_passes_for_the_outer_one(make_trainer, name: str, source: str) -> None:
    trainer = make_trainer(name, edit_source=source)
    batch = trainer.data_collator(trainer.train_dataset)
    plan, length = inner_plan(batch), batch["input_ids"].shape[1]
    assert plan.anchor is None
    for state in plan.states:
        shown = state[:, :length] != trainer.data_collator.mask_token_id
        assert torch.equal(state[:, :length][shown], batch["input_ids"][shown])


def test_disjoint_memory_never_sees_what_editing_asks_for(make_trainer) -> None:
    trainer = make_trainer("mdlm with memory", mem_inner_target="disjoint")
    batch = trainer.data_collator(trainer.train_dataset)
    plan, positions = inner_plan(batch), batch["edit"]["loss_positions"]
    assert len(positions) > len(batch["edit"]["corrupted_positions"]) + len(batch["loss_positions"])  # some are kept
    for state in plan.states:
        assert (state.flatten()[positions] == trainer.data_collator.mask_token_id).all()
    for step in plan.steps:
        assert not torch.isin(step.loss_positions, positions).any() and len(step.loss_positions) > 0


def test_accumulation(make_trainer) -> None:
    results = []
    for batch_size, accumulated in ((12, 1), (3, 4)):
        trainer = make_trainer(
            "bd3lm", per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulated, optim="sgd"
        )
        trainer.train()
        results.append(trainer)
    first, second = (trainer.lm.state_dict() for trainer in results)
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-4, atol=1e-6)  # float32 sums in another order
    for one, other in zip(*map(_entries, results), strict=True):
        assert one["edit_loss"] == pytest.approx(other["edit_loss"], rel=1e-4)
        assert one["repair_rate"] == pytest.approx(other["repair_rate"], abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edit_ratio": 1.0}, r"edit_ratio must be in \[0, 1\)"),
        ({"edit_ratio": -0.1}, r"edit_ratio must be in \[0, 1\)"),
        ({"edit_keep_ratio": 1.5}, r"edit_keep_ratio must be in \[0, 1\)"),
        ({"edit_ratio": 0.6, "edit_keep_ratio": 0.6}, "together at most 1"),
        ({"edit_loss_weight": 0.0}, "edit_loss_weight must be above 0"),
        ({"edit_source": "teacher"}, "edit_source must be one of random, model"),
        ({"edit_ratio": 0.0, "edit_source": "model"}, "edit_source has no effect without --edit_ratio above 0"),
        ({"edit_ratio": 0.0, "edit_loss_weight": 2.0}, "edit_loss_weight has no effect"),
        ({"edit_ratio": 0.0, "edit_keep_ratio": 0.1}, "edit_keep_ratio has no effect"),
    ],
)
def test_bad_settings_are_refused_in_one_line(tmp_path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        MDLMConfig(output_dir=str(tmp_path), use_cpu=True, **{"edit_ratio": 0.1, **settings})
    assert "\n" not in str(error.value)
