"""RelayTrainer: the arms, the zero gate, resumption, adapters, checkpoints."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dllm.core.trainers import BD3LMConfig, BD3LMTrainer, MDLMConfig, MDLMTrainer
from dllm.models.auto import load_model as load_plain
from dllm.models.backbone import unwrap
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.args import ModelArguments
from dllm.utils.parsing import InputError
from memdlm.relay import (
    RelayBD3LMConfig,
    RelayBD3LMTrainer,
    RelayChannel,
    RelayConfig,
    RelayTrainer,
    RelayTrainerConfig,
    load_model,
)

FAMILIES = {"llada_moe": (RelayTrainerConfig, RelayTrainer), "fast_dllm_v2": (RelayBD3LMConfig, RelayBD3LMTrainer)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Family -> folder of a tiny checkpoint."""
    sizes = {
        "llada_moe": {"hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4, "vocab_size": 300},
        "fast_dllm_v2": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300, "bd_size": 4},
    }
    folder = tmp_path_factory.mktemp("relay")
    return {family: str(make_tiny_checkpoint(folder / family, family, **own)) for family, own in sizes.items()}


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(5)
    made = []
    for index in range(10):
        ids = torch.randint(20, 200, (18 + index % 3,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * 6 + ids[6:]})
    return made


@pytest.fixture
def build(checkpoints, rows, tmp_path):
    """A function (family, model, folder name, **flags) -> trainer."""

    def make(family="llada_moe", model=None, name="run", **flags):
        config_class, trainer_class = FAMILIES[family]
        settings = {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "disable_tqdm": True,
            "relay_threshold": 0.05,
            **({"relay_block_size": 4} if family == "llada_moe" else {}),
            **flags,
        }
        tokenizer = AutoTokenizer.from_pretrained(checkpoints[family])
        return trainer_class(
            model=model if model is not None else load_plain(checkpoints[family]),
            args=config_class(output_dir=str(tmp_path / name), **settings),
            train_dataset=rows,
            eval_dataset=rows[:4],
            processing_class=tokenizer,
        )

    return make


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_four_arms_train_and_log(build, family):
    for arm in ("mask_uniform", "rollout", "relay_sg", "relay"):
        flags = {"relay_threshold": None, "relay_block_size": None} if arm == "mask_uniform" else {}
        trainer = build(family, relay_arm=arm, relay_gate="default" if "relay" in arm else None, **flags)
        trainer.train()
        metrics = trainer.evaluate()
        num_steps = 1 if arm == "mask_uniform" else 2
        total = torch.tensor(logged(trainer, "loss"))
        parts = torch.tensor([logged(trainer, f"relay_loss_{s + 1}") for s in range(num_steps)]).sum(0)
        torch.testing.assert_close(total, parts, rtol=1e-3, atol=1e-3)
        shares = logged(trainer, "relay_gradient_share")
        assert (min(shares) > 0) == (arm == "relay") and (max(shares) > 0) == (arm == "relay")
        assert ("eval_relay_loss_2" in metrics) == (num_steps == 2)
        assert bool(logged(trainer, "relay_gate_norm")) == ("relay" in arm)
        if num_steps == 2:  # blocks of four tokens are done after four forwards, that is two steps
            first, second = logged(trainer, "relay_mask_ratio_1"), logged(trainer, "relay_mask_ratio_2")
            assert first[0] == 1 and all(b < a for a, b in zip(first, second, strict=True))
            assert logged(trainer, "relay_refills")[0] == 4 and sum(logged(trainer, "relay_refills")) > 4


def test_relay_and_its_stop_gradient_have_equal_first_losses(build):
    """A step at learning rate 0 is a step of the same states: losses are equal, gradients are not."""
    made = {}
    for arm in ("relay", "relay_sg"):
        trainer = build(relay_arm=arm, relay_gate="default", learning_rate=0.0)
        trainer.train()
        made[arm] = logged(trainer, "loss"), logged(trainer, "grad_norm")
    assert made["relay"][0] == made["relay_sg"][0]
    assert made["relay"][1] != made["relay_sg"][1]


