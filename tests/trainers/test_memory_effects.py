"""What must reach the memory and the loss through the trainer: masks, seeds, schedules, router losses, precision."""

import dataclasses

import pytest
import torch
import transformers

from dllm.core.schedulers import CosineAlphaScheduler
from dllm.core.trainers import MDLMConfig, MDLMTrainer
from dllm.data.collators import NoisingCollator, PaddingCollator
from memdlm import MemDLMConfig, MemDLMTrainer
from memdlm.memory.collator import inner_plan

DEFAULTS = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 5,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 1,
}
MEMORY = {
    "mem_enabled": True,
    "mem_inner_rank": 4,
    "mem_inner_alpha": 8.0,
    "mem_inner_layer_fraction": 0.4,
    "mem_inner_lr": 1.0,
}


@pytest.fixture
def strong(load):
    """A function that loads the checkpoint with eight times larger matrices: near-uniform predictions hide effects."""

    def make():
        model = load()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8)
        return model

    return make


@pytest.fixture(scope="session")
def uneven_rows():
    """Seven rows of unlike lengths, the first four tokens prompt."""
    generator = torch.Generator().manual_seed(6)
    made = []
    for index, length in enumerate((20, 9, 14, 17, 11, 20, 8)):
        ids = torch.randint(20, 200, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:], "example_id": index})
    return made


def _trainer(kind, model, tokenizer, rows, folder, settings: dict, **options):
    config = MemDLMConfig if kind is MemDLMTrainer else MDLMConfig
    args = config(output_dir=str(folder), **{**DEFAULTS, **settings})
    return kind(model=model, args=args, processing_class=tokenizer, train_dataset=rows, eval_dataset=rows, **options)


def _pad_with_attention_mask(rows) -> dict:
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(values: list, filler: int) -> list:
        return [*values, *[filler] * (longest - len(values))]

    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 2) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], -100) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
    }


def _without_mask(batch: dict) -> dict:
    plan = {**batch["memory_plan"], "attention_mask": None} if "memory_plan" in batch else None
    return {**{key: value for key, value in batch.items() if key != "attention_mask"}, "memory_plan": plan}


