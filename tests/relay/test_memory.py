"""Relay together with Parametric Memory in training."""

import pytest
import torch
from transformers import AutoTokenizer

from dllm.models.auto import load_model as load_plain
from dllm.models.backbone import unwrap
from dllm.models.tiny import make_tiny_checkpoint
from memdlm import MemDLMConfig, MemDLMTrainer
from memdlm.memory.plan import InnerPlan
from memdlm.relay import (
    MemRelayBD3LMConfig,
    MemRelayBD3LMTrainer,
    MemRelayConfig,
    MemRelayTrainer,
    RelayState,
    RelayTrainer,
    RelayTrainerConfig,
    unroll,
)

FAMILIES = {"llada": (MemRelayConfig, MemRelayTrainer), "fast_dllm_v2": (MemRelayBD3LMConfig, MemRelayBD3LMTrainer)}
MEMORY = {"mem_enabled": True, "mem_inner_layer_fraction": 0.5, "mem_inner_lr": 5.0, "mem_inner_rank": 2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    sizes = {
        "llada": {"d_model": 32, "n_layers": 2, "mlp_hidden_size": 48, "vocab_size": 300},
        "fast_dllm_v2": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300, "bd_size": 8},
    }
    folder = tmp_path_factory.mktemp("both")
    return {family: str(make_tiny_checkpoint(folder / family, family, **own)) for family, own in sizes.items()}


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(20, 200, (16 + index % 2,), generator=generator).tolist() for index in range(6)]
    return [{"input_ids": row, "labels": [-100] * 6 + row[6:]} for row in ids]


@pytest.fixture
def build(checkpoints, rows, tmp_path):
    def make(family="llada", classes=None, **flags):
        config_class, trainer_class = classes or FAMILIES[family]
        settings = {
            "max_steps": 3,
            "per_device_train_batch_size": 3,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "use_cpu": True,
            "disable_tqdm": True,
            **flags,
        }
        return trainer_class(
            model=load_plain(checkpoints[family]),
            args=config_class(output_dir=str(tmp_path), **settings),
            train_dataset=rows,
            eval_dataset=rows[:3],
            processing_class=AutoTokenizer.from_pretrained(checkpoints[family]),
        )

    return make


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_without_memory_it_is_the_relay_trainer_bitwise(build):
    both = build(relay_gate="default")
    alone = build(classes=(RelayTrainerConfig, RelayTrainer), relay_gate="default")
    both.train()
    alone.train()
    assert logged(both, "loss") == logged(alone, "loss") and logged(both, "grad_norm") == logged(alone, "grad_norm")


def test_without_relay_it_is_the_memory_trainer(build):
    """The losses differ in what they are divided by: masked tokens here, maskable ones there."""
    still = {"learning_rate": 0.0, **MEMORY}
    both = build(relay_arm="mask_uniform", **still)
    alone = build(classes=(MemDLMConfig, MemDLMTrainer), loss_weight_type="uniform", **still)
    both.train()
    alone.train()
    ratios = torch.tensor(logged(both, "relay_mask_ratio_1"))
    torch.testing.assert_close(
        torch.tensor(logged(both, "loss")) * ratios, torch.tensor(logged(alone, "loss")), rtol=1e-4, atol=1e-4
    )
    assert logged(both, "mem_change") == logged(alone, "mem_change")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_that_is_not_written_changes_nothing(build, family):
    unwritten = build(family, relay_gate="default", **{**MEMORY, "mem_inner_lr": 0.0})
    alone = build(family, relay_gate="default")
    unwritten.train()
    alone.train()
    assert logged(unwritten, "loss") == logged(alone, "loss")


@pytest.mark.parametrize("target", ["response", "prompt", "disjoint"])
@pytest.mark.parametrize("scope", ["batch", "row"])
def test_a_step_is_one_write_from_the_first_state_and_k_forwards(build, target, scope):
    """Against a memory written in a pass of its own, then the K forwards with it in place."""
    trainer = build(relay_gate="default", mem_inner_target=target, mem_scope=scope, **MEMORY)
    trainer.train()
    trainer.model.train()
    model, memory, channel = unwrap(trainer.model), trainer.memory, trainer.channel
    inputs = trainer.next_rows()
    assert bool(trainer.buffer.rows.is_set.any())  # some rows have a state already
    rows = trainer.buffer.rows
    state = RelayState(rows.hidden.clone(), rows.is_set.clone())
    masked = inputs["is_masked"].clone()

    with memory.attached():
        model.zero_grad()
        loss = trainer.compute_loss(model, inputs)
        written = memory.fast.value.clone()
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def network(step, noised_ids, is_masked, positions):
        return model(noised_ids, logit_positions=positions)

    with memory.attached():
        model.zero_grad()
        plan = InnerPlan.from_batch(inputs["memory_plan"])
        with channel.passing(state):
            memory.write(plan, memory.initial(plan, "train", trainer.state.global_step))
        torch.testing.assert_close(memory.fast.value, written, rtol=1e-5, atol=1e-7)
        made = unroll(
            network, inputs["input_ids"], inputs["maskable"], masked, trainer.relay_config, trainer.rule, channel, state
        )
        made.loss.backward()
    torch.testing.assert_close(made.loss, loss, rtol=1e-5, atol=1e-6)
    assert gradients
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6, msg=name)
    assert float(written.abs().max()) > 0


def test_the_memory_stays_the_same_for_all_forwards_and_backward(build, monkeypatch):
    trainer = build("fast_dllm_v2", relay_num_steps=3, **MEMORY)
    values = []
    forward = type(trainer.lm).forward

    def spy(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            value = trainer.memory.fast.value
            values.append(None if value is None else value.clone())
        return output

    monkeypatch.setattr(type(trainer.lm), "forward", spy)
    trainer.train()
    assert len(values) == 9 and all(value is not None for value in values)
    for step in range(3):
        first, second, third = values[3 * step : 3 * step + 3]
        assert torch.equal(first, second) and torch.equal(second, third)
    assert not torch.equal(values[0], values[3])


def test_the_plan_is_that_of_the_memory_collator(build, checkpoints):
    """Fresh rows of unequal lengths, padding left out of the inner loop: the same states as in a collated batch."""
    trainer = build(relay_gate="default", mem_pad_unmask_mode="inner", **MEMORY)
    trainer.get_train_dataloader()
    batch = trainer.next_rows()
    plan = InnerPlan.from_batch(batch["memory_plan"])
    lengths = trainer.buffer.rows.num_tokens
    assert len(set(lengths.tolist())) > 1
    behind = torch.arange(plan.length) >= lengths[:, None]
    for state in plan.states:
        assert bool((state[behind] == batch["input_ids"][behind]).all()), "padding is never masked"
    asked = torch.zeros(behind.numel(), dtype=torch.bool)
    for step in plan.steps:
        asked[step.loss_positions] = True
    assert bool(asked.any()) and not bool((asked & behind.flatten()).any())


def test_each_step_draws_its_inner_states_anew(build):
    trainer = build(**MEMORY)
    trainer.get_train_dataloader()
    trainer.next_rows()
    trainer.buffer.rows.is_masked[:, 8:] = False  # so that there is something to draw from
    plans = [InnerPlan.from_batch(trainer.next_rows()["memory_plan"]) for _ in range(2)]
    assert not torch.equal(plans[0].states[0], plans[1].states[0])
