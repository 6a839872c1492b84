"""Flags to a decoder; answers and fillings with and without memory."""

import dataclasses

import pytest
import torch

from dllm.core.samplers import (
    BLOCK_PRESETS,
    MDLM_PRESETS,
    BlockSampler,
    BlockSamplerConfig,
    MDLMSampler,
    MDLMSamplerConfig,
)
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils import InputError, parse_args
from memdlm import MemoryConfig, ParametricMemory
from memdlm.decoding import (
    Decoder,
    LoadFlags,
    MemoryFlags,
    SamplerFlags,
    find_sampler,
    memory_config,
    refuse_idle_memory,
    sampler_config,
)

# Short prompts must draw something, and what is written must change what is said.
STRONG = ("--mem_prompt_mask_ratio", "0.6", "--mem_inner_lr", "5", "--mem_inner_layer_fraction", "0.5")


def _flags(kind, *words: str):
    (parsed,) = parse_args(kind, args=words)
    return parsed


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Decoder:
    folder = tmp_path_factory.mktemp("decoding") / "tiny"
    make_tiny_checkpoint(folder, "llada_moe", num_hidden_layers=3, num_experts=4, max_position_embeddings=64)
    load = _flags(LoadFlags, "--model_name_or_path", str(folder), "--device", "cpu")
    made = Decoder.from_flags(load, _flags(MemoryFlags, *STRONG))
    with torch.no_grad():
        for parameter in made.sampler.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # almost uniform predictions would hide what a memory does
    return made


@pytest.fixture
def prompts(decoder) -> list[list[int]]:
    texts = ("def add(a, b): return a + b", "import json", "for name in sorted(names): print(name)")
    return [decoder.tokenizer(text)["input_ids"] for text in texts]


def test_every_setting_of_the_sampler_is_a_flag() -> None:
    words = {
        "max_new_tokens": 7,
        "block_size": 3,
        "steps": 5,
        "temperature": 0.5,
        "seed": 4,
        "early_stop": True,
        "histories": True,
        "remasking": "margin",
        "threshold": 0.7,
        "cfg_scale": 1.5,
        "cache": "prefix",
        "suppress_tokens": (3, 4),
    }
    assert {*words, "max_uncertainty"} == {knob.name for knob in dataclasses.fields(MDLMSamplerConfig)}
    line = [
        word
        for name, value in words.items()
        for word in (f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)]))
    ]
    assert vars(sampler_config(_flags(SamplerFlags, *line), MDLMSampler)) == {**words, "max_uncertainty": None}
    # It excludes threshold.
    assert sampler_config(_flags(SamplerFlags, "--max_uncertainty", "0.25"), MDLMSampler) == MDLMSamplerConfig(
        max_uncertainty=0.25
    )
    assert sampler_config(_flags(SamplerFlags), MDLMSampler) == MDLMSamplerConfig()


def test_every_setting_of_the_block_sampler_is_a_flag() -> None:
    words = {
        "max_new_tokens": 7,
        "block_size": 6,
        "temperature": 0.5,
        "seed": 4,
        "early_stop": True,
        "histories": True,
        "sub_block_size": 3,
        "steps_per_block": 2,
        "min_transfer": 2,
        "threshold": 0.7,
        "top_k": 5,
        "top_p": 0.75,
        "editing_threshold": 0.25,
        "max_post_steps": 3,
        "use_cache": False,
    }
    assert {*words, "suppress_tokens", "steps"} == {knob.name for knob in dataclasses.fields(BlockSamplerConfig)}
    line = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    assert vars(sampler_config(_flags(SamplerFlags, *line), BlockSampler)) == {
        **words,
        "suppress_tokens": (),
        "steps": None,
    }
    quality = sampler_config(_flags(SamplerFlags, "--preset", "quality", "--threshold", "0.9"), BlockSampler)
    assert quality == BlockSamplerConfig(**{**BLOCK_PRESETS["quality"], "threshold": 0.9})
    with pytest.raises(InputError, match="steps has no effect on block decoding: give steps_per_block"):
        sampler_config(_flags(SamplerFlags, "--steps", "4"), BlockSampler)
    with pytest.raises(InputError, match="--remasking has no effect on BlockSampler, which decodes this model"):
        sampler_config(_flags(SamplerFlags, "--remasking", "margin"), BlockSampler)


def test_the_family_decides_how_is_decoded_unless_it_is_told(tmp_path) -> None:
    folders = {name: str(make_tiny_checkpoint(tmp_path / name, name)) for name in ("llada_moe", "llada2_moe")}

    def found(family: str, *words: str):
        load = _flags(LoadFlags, "--model_name_or_path", folders[family])
        return find_sampler(load, _flags(SamplerFlags, *words))

    assert (found("llada_moe"), found("llada2_moe")) == (MDLMSampler, BlockSampler)
    assert found("llada_moe", "--sampler", "block", "--block_size", "8") is BlockSampler
    with pytest.raises(InputError, match="llada_moe decodes block by block only if it was trained by block diffusion"):
        found("llada_moe", "--sampler", "block")
    with pytest.raises(InputError, match="llada2_moe decodes block by block: drop --sampler mdlm"):
        found("llada2_moe", "--sampler", "mdlm")


def test_flags_win_over_the_preset_and_that_over_the_defaults_of_a_program() -> None:
    name, preset = next((name, preset) for name, preset in MDLM_PRESETS.items() if "block_size" in preset)
    config = sampler_config(
        _flags(SamplerFlags, "--preset", name, "--max_new_tokens", "31"),
        MDLMSampler,
        max_new_tokens=9,
        block_size=1,
        early_stop=True,
    )
    assert (config.max_new_tokens, config.block_size, config.early_stop) == (31, preset["block_size"], True)
    assert (
        sampler_config(_flags(SamplerFlags, "--early_stop", "False"), MDLMSampler, early_stop=True).early_stop is False
    )
    with pytest.raises(InputError, match="--preset 'x' is none of MDLMSampler"):
        sampler_config(_flags(SamplerFlags, "--preset", "x"), MDLMSampler)