def _record(memory) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two lists that fill with phi_0 and phi_K of every write from here on."""
    initial, final = [], []
    original = memory.fast.set
    fresh = [True]

    def remember(flat) -> None:
        if flat is None:
            fresh[0] = True
        elif flat.requires_grad:
            if fresh[0]:
                initial.append(flat.detach().clone())
            fresh[0] = False
        else:
            final.append(flat.clone())
            fresh[0] = True
        original(flat)

    memory.fast.set = remember
    return initial, final


def test_the_attention_mask_reaches_the_outer_forward(strong, tokenizer, uneven_rows, tmp_path) -> None:
    trainer = _trainer(
        MDLMTrainer, strong(), tokenizer, uneven_rows, tmp_path, {}, data_collator=_pad_with_attention_mask
    )
    model = trainer.lm.eval()
    batch = trainer.data_collator(uneven_rows)
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()
    with torch.no_grad():
        loss = trainer.compute_loss(model, batch)
        logits = model(
            input_ids=batch["noised_ids"],
            attention_mask=batch["attention_mask"],
            logit_positions=batch["loss_positions"],
        ).logits
        unmasked = trainer.compute_loss(model, _without_mask(batch))
    assert torch.equal(loss, trainer.weighted_loss(logits, batch, trainer.args.loss_norm_type))
    # Padding that can be seen moves the loss far beyond float32 rounding (1e-6).
    assert abs(float(loss - unmasked)) > 1e-3 * float(loss)


def test_the_attention_mask_reaches_the_memory(strong, tokenizer, uneven_rows, tmp_path) -> None:
    trainer = _trainer(
        MemDLMTrainer, strong(), tokenizer, uneven_rows, tmp_path, MEMORY, data_collator=_pad_with_attention_mask
    )
    model, memory = trainer.lm.eval(), trainer.memory
    initial, final = _record(memory)
    batch = trainer.data_collator(uneven_rows)
    mask = batch["attention_mask"]
    with torch.no_grad(), memory.attached():
        loss = trainer.compute_loss(model, batch)
        trainer.compute_loss(model, _without_mask(batch))
        memory.write(inner_plan(batch), initial[0])
        logits = model(
            input_ids=batch["noised_ids"], attention_mask=mask, logit_positions=batch["loss_positions"]
        ).logits
        memory.write(dataclasses.replace(inner_plan(batch), attention_mask=None), initial[0])
    through_trainer, through_trainer_unmasked, written, written_unmasked = final
    assert torch.equal(initial[0], initial[1])
    assert torch.equal(through_trainer, written)
    assert torch.equal(through_trainer_unmasked, written_unmasked)
    assert torch.equal(loss, trainer.weighted_loss(logits, batch, trainer.args.loss_norm_type))
    # Seen padding moves the fast weights by more than a hundredth of what writing moves them.
    assert float((written - written_unmasked).norm()) > 1e-2 * float((written - initial[0]).norm())


def test_each_step_draws_its_own_initial_values_and_a_repeated_run_the_same(strong, tokenizer, rows, tmp_path) -> None:
    runs = []
    for name in ("first", "again"):
        trainer = _trainer(MemDLMTrainer, strong(), tokenizer, rows, tmp_path / name, MEMORY)
        initial, final = _record(trainer.memory)
        trainer.train()
        assert len(initial) == len(final) == 3
        runs.append((initial, final))
    for before, after in ((runs[0][0], runs[1][0]), (runs[0][1], runs[1][1])):
        assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    views = trainer.memory.fast.views
    for one, two in ((0, 1), (1, 2), (0, 2)):
        half = len(trainer.memory.fast.targets)
        first, second = views(runs[0][0][one][0])[:half], views(runs[0][0][two][0])[:half]  # the matrices A
        assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_memory_seed_draws_other_initial_values(strong, tokenizer, rows, tmp_path) -> None:
    drawn = []
    for seed in (42, 43):
        settings = {**MEMORY, "mem_seed": seed, "max_steps": 1}
        trainer = _trainer(MemDLMTrainer, strong(), tokenizer, rows, tmp_path / str(seed), settings)
        initial, _ = _record(trainer.memory)
        trainer.train()
        drawn.append(initial[0])
    assert not torch.equal(*drawn)


def test_evaluation_writes_from_the_same_initial_values_each_time(strong, tokenizer, rows, tmp_path) -> None:
    trainer = _trainer(MemDLMTrainer, strong(), tokenizer, rows, tmp_path, MEMORY)
    initial, final = _record(trainer.memory)
    trainer.evaluate()
    trainer.state.global_step = 7
    trainer.evaluate()
    assert len(final) == 6 and all(torch.equal(initial[0], one) for one in initial)  # 12 rows, three batches
    assert all(torch.equal(one, two) for one, two in zip(final[:3], final[3:], strict=True))


def test_the_inner_loss_is_weighted_and_normalised_like_the_outer_one(strong, tokenizer, rows, tmp_path) -> None:
    settings = {**MEMORY, "loss_weight_type": "uniform", "loss_norm_type": "batch", "mem_inner_grad_clip": 0.0}
    scheduler = CosineAlphaScheduler()
    trainer = _trainer(MemDLMTrainer, strong(), tokenizer, rows, tmp_path, settings, scheduler=scheduler)
    assert trainer.memory.scheduler is scheduler
    batch = trainer.data_collator(rows[:4])
    trainer.lm.eval()
    with torch.no_grad(), trainer.memory.attached():
        trainer.compute_loss(trainer.lm, batch)
    plan = inner_plan(batch)
    step = plan.steps[0]
    with torch.no_grad():  # B is 0 at first, so the first inner loss is that of the base model
        logits = trainer.lm(input_ids=plan.states[step.student], logit_positions=step.loss_positions).logits
    assert torch.equal(step.targets, batch["input_ids"].flatten()[step.loss_positions])
    expected = torch.nn.functional.cross_entropy(logits, step.targets, reduction="sum") / 4
    # The same float32 terms in another order.
    assert float(trainer.memory.report.losses[0]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", [MDLMTrainer, MemDLMTrainer])
@pytest.mark.parametrize("stream", ["train", "eval"])
def test_time_epsilon_and_data_seed_reach_the_collator(load, tokenizer, rows, tmp_path, kind, stream: str) -> None:
    settings = {"time_epsilon": 0.7, "data_seed": 9, **(MEMORY if kind is MemDLMTrainer else {})}
    trainer = _trainer(kind, load(), tokenizer, rows, tmp_path, settings)
    batch = (trainer.data_collator if stream == "train" else trainer.eval_collator)(rows)

    def noised(**changes) -> dict:
        options = {"time_epsilon": 0.7, "seed": 9, "stream": stream, **changes}
        pad = PaddingCollator(tokenizer.pad_token_id)
        return NoisingCollator(
            pad, scheduler=trainer.scheduler_alpha, mask_token_id=tokenizer.mask_token_id, **options
        )(rows)

    assert float(batch["t"].min()) >= 0.7
    expected = noised()
    for name in ("t", "noised_ids", "loss_positions"):
        assert torch.equal(batch[name], expected[name]), name
    for changes in ({"time_epsilon": 1e-3}, {"seed": 1}, {"stream": "other"}):
        assert not torch.equal(batch["t"], noised(**changes)["t"]), changes


def test_without_a_data_seed_the_seed_draws_the_masks(load, tokenizer, rows, tmp_path) -> None:
    by_seed = _trainer(MDLMTrainer, load(), tokenizer, rows, tmp_path, {"seed": 9})
    by_data_seed = _trainer(MDLMTrainer, load(), tokenizer, rows, tmp_path, {"data_seed": 9})
    assert torch.equal(by_seed.data_collator(rows)["noised_ids"], by_data_seed.data_collator(rows)["noised_ids"])


@pytest.mark.parametrize("kind", [MDLMTrainer, MemDLMTrainer])
def test_router_losses_enter_the_loss_with_their_weight(strong, tokenizer, rows, tmp_path, kind) -> None:
    logged, evaluated = {}, {}
    for weight in (0.0, 0.5):
        model = strong()
        model.config.output_router_logits = True
        model.config.router_aux_loss_coef = weight
        settings = {"max_steps": 1, "per_device_train_batch_size": 12, "per_device_eval_batch_size": 12}
        settings.update({**MEMORY, "mem_inner_lr": 0.0} if kind is MemDLMTrainer else {})
        trainer = _trainer(kind, model, tokenizer, rows, tmp_path / str(weight), settings)
        evaluated[weight] = trainer.evaluate()["eval_loss"]
        batches = trainer.data_collator(rows), trainer.eval_collator(rows)
        with torch.no_grad():
            train_aux, eval_aux = (float(model(input_ids=batch["noised_ids"]).aux_loss) for batch in batches)
        trainer.train()
        logged[weight] = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert train_aux > 0.1 and eval_aux > 0.1
    # Differences of float32 losses of about 10, which are exact to about 1e-6 each.
    assert logged[0.5] - logged[0.0] == pytest.approx(0.5 * train_aux, abs=2e-5)
    assert evaluated[0.5] - evaluated[0.0] == pytest.approx(0.5 * eval_aux, abs=2e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss_norm_type": "batch"}, {"loss_norm_type": "sequence"}, {"loss_weight_type": "uniform"}],
    ids=["default", "batch", "sequence", "uniform"],
)
def test_eval_nll_is_the_token_mean_under_every_loss_setting(
    strong, tokenizer, uneven_rows, tmp_path, settings: dict
) -> None:
    model = strong()
    trainer = _trainer(
        MDLMTrainer, model, tokenizer, uneven_rows, tmp_path, settings, data_collator=PaddingCollator(2, False)
    )
    metrics = trainer.evaluate()
    total, count = 0.0, 0
    for batch in (trainer.eval_collator(uneven_rows[:5]), trainer.eval_collator(uneven_rows[5:])):
        with torch.no_grad():
            log_p = model.eval()(input_ids=batch["noised_ids"]).logits.double().log_softmax(dim=-1)
        nll = -log_p.gather(2, batch["input_ids"][..., None])[..., 0] / (batch["t"].double() + 1e-6)[:, None]
        total += float(nll[batch["is_masked"]].sum())
        count += int(batch["num_maskable"].sum())
    # float32 logits and sums.
    assert metrics["eval_nll"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["eval_ppl"] == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-3)


class _Gradients(transformers.TrainerCallback):
    """Which parameters got a finite gradient that is not all zero, over all steps."""

    def __init__(self) -> None:
        self.reached: set[str] = set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
            if parameter.grad.any():
                self.reached.add(name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_autocast_trains_every_weight(strong, tokenizer, rows, tmp_path, checkpointing: bool) -> None:
    settings = {
        **MEMORY,
        "bf16": True,
        "max_steps": 2,
        "per_device_train_batch_size": 12,
        "gradient_checkpointing": checkpointing,
    }
    trainer = _trainer(MemDLMTrainer, strong(), tokenizer, rows, tmp_path, settings)
    gradients = _Gradients()
    trainer.add_callback(gradients)
    before = {name: value.detach().clone() for name, value in trainer.lm.named_parameters()}
    initial, final = _record(trainer.memory)
    trainer.train()
    assert gradients.reached == set(before)
    for name, value in trainer.lm.named_parameters():
        assert value.dtype == torch.float32 and bool(value.isfinite().all()), name
        assert not torch.equal(value, before[name]), name
    assert len(final) == 2 and all(phi.dtype == torch.float32 and bool(phi.isfinite().all()) for phi in final)
    assert not torch.equal(initial[0], final[0])
