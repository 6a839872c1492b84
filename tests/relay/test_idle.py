"""A relay that is not used: told once per process and model, and its norm left as it is."""

import logging

import pytest
import torch

from dllm.core.samplers import BlockSampler, MDLMSampler
from dllm.core.trainers import MDLMConfig, MDLMTrainer
from dllm.models.auto import load_model as load_plain
from dllm.models.auto import load_tokenizer
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.args import ModelArguments
from dllm.utils.parsing import InputError
from memdlm.relay import RelayMDLMSampler, RelayTrainer, RelayTrainerConfig, load_model, make_sampler

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4, "vocab_size": 300}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(make_tiny_checkpoint(tmp_path_factory.mktemp("idle") / "m", "llada_moe", **SIZES))


@pytest.fixture
def relayed(checkpoint):
    """A function (**model arguments) -> (a model with a relay, tokenizer)."""

    def make(**arguments):
        model = load_model(ModelArguments(model_name_or_path=checkpoint, **arguments))
        return model, load_tokenizer(checkpoint)

    return make


@pytest.fixture
def train(tmp_path):
    """A function (trainer class, its config, (model, tokenizer), **flags) -> the trainer, after two steps."""

    def run(trainer_class, config_class, loaded, **flags):
        model, tokenizer = loaded
        settings = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
        args = config_class(output_dir=str(tmp_path), save_strategy="no", learning_rate=1e-2, **settings, **flags)
        rows = [{"input_ids": list(range(20 + i, 36 + i)), "labels": list(range(20 + i, 36 + i))} for i in range(8)]
        trainer = trainer_class(model=model, args=args, processing_class=tokenizer, train_dataset=rows)
        trainer.train()
        return trainer

    return run


def _said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "which is off" in record.getMessage()]


def test_a_sampler_that_carries_nothing_says_so_once_per_model(relayed, caplog) -> None:
    model, tokenizer = relayed()
    RelayMDLMSampler(model, tokenizer)
    assert _said(caplog) == []
    for _ in range(2):
        MDLMSampler(model, tokenizer)
    (line,) = _said(caplog)
    assert "was trained with a relay, which is off" in line and "\n" not in line
    MDLMSampler(*relayed())
    assert len(_said(caplog)) == 2


def test_which_sampler_is_made(relayed, checkpoint, caplog) -> None:
    model, tokenizer = relayed()
    assert type(make_sampler(MDLMSampler, model, tokenizer)) is RelayMDLMSampler
    zeroed = make_sampler(MDLMSampler, model, tokenizer, zeroed=True)
    assert isinstance(zeroed, RelayMDLMSampler) and zeroed.zeroed and _said(caplog) == []
    assert type(make_sampler(MDLMSampler, model, tokenizer, relay=False)) is MDLMSampler
    assert len(_said(caplog)) == 1

    plain = load_plain(checkpoint)
    assert type(make_sampler(BlockSampler, plain, tokenizer)) is BlockSampler
    for settings in ({"relay": True}, {"zeroed": True}):
        with pytest.raises(InputError, match=r"no relay \(model\.relay_layer_norm\.weight is not among"):
            make_sampler(MDLMSampler, plain, tokenizer, **settings)
    with pytest.raises(InputError, match="relay_zeroed has no effect with relay=False"):
        make_sampler(MDLMSampler, model, tokenizer, relay=False, zeroed=True)
    with pytest.raises(InputError, match="Own carries no state: decode with MDLMSampler, BlockSampler"):
        make_sampler(type("Own", (MDLMSampler,), {}), model, tokenizer)


@pytest.mark.parametrize("lora", [False, True])
def test_plain_training_leaves_the_norm_as_it_is(relayed, train, caplog, lora: bool) -> None:
    loaded = relayed(**({"lora": True, "lora_r": 2} if lora else {}))
    parameters = dict(loaded[0].named_parameters())
    norm = {name for name in parameters if "relay_layer_norm" in name}
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    before = {name: parameters[name].detach().clone() for name in trained}
    frozen_meanwhile = []

    class Watching(MDLMTrainer):
        def training_step(self, *args, **kwargs):
            frozen_meanwhile.append(not any(parameters[name].requires_grad for name in norm))
            return super().training_step(*args, **kwargs)

    trainer = train(Watching, MDLMConfig, loaded)
    assert frozen_meanwhile == [True, True] and norm & trained
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == trained
    assert all(torch.equal(before[name], parameters[name]) for name in norm & trained)
    assert any(not torch.equal(before[name], parameters[name]) for name in trained - norm)
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not any(id(parameters[name]) in optimised for name in norm)
    (line,) = _said(caplog)
    assert "its norm gets no gradient and stays as it is" in line
    trainer.train()
    assert len(_said(caplog)) == 1


@pytest.mark.parametrize("arm", ["relay", "rollout"])
def test_of_the_arms_the_one_that_carries_trains_it(relayed, train, caplog, arm: str) -> None:
    loaded = relayed()
    norm = loaded[0].backbone.relay_layer_norm
    with caplog.at_level(logging.WARNING):
        train(RelayTrainer, RelayTrainerConfig, loaded, relay_arm=arm)
    assert bool(norm.bias.abs().sum() > 0) == (arm == "relay")
    assert len(_said(caplog)) == (arm == "rollout")