def test_the_flags_of_the_memory_reach_its_settings() -> None:
    values = {
        "num_inner_steps": 3,
        "num_inner_epochs": 2,
        "masking_strategy": "pmc",
        "prompt_mask_ratio": 0.4,
        "progressive_consistent_start_scale": 2.0,
        "inner_loss_type": "distill",
        "distill_temperature": 2.0,
        "distill_hidden_type": "mse",
        "inner_loss_mask_mode": "newly_revealed",
        "inner_lr": 0.3,
        "inner_grad_clip": 2.0,
        "inner_rank": 4,
        "inner_alpha": 8.0,
        "inner_layer_fraction": 0.5,
        "inner_target_modules": "up_proj,down_proj",
        "inner_adapter_type": "lora",
        "clip_kind": "global",
        "seed": 7,
        "loss_weight_type": "scheduler",
        "loss_norm_type": "sequence",
    }
    flags = _flags(MemoryFlags, *(word for name, value in values.items() for word in (f"--mem_{name}", str(value))))
    assert {f"mem_{name}" for name in values} | {"mem_enabled"} == set(vars(flags))
    assert memory_config(flags) == MemoryConfig.for_decoding(**values)
    assert memory_config(_flags(MemoryFlags)) == MemoryConfig.for_decoding()
    with pytest.raises(InputError, match="--mem_num_inner_steps has no effect without --mem_enabled True"):
        refuse_idle_memory(flags)
    refuse_idle_memory(_flags(MemoryFlags))


@pytest.mark.parametrize("with_memory", [False, True])
def test_answers_are_those_of_the_sampler_with_the_memories_in_place(decoder, prompts, with_memory) -> None:
    config = MDLMSamplerConfig(max_new_tokens=8, steps=4)
    decoded = decoder.answer(prompts, config, with_memory=with_memory)
    memory = ParametricMemory(decoder.sampler.model, memory_config(_flags(MemoryFlags, *STRONG)))
    with memory.attached():
        if with_memory:
            memory.adapt(prompts)
        wanted = decoder.sampler.sample(prompts, config)
    assert torch.equal(decoded.output.sequences, wanted.sequences)
    if not with_memory:
        assert decoded.written is None and decoded.memory_seconds == 0
        return
    assert [one.num_tokens for one in decoded.written] == [len(prompt) for prompt in prompts]
    assert all(one.failure is None for one in decoded.written)
    assert "memory of" in decoded.summary(0) and "4 denoising forwards, 2.00 tokens per forward" in decoded.summary(0)
    plain = decoder.answer(prompts, config).output.sequences
    assert not torch.equal(plain, wanted.sequences)  # it did something, and is gone
    assert torch.equal(plain, decoder.sampler.sample(prompts, config).sequences)


@pytest.mark.parametrize("with_memory", [False, True])
def test_texts_of_unequal_length_are_filled_in_as_if_alone(decoder, prompts, with_memory) -> None:
    mask = decoder.sampler.mask_token_id
    rows = [[*prompt[:3], mask, mask, *prompt[3:]] for prompt in prompts]
    config = MDLMSamplerConfig(steps=2)
    together = decoder.infill(rows, config, with_memory=with_memory)
    for index, row in enumerate(rows):
        alone = decoder.infill([row], config, with_memory=with_memory).output.sequences[0]
        filled = together.output.sequences[index, : len(row)]
        assert torch.equal(filled, alone)
        kept = [token for place, token in enumerate(filled.tolist()) if row[place] != mask]
        assert kept == prompts[index] and mask not in filled
    if with_memory:
        assert [one.num_tokens for one in together.written] == [len(prompt) for prompt in prompts]


def test_an_interrupted_answer_leaves_no_memory_behind(decoder, prompts) -> None:
    config = MDLMSamplerConfig(max_new_tokens=8)
    before = decoder.answer(prompts, config).output.sequences

    def stop(state: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder.answer(prompts, config, with_memory=True, on_step=stop)
    assert torch.equal(before, decoder.answer(prompts, config).output.sequences)


def test_text_ends_where_the_answer_does(decoder) -> None:
    ids = decoder.tokenizer("one two")["input_ids"]
    for end in decoder.sampler.end_token_ids:
        assert decoder.text([*ids, end, *ids]) == "one two"
    assert decoder.text(ids) == "one two"


def test_bad_input_is_named(decoder, prompts) -> None:
    config = MDLMSamplerConfig(max_new_tokens=60)
    with pytest.raises(InputError, match=r"and 60 new ones are more than the model's 64"):
        decoder.answer(prompts, config)
    with pytest.raises(InputError, match="holds no mask"):
        decoder.infill(prompts, config)
    with pytest.raises(InputError, match="nothing but masks"):
        decoder.infill([[decoder.sampler.mask_token_id] * 3], config, with_memory=True)
    with pytest.raises(InputError, match="made without settings of a memory"):
        Decoder(decoder.sampler.model, decoder.tokenizer).answer(
            prompts, MDLMSamplerConfig(max_new_tokens=4), with_memory=True
        )
    with pytest.raises(InputError, match="is no device"):
        Decoder.from_flags(_flags(LoadFlags, "--model_name_or_path", "x", "--device", "toaster"), _flags(MemoryFlags))
