"""MDLMSampler with `max_uncertainty`: against a naive loop over one row, a batch = its singles, what is counted."""

import dataclasses

import pytest
import torch

from dllm.core.samplers import MDLMSampler, MDLMSamplerConfig

MASK, PAD, EOS = 39, 38, 37


class _Tokenizer:
    special_tokens_map = {"mask_token": "<mask>", "pad_token": "<pad>", "eos_token": "<eos>"}

    def get_vocab(self) -> dict[str, int]:
        return {"<mask>": MASK, "<pad>": PAD, "<eos>": EOS}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.get_vocab()[token]


def _sampler(model) -> MDLMSampler:
    return MDLMSampler(model, _Tokenizer())  # pyright: ignore


def _boards() -> torch.Tensor:
    """Rows with 9, 4, 0 and 11 masks; one of masks alone would have the same prediction everywhere."""
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, 37, (4, 13), generator=generator)
    for row, count in enumerate((9, 4, 0, 11)):
        ids[row, torch.randperm(13, generator=generator)[:count]] = MASK
    return ids


@torch.no_grad()
def _naive(model, ids: torch.Tensor, budget: float) -> tuple[torch.Tensor, int]:
    """(filled in, forwards) of one row [L]."""
    ids, forwards = ids.clone(), 0
    while bool((ids == MASK).any()):
        logits = model(input_ids=ids[None]).logits[0]
        logits[:, MASK] = -torch.inf
        best = torch.softmax(logits, dim=-1).max(dim=-1)
        places = sorted((ids == MASK).nonzero()[:, 0].tolist(), key=lambda i: 1 - float(best.values[i]))
        total, chosen = 0.0, places[:1]
        for place in places:
            total += 1 - float(best.values[place])
            if total >= budget:
                break
            chosen.append(place)
        for place in chosen:
            ids[place] = best.indices[place]
        forwards += 1
    return ids, forwards


@pytest.mark.parametrize("budget", [0.15, 0.9, 3.0])
def test_infilling_equals_the_published_decoder_on_each_row(make_model, budget: float) -> None:
    model = make_model("llada").double()
    output = _sampler(model).infill(_boards(), MDLMSamplerConfig(max_uncertainty=budget))
    assert output.nfe is not None and output.cache_forwards is not None
    counts = []
    for row, board in enumerate(_boards()):
        wanted, forwards = _naive(model, board, budget)
        assert torch.equal(output.sequences[row], wanted)
        assert output.nfe[row] == forwards
        counts.append(forwards)
    assert output.batch_forwards == max(counts) and output.batch_nfe == max(counts) + 1
    assert not output.cache_forwards.any()
    assert counts[2] == 0 and output.tokens_per_forward[2] == 0
    if budget == 3.0:
        assert max(counts) < 11


@pytest.mark.parametrize("settings", [{}, {"steps": 6}, {"temperature": 0.7, "block_size": 3}, {"early_stop": True}])
def test_a_batch_equals_its_singles(make_model, settings: dict) -> None:
    sampler = _sampler(make_model().double())
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 37, (length,), generator=generator).tolist() for length in (5, 2, 7)]
    config = MDLMSamplerConfig(max_new_tokens=9, max_uncertainty=0.8, **settings)
    batch = sampler.sample(prompts, config)
    assert batch.answers is not None and batch.nfe is not None
    for row, prompt in enumerate(prompts):
        single = sampler.sample([prompt], config)
        assert single.answers is not None and single.nfe is not None
        assert batch.answers[row].tolist() == single.answers[0].tolist()
        assert batch.nfe[row] == single.nfe[0] == single.batch_forwards
    fewer = sampler.sample(prompts, dataclasses.replace(config, max_uncertainty=20.0)).nfe
    assert fewer is not None and int(fewer.sum()) < int(batch.nfe.sum())


def test_the_batch_wide_count_adds_up_the_longest_row_of_every_block(make_model) -> None:
    output = _sampler(make_model().double()).infill(_boards(), MDLMSamplerConfig(block_size=4))
    assert output.nfe is not None and output.batch_forwards is not None
    masks = (torch.nn.functional.pad(_boards(), (0, 3)) == MASK).view(4, 4, 4).sum(dim=2)  # rows, blocks
    assert output.nfe.tolist() == masks.sum(dim=1).tolist()
    assert int(output.batch_forwards) == int(masks.max(dim=0).values.sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_uncertainty": 0.0}, "max_uncertainty must be above 0 and finite, got 0.0"),
        ({"max_uncertainty": float("inf")}, "max_uncertainty must be above 0 and finite"),
        ({"max_uncertainty": 0.1, "threshold": 0.9}, "give one of them"),
        ({"max_uncertainty": 0.1, "remasking": "margin"}, "remasking=margin has none: use low_confidence"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MDLMSamplerConfig(**settings)