def test_with_a_gate_that_stays_zero_relay_is_rollout_bitwise(build, checkpoints):
    model = load_model(ModelArguments(checkpoints["llada_moe"]))
    RelayChannel(model).norm.requires_grad_(False)
    relay, rollout = build(model=model), build(relay_arm="rollout")
    relay.train()
    rollout.train()
    assert logged(relay, "loss") == logged(rollout, "loss")
    for name, value in unwrap(rollout.model).state_dict().items():
        assert torch.equal(unwrap(relay.model).state_dict()[name], value), name


def test_a_rollout_of_one_forward_from_all_masks_is_masked_diffusion_at_time_one(build, checkpoints, rows, tmp_path):
    """Rows that are revealed whole in every step are all masks in every step, as masked diffusion at t = 1 is."""
    trainer = build(relay_arm="rollout", relay_num_steps=1, relay_threshold=1e-6, learning_rate=0.0, max_steps=2)
    trainer.train()
    plain = MDLMTrainer(
        model=load_plain(checkpoints["llada_moe"]),
        args=MDLMConfig(
            output_dir=str(tmp_path / "plain"),
            per_device_train_batch_size=4,
            max_steps=2,
            logging_steps=1,
            learning_rate=0.0,
            time_epsilon=1 - 1e-7,
            loss_weight_type="uniform",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=rows,
        processing_class=trainer.processing_class,
    )
    plain.train()
    torch.testing.assert_close(logged(trainer, "loss"), logged(plain, "loss"), rtol=1e-5, atol=0)


def test_mask_uniform_with_complements_is_plain_fine_tuning(build, checkpoints, rows, tmp_path):
    trainer = build("fast_dllm_v2", relay_arm="mask_uniform", complementary_masks=True, relay_threshold=None)
    trainer.train()
    plain = BD3LMTrainer(
        model=load_plain(checkpoints["fast_dllm_v2"]),
        args=BD3LMConfig(
            output_dir=str(tmp_path / "plain"),
            per_device_train_batch_size=4,
            max_steps=4,
            logging_steps=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            complementary_masks=True,
            loss_weight_type="uniform",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=rows,
        processing_class=trainer.processing_class,
    )
    plain.train()
    assert logged(trainer, "loss") == logged(plain, "loss")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_is_the_uninterrupted_one(build, family, tmp_path):
    flags = {"relay_gate": "default", "relay_preset": "llm", "save_strategy": "steps", "save_steps": 2}
    whole = build(family, name="whole", **flags)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "rollout_0.safetensors").exists()
    model = load_plain(str(checkpoint))
    resumed = build(family, model=model, name="resumed", **flags)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    # The checkpoint's own history comes with it.
    for name in ("loss", "relay_refills", "relay_epochs"):
        assert logged(resumed, name) == logged(whole, name)
    for name, value in unwrap(whole.model).state_dict().items():
        assert torch.equal(unwrap(resumed.model).state_dict()[name], value), name


def test_without_its_rollout_a_resumed_run_says_so(build, tmp_path, caplog):
    build(name="whole", save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    for name in ("rollout_0.safetensors", "manifest.json"):  # one that another trainer wrote
        (checkpoint / name).unlink()
    again = build(model=load_plain(str(checkpoint)), name="resumed")
    with caplog.at_level("WARNING"):
        again.train(resume_from_checkpoint=str(checkpoint))
    assert "the rows of this process begin anew" in caplog.text


def test_a_checkpoint_has_the_released_layout_and_loads(build, tmp_path):
    trainer = build("fast_dllm_v2", relay_gate="default")
    trainer.train()
    trainer.save_model()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["use_relay"] is True and config["relay_layer"] == -1
    shapes = load_file(tmp_path / "run" / "model.safetensors")
    assert {name for name in shapes if "relay" in name} == {
        "model.relay_layer_norm.weight",
        "model.relay_layer_norm.bias",
    }
    # The released files name these two keys alone.
    released = {key: value for key, value in config.items() if not key.startswith("relay_") or key == "relay_layer"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(released))
    again = RelayChannel(load_plain(str(tmp_path / "run")))
    assert torch.equal(again.norm.weight, trainer.channel.norm.weight)
    assert (again.keys.positions, again.keys.layer, again.keys.first_state) == ("mask", -1, "zeros")
    former = {
        {"use_relay": "use_loopholing", "relay_layer": "loophole_layer"}.get(k, k): v for k, v in released.items()
    }
    (tmp_path / "run" / "config.json").write_text(json.dumps(former))
    assert torch.equal(RelayChannel(load_plain(str(tmp_path / "run"))).norm.weight, again.norm.weight)


def test_a_checkpoint_whose_relay_is_lost_is_refused_by_name(build, tmp_path):
    trainer = build()
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "run"
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if "relay" not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(InputError, match=r"lacks model\.relay_layer_norm\.bias, model\.relay_layer_norm\.weight"):
        load_plain(str(folder))


def test_an_adapter_saves_its_relay(build, checkpoints, tmp_path):
    arguments = ModelArguments(checkpoints["llada_moe"], lora=True, target_modules="q_proj,v_proj", lora_dropout=0.0)
    model = load_model(arguments, RelayConfig(gate="default", positions="all"))
    trainer = build(model=model, relay_gate="default", relay_positions="all", save_strategy="steps", save_steps=4)
    trainer.train()
    adapter = tmp_path / "run" / "checkpoint-4"
    names = load_file(adapter / "adapter_model.safetensors")
    assert any(name.endswith("relay_layer_norm.weight") for name in names)
    again = load_plain(str(adapter))
    channel, own = RelayChannel(again), trainer.channel
    assert channel.keys == own.keys and channel.keys.positions == "all"
    assert not torch.equal(own.norm.bias, torch.zeros_like(own.norm.bias))
    ids, state = torch.randint(20, 200, (2, 9)), torch.randn(2, 9, own.size)
    ids[:, 3:5] = channel.mask_token_id
    results = []
    for one in (channel, own):
        passed = one.first(2, 9)
        lm = model if one is own else again
        lm.eval()
        with one.passing(type(passed)(state, passed.is_set | True)), torch.no_grad():
            results.append(lm(ids).logits)
    assert torch.equal(*results)
    shutil.copytree(adapter, tmp_path / "torn")
    (tmp_path / "torn" / "relay_config.json").unlink()
    with pytest.raises(InputError, match=r"brings relay_layer_norm and no relay_config\.json"):
        load_plain(str(tmp_path / "torn"))


def test_adapters_that_would_lose_the_relay_are_refused(build, checkpoints):
    model = load_model(ModelArguments(checkpoints["llada_moe"], lora=True), RelayConfig.for_arm("rollout"))
    with pytest.raises(
        InputError, match="adapters were made without relay_layer_norm and do not save it: begin new ones"
    ):
        build(model=model)
    build(model=model, relay_arm="rollout").train()


def test_accumulation_and_checkpointed_activations_change_nothing(build):
    """At learning rate 0 the gradient norm tells the gradients; recomputed activations give the same ones."""
    still = {"relay_gate": "default", "learning_rate": 0.0, "per_device_train_batch_size": 5}
    plain = build(**still)
    plain.train()
    recomputed = build(
        **still,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    recomputed.train()
    assert logged(plain, "loss") == logged(recomputed, "loss")
    torch.testing.assert_close(logged(plain, "grad_norm"), logged(recomputed, "grad_norm"), rtol=1e-5, atol=0)
    twice = build(**still, gradient_accumulation_steps=2, max_steps=2)
    twice.train()
    losses = torch.tensor(logged(plain, "loss")).view(2, 2).mean(1)
    torch.testing.assert_close(torch.tensor(logged(twice, "loss")), losses, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shift_within", ["block", "row"])
def test_a_step_of_block_diffusion_is_the_naive_loop(build, checkpoints, shift_within):
    """[x ; x_0] with a shift: loss, gradients and reveals, position by position, in float64; some rows have states."""
    trainer = build(
        "fast_dllm_v2",
        model=load_plain(checkpoints["fast_dllm_v2"]).double(),
        relay_gate="default",
        relay_shift_within=shift_within,
        relay_num_steps=3,
        block_size=8,
        max_steps=1,
    )
    trainer.train()
    model, channel = trainer.lm.train(), trainer.channel
    with torch.no_grad():
        channel.norm.weight.normal_()
        channel.norm.bias.normal_()
    inputs = trainer.next_rows()
    assert bool(trainer.buffer.rows.is_set.any())
    ids, is_masked = inputs["input_ids"], inputs["is_masked"].clone()
    hidden = trainer.buffer.rows.hidden.double()
    model.zero_grad()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total, left = naive_steps(model, channel.norm, ids, is_masked, hidden, shift_within, trainer.rule.mask_token_id)
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-9, atol=0)
    assert torch.equal(trainer.buffer.rows.is_masked, left)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-10, msg=name)


def naive_steps(model, norm, ids, is_masked, hidden, shift_within, mask):
    """Three forwards with blocks of eight and the threshold 0.05: (sum of the losses, what is masked after them)."""
    length, total = ids.shape[1], 0.0
    block, half = torch.arange(length).repeat(2) // 8, torch.arange(2 * length) < length
    same = half[:, None] & half[None] & (block[:, None] == block[None])
    before = half[:, None] & ~half[None] & (block[None] < block[:, None])
    clean = ~half[:, None] & ~half[None] & (block[None] <= block[:, None])
    for _ in range(3):
        keeps = [c % 8 == 0 if shift_within == "block" else c == 0 for c in range(length)]
        moved = torch.stack([hidden[:, c if keep else c - 1] for c, keep in enumerate(keeps)], dim=1)
        added = torch.nn.functional.layer_norm(moved, moved.shape[2:], norm.weight, norm.bias, norm.eps)
        noised = model.backbone.embedding(torch.where(is_masked, mask, ids)) + added * is_masked[..., None]
        states = model.backbone(
            inputs_embeds=torch.cat([noised, model.backbone.embedding(ids)], dim=1),
            attention_mask=(same | before | clean)[None, None],
            position_ids=torch.arange(length).repeat(2)[None],
        ).last_hidden_state
        hidden = states[:, :length]
        logits = model.head(hidden)
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        total = total + torch.nn.functional.cross_entropy(logits[is_masked], ids[is_masked])
        sure = logits.detach().index_fill(2, torch.tensor([mask]), -torch.inf).softmax(-1).amax(-1)
        revealed = torch.zeros_like(is_masked)
        for row in range(len(ids)):
            for start in range(0, length, 8):
                places = [c for c in range(start, start + 8) if is_masked[row, c]]
                best = max(places, key=lambda c: sure[row, c], default=None)
                for c in places:
                    revealed[row, c] = c == best or sure[row, c] > 0.05
        is_masked = is_masked & ~revealed
    return total, is_masked


def test_dropped_rows(build):
    keeping, dropping = build(relay_arm="rollout"), build(relay_arm="rollout", relay_drop_rows=True)
    keeping.train()
    dropping.train()
    assert not keeping.source.drops and dropping.source.drops
    assert logged(keeping, "relay_epochs") != logged(dropping, "relay_epochs")


def test_router_losses_of_all_forwards_are_added(build, checkpoints):
    model = load_plain(checkpoints["llada_moe"])
    model.config.output_router_logits = True
    trainer = build(model=model, learning_rate=0.0, max_steps=1)
    trainer.train()
    (loss,), (first,), (second,) = (logged(trainer, name) for name in ("loss", "relay_loss_1", "relay_loss_2"))
    # A balanced router has an auxiliary loss of about 1 per layer's mean, in each of the two forwards.
    assert (loss - first - second) / model.config.router_aux_loss_coef > 1.9


def test_evaluation_is_of_all_masks_and_of_a_first_forward(build):
    trainer = build(relay_gate="default", per_device_eval_batch_size=4)
    with torch.no_grad():
        trainer.channel.norm.bias.normal_()
    metrics, batch = trainer.evaluate(), next(iter(trainer.get_eval_dataloader()))
    model, channel, maskable = trainer.lm.eval(), trainer.channel, batch["maskable"]
    mask = trainer.rule.mask_token_id
    with torch.no_grad(), channel.passing(channel.first(*maskable.shape)):
        all_masked = model(batch["input_ids"].masked_fill(maskable, mask)).logits
        at_random = model(batch["noised_ids"]).logits
    expected = torch.nn.functional.cross_entropy(all_masked[maskable], batch["input_ids"][maskable])
    assert metrics["eval_relay_loss_1"] == pytest.approx(float(expected), rel=1e-5)
    is_masked = batch["is_masked"]
    total = torch.nn.functional.cross_entropy(at_random[is_masked], batch["input_ids"][is_masked], reduction="sum")
    assert metrics["eval_loss"] == pytest.approx(float(total / maskable.sum()), rel=1e-5)


def test_evaluation_weighs_tokens_and_draws_no_jitter(checkpoints, build):
    """Rows with unequally many labels: the same numbers at every batch size, and at every step."""
    found = []
    ids = list(range(20, 38))
    uneven = [{"input_ids": ids, "labels": [-100] * known + ids[known:]} for known in (2, 16, 9, 17)]
    for size, calls in ((1, 0), (4, 3)):
        trainer = build(relay_arm="rollout", relay_preset="sudoku", relay_threshold=None, relay_block_size=None)
        trainer.args.per_device_eval_batch_size = size
        trainer.buffer.num_calls = calls
        found.append(trainer.evaluate(uneven))
    for name in ("eval_relay_loss_1", "eval_relay_loss_2"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


def test_micro_steps_of_one_optimizer_step_draw_anew(build, monkeypatch):
    from memdlm.relay import RevealRule

    draws, tau = [], RevealRule.tau
    monkeypatch.setattr(RevealRule, "tau", lambda self, parts: draws.append(tau(self, parts)) or draws[-1])
    build(
        relay_arm="rollout",
        relay_preset="sudoku",
        relay_threshold=None,
        relay_block_size=None,
        gradient_accumulation_steps=2,
        max_steps=1,
    ).train()
    assert len(draws) == len(set(draws)) == 4


def test_going_on_with_an_adapter_keeps_its_relay(build, checkpoints, tmp_path):
    arguments = ModelArguments(checkpoints["llada_moe"], lora=True, target_modules="q_proj", lora_dropout=0.0)
    model = load_model(arguments, RelayConfig(gate="default", positions="all"))
    build(model=model, relay_gate="default", relay_positions="all", save_strategy="steps", save_steps=4).train()
    adapter = str(tmp_path / "run" / "checkpoint-4")
    again = load_model(ModelArguments(adapter, lora=True), RelayConfig())
    assert RelayChannel(again).keys.positions == "all"
    # Whoever trains it on, its relay is saved with it.
    later = build(model=again, name="later", relay_arm="rollout", save_strategy="steps", save_steps=4)
    later.train()
    assert RelayChannel(load_plain(str(tmp_path / "later" / "checkpoint-4"))).keys.positions == "all"
    with pytest.raises(InputError, match="relay_positions=mask contradicts the checkpoint"):
        build(model=again, relay_positions="mask")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size has no effect on a rollout"),
        ({"torch_compile": True}, "a relay and torch.compile cannot be combined"),
    ],
)
def test_what_cannot_work_is_refused(build, flags, message):
    with pytest.raises(InputError, match=message):
        build(**flags)
