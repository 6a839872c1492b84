import pytest
import torch

from dllm.core.samplers import MDLMSampler, MDLMSamplerConfig
from dllm.models.backbone import DiffusionLMOutput

MASK = 39


class _Tokenizer:
    special_tokens_map = {"mask_token": "<mask>"}

    def convert_tokens_to_ids(self, token: str) -> int:
        return MASK


def _noised() -> torch.Tensor:
    ids = torch.randint(0, 38, (3, 9), generator=torch.Generator().manual_seed(2))
    ids[0, 4:] = MASK
    ids[1, 2] = MASK  # row 2 has nothing to fill in
    return ids


@pytest.mark.parametrize("remasking", ["low_confidence", "random", "margin", "entropy"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_fills_every_mask_and_touches_nothing_else(make_model, remasking: str, temperature: float) -> None:
    sampler = MDLMSampler(make_model(), _Tokenizer())  # pyright: ignore
    noised = _noised()
    config = MDLMSamplerConfig(steps=3, temperature=temperature, remasking=remasking)  # pyright: ignore
    filled = sampler.infill(noised, config).sequences
    assert not bool((filled == MASK).any())
    assert torch.equal(filled[noised != MASK], noised[noised != MASK])
    assert torch.equal(filled, sampler.infill(noised, config).sequences)


def test_greedy_filling_equals_a_loop(make_model) -> None:
    model = make_model("llada").double()
    noised = _noised()[:1]
    ids = noised.clone()
    while bool((ids == MASK).any()):  # one token per step: the surest one
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        logits[:, MASK] = -torch.inf
        best = torch.softmax(logits.float(), dim=-1).max(dim=-1)
        sure = torch.where(ids[0] == MASK, best.values, -1.0)
        ids[0, int(sure.argmax())] = best.indices[int(sure.argmax())]
    sampler = MDLMSampler(model, _Tokenizer())  # pyright: ignore
    assert torch.equal(sampler.infill(noised, MDLMSamplerConfig(steps=5)).sequences, ids)


def test_head_sees_only_the_masked_positions(make_model) -> None:
    model = make_model()
    seen: list[torch.Size] = []
    original = model.forward

    def forward(**inputs) -> DiffusionLMOutput:
        output = original(**inputs)
        seen.append(output.logits.shape)
        return output

    model.forward = forward
    MDLMSampler(model, _Tokenizer()).infill(_noised(), MDLMSamplerConfig(steps=2))  # pyright: ignore
    assert seen == [(6, 40), (6, 40)]


def test_suppressed_tokens_are_never_proposed(make_model) -> None:
    sampler = MDLMSampler(make_model(), _Tokenizer())  # pyright: ignore
    noised = _noised()
    masked = noised == MASK
    first = set(sampler.infill(noised).sequences[masked].tolist())
    config = MDLMSamplerConfig(suppress_tokens=tuple(first))
    assert not first & set(sampler.infill(noised, config).sequences[masked].tolist())


@pytest.mark.parametrize("settings", [{"steps": 0}, {"temperature": -1.0}, {"remasking": "best"}])
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        MDLMSamplerConfig(**settings)
