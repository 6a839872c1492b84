"""BlockSampler against a naive loop, cache on = off, a batch = its singles."""

import dataclasses

import pytest
import torch

from dllm.core.attention import block_causal_mask
from dllm.core.samplers import BLOCK_PRESETS, BlockSampler, BlockSamplerConfig

MASK, PAD, EOS = 39, 38, 37
FAMILIES = ["llada", "llada_moe", "llada2_moe"]


class _Tokenizer:
    special_tokens_map = {"mask_token": "<mask>", "pad_token": "<pad>", "eos_token": "<eos>"}

    def get_vocab(self) -> dict[str, int]:
        return {"<mask>": MASK, "<pad>": PAD, "<eos>": EOS}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.get_vocab()[token]


def _sampler(model) -> BlockSampler:
    return BlockSampler(model, _Tokenizer())  # pyright: ignore


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 37, (length,), generator=generator).tolist() for length in (5, 2, 11, 8, 1)]


def _has_ended(answer: list[int], ends: tuple[int, ...]) -> bool:
    """Whether one of `ends` stands in the answer with no mask before it."""
    first = next((token for token in answer if token == MASK or token in ends), MASK)
    return first != MASK


@torch.no_grad()
def _naive(
    model, prompt: list[int], new: int, size: int, config: BlockSamplerConfig, ends: tuple[int, ...] = ()
) -> tuple[list[int], int]:
    """(answer, steps) of one prompt: everything seen is computed anew in every step, one token after the other; it ends
    where one of `ends` does, with editing where its block is done."""
    total = -((len(prompt) + new) // -size) * size
    ids = torch.tensor(prompt + [MASK] * (total - len(prompt)))
    num_steps = 0
    for start in range(len(prompt) // size * size, total, size):
        block = range(start, start + size)
        masks_at_first = sum(int(ids[i]) == MASK for i in block)
        step = post_steps = 0
        while True:
            seen = ids[: start + size]
            logits = model(input_ids=seen[None], attention_mask=block_causal_mask(len(seen), size)).logits[0]
            logits[:, MASK] = -torch.inf
            best = torch.softmax(logits, dim=-1).max(dim=-1)
            masked = sorted((i for i in block if ids[i] == MASK), key=lambda i: -float(best.values[i]))
            had_masks, part = bool(masked), config.sub_block_size or size
            masked = [i for i in masked if i // part == min(masked) // part]
            share = config.steps_per_block or size
            count = masks_at_first // share + (step < masks_at_first % share)
            chosen = masked[: max(config.min_transfer, count)]
            if config.threshold is not None:
                chosen = [i for i in masked if i in chosen or best.values[i] > config.threshold]
            editable = [i for i in block if i >= len(prompt) and ids[i] != MASK]
            if config.editing_threshold is not None:
                surer = [i for i in editable if best.values[i] > config.editing_threshold]
                chosen = chosen + [i for i in surer if best.indices[i] != ids[i]]
            for i in chosen:
                ids[i] = best.indices[i]
            num_steps += 1
            step += 1
            post_steps += not had_masks
            if config.editing_threshold is None and _has_ended(ids[len(prompt) :].tolist(), ends):
                break
            if any(ids[i] == MASK for i in block):
                continue
            if config.editing_threshold is None or not chosen or post_steps >= config.max_post_steps:
                break
        if _has_ended(ids[len(prompt) :].tolist(), ends):
            break
    return ids[len(prompt) : len(prompt) + new].tolist(), num_steps


SETTINGS = {
    "plain": {},
    "steps": {"steps_per_block": 3},
    "transfer": {"min_transfer": 2},
    "threshold": {"threshold": 0.2},
    "threshold_and_steps": {"threshold": 0.3, "steps_per_block": 2},
    "sub_blocks": {"sub_block_size": 2},
    "sub_blocks_and_threshold": {"sub_block_size": 2, "threshold": 0.2, "steps_per_block": 2},
    "sub_blocks_and_editing": {"sub_block_size": 1, "threshold": 0.15, "editing_threshold": 0.2},
    "editing": {"threshold": 0.15, "editing_threshold": 0.2},
    "editing_all": {"steps_per_block": 2, "editing_threshold": 0.0, "max_post_steps": 3},
    "no_post_steps": {"threshold": 0.1, "editing_threshold": 0.1, "max_post_steps": 0},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_sample_equals_a_naive_loop(make_model, family: str, name: str) -> None:
    model = make_model(family).double()
    config = BlockSamplerConfig(max_new_tokens=11, block_size=4, **SETTINGS[name])
    output = _sampler(model).sample(_prompts(), config)
    assert output.answers is not None and output.nfe is not None and output.cache_forwards is not None
    for row, prompt in enumerate(_prompts()):
        answer, steps = _naive(model, prompt, 11, 4, config)
        assert output.answers[row].tolist() == answer
        assert output.nfe[row] == steps
        assert output.cache_forwards[row] == (len(prompt) >= 4)  # the whole blocks of the prompt
        assert output.sequences[row].tolist() == (prompt + answer + [PAD] * 11)[: 11 + 11]


DRAWN = {
    "temperature": {"temperature": 0.9},
    "top_k": {"temperature": 1.2, "top_k": 3, "threshold": 0.3},
    "top_p": {"temperature": 1.2, "top_p": 0.7, "editing_threshold": 0.3},
    "early_stop": {"temperature": 2.0, "early_stop": True},
    "suppressed": {"suppress_tokens": (1, 2, 3), "threshold": 0.3},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*SETTINGS, *DRAWN])
def test_cache_and_batch_change_nothing(make_model, family: str, name: str) -> None:
    sampler = _sampler(make_model(family).double())  # float32 products vary with their shape
    config = BlockSamplerConfig(max_new_tokens=17, block_size=4, **{**SETTINGS, **DRAWN}[name])
    batch = sampler.sample(_prompts(), config)
    without = sampler.sample(_prompts(), dataclasses.replace(config, use_cache=False))
    assert batch.answers is not None and batch.nfe is not None and batch.num_committed is not None
    assert batch.cache_forwards is not None and without.cache_forwards is not None and without.nfe is not None
    assert torch.equal(batch.sequences, without.sequences)
    assert torch.equal(batch.nfe, without.nfe) and not without.cache_forwards.any()
    for row, prompt in enumerate(_prompts()):
        single = sampler.sample([prompt], config)
        assert single.answers is not None and single.nfe is not None and single.num_committed is not None
        assert batch.answers[row].tolist() == single.answers[0].tolist()
        assert batch.nfe[row] == single.nfe[0]
        assert single.cache_forwards is not None and single.batch_forwards is not None
        assert batch.cache_forwards[row] == single.cache_forwards[0] == (len(prompt) >= 4)
        assert single.batch_forwards == single.nfe[0]
        assert batch.num_committed[row] == single.num_committed[0]


def test_rows_go_at_their_own_pace(make_model) -> None:
    sampler = _sampler(make_model("llada2_moe"))
    output = sampler.sample(_prompts(), BlockSamplerConfig(max_new_tokens=24, block_size=4, threshold=0.3))
    assert output.nfe is not None and len(set(output.nfe.tolist())) > 2
    assert output.batch_forwards is not None and output.batch_forwards == output.nfe.max()
    assert output.batch_nfe == output.nfe.max() + 1


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_a_finished_block_is_computed_once_more_at_most(make_model, threshold: float | None) -> None:
    model = make_model("llada2_moe")
    widths: list[int] = []
    original = model.forward

    def forward(**inputs):
        widths.append(inputs["input_ids"].shape[1])
        return original(**inputs)

    model.forward = forward
    prompt = _prompts()[2]  # 11 tokens: two whole blocks, three tokens of the third
    config = BlockSamplerConfig(max_new_tokens=9, block_size=4, threshold=threshold)
    output = _sampler(model).sample([prompt], config)
    assert output.nfe is not None and output.nfe.tolist() == [len(widths) - 1]
    assert output.cache_forwards is not None and output.cache_forwards.tolist() == [1]
    assert widths[0] == 8  # the prompt
    assert widths.count(8) == 1 + 2  # and each of the two answer blocks before the last, with its successor
    assert set(widths) == {4, 8}
    if threshold is None:
        assert len(widths) == 1 + 1 + 4 + 4  # 9 new tokens: one in the third block, then two whole ones


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"threshold": 0.2, "editing_threshold": 0.2}, {"temperature": 0.8}])
def test_infilling(make_model, family: str, settings: dict) -> None:
    model = make_model(family).double()
    sampler = _sampler(model)
    noised = torch.randint(0, 37, (4, 14), generator=torch.Generator().manual_seed(5))
    noised[0, 1:9] = MASK
    noised[1, [2, 11]] = MASK
    noised[2, 8:] = MASK  # row 3 has nothing to fill in
    real = torch.ones_like(noised)
    real[1, 12:] = 0
    config = BlockSamplerConfig(block_size=4, **settings)
    batch = sampler.infill(noised, config, real)
    without = sampler.infill(noised, dataclasses.replace(config, use_cache=False), real)
    assert torch.equal(batch.sequences, without.sequences)
    assert not (batch.sequences == MASK).any()
    assert torch.equal(batch.sequences[noised != MASK], noised[noised != MASK])
    assert batch.nfe is not None and without.nfe is not None and torch.equal(batch.nfe, without.nfe)
    assert batch.cache_forwards is not None and without.cache_forwards is not None
    # Row 1 has a block without masks between its two; row 2 a finished half.
    assert batch.cache_forwards.tolist() == [0, 1, 1, 0] and not without.cache_forwards.any()
    for row in range(4):
        length = int(real[row].sum())
        single = sampler.infill(noised[row : row + 1, :length], config)
        assert torch.equal(batch.sequences[row, :length], single.sequences[0])
        assert single.nfe is not None and batch.nfe[row] == single.nfe[0]
        assert single.cache_forwards is not None and batch.cache_forwards[row] == single.cache_forwards[0]


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_infilling_equals_a_naive_loop(make_model, use_cache: bool) -> None:
    model = make_model("llada2_moe").double()
    noised = torch.randint(0, 37, (1, 10), generator=torch.Generator().manual_seed(8))
    noised[0, [1, 2, 6, 9]] = MASK  # 10 columns: the last block of 4 is cut short, and nothing stands behind it
    wanted = noised[0].clone()
    for start in (0, 4, 8):
        while bool((wanted[start : start + 4] == MASK).any()):
            seen = wanted[: start + 4]
            logits = model(input_ids=seen[None], attention_mask=block_causal_mask(len(seen), 4)).logits[0]
            logits[:, MASK] = -torch.inf
            best = torch.softmax(logits, dim=-1).max(dim=-1)
            in_block = torch.arange(len(seen)) >= start
            place = int(torch.where((seen == MASK) & in_block, best.values, -1.0).argmax())
            wanted[place] = best.indices[place]
    output = _sampler(model).infill(noised, BlockSamplerConfig(block_size=4, use_cache=use_cache))
    assert torch.equal(output.sequences[0], wanted)


def test_infilling_sees_no_later_block(make_model) -> None:
    sampler = _sampler(make_model("llada2_moe"))
    noised = torch.randint(0, 37, (1, 12), generator=torch.Generator().manual_seed(5))
    noised[0, 2:4] = MASK
    other = noised.clone()
    other[0, 4:] = (other[0, 4:] + 1) % 37
    config = BlockSamplerConfig(block_size=4)
    first, second = (sampler.infill(ids, config).sequences[0, :4] for ids in (noised, other))
    assert torch.equal(first, second)


def test_a_long_prompt_is_prefilled_in_parts(make_model, monkeypatch) -> None:
    sampler = _sampler(make_model("llada2_moe").double())
    prompt = torch.randint(0, 37, (31,), generator=torch.Generator().manual_seed(5)).tolist()
    config = BlockSamplerConfig(max_new_tokens=8, block_size=4)
    whole = sampler.sample([prompt, prompt[:9]], config).sequences
    monkeypatch.setattr("dllm.core.samplers.block.PREFILL_COLUMNS", 10)
    parts = sampler.sample([prompt, prompt[:9], prompt[:3]], config)
    assert torch.equal(parts.sequences[:2], whole)
    assert parts.cache_forwards is not None and parts.cache_forwards.tolist() == [4, 1, 0]  # 8 columns each


@pytest.mark.parametrize("name", ["steps", "threshold", "sub_blocks_and_threshold", "editing"])
def test_nfe_ends_with_the_answer(make_model, name: str) -> None:
    sampler, prompts = _sampler(make_model("llada2_moe").double()), _prompts()[:3]
    config = BlockSamplerConfig(max_new_tokens=11, block_size=4, **SETTINGS[name])
    whole = sampler.sample(prompts, config).answers
    assert whole is not None
    sampler.end_token_ids = [int(whole[0, 4]), int(whole[2, 2])]  # each the first of a block of three or four masks
    config = dataclasses.replace(config, early_stop=True)
    batch = sampler.sample(prompts, config)
    assert batch.answers is not None and batch.nfe is not None and batch.num_committed is not None
    num_cut = 0
    for row, prompt in enumerate(prompts):
        ids, steps = _naive(sampler.model, prompt, 11, 4, config, tuple(sampler.end_token_ids))
        length = next((i + 1 for i, token in enumerate(ids) if token in sampler.end_token_ids), 11)
        num_cut += MASK in ids[length : length + -(len(prompt) + length) % 4]  # of the block of the end
        assert batch.answers[row].tolist() == ids[:length] + [PAD] * (11 - length)
        assert (batch.nfe[row], batch.num_committed[row]) == (steps, length)
        single = sampler.sample([prompt], config)
        assert single.nfe is not None and single.nfe[0] == steps == single.batch_forwards
    assert (num_cut > 0) == (name != "editing")  # edits may still replace the end as long as its block is not done


def test_early_stop_cuts_an_answer_behind_its_end(make_model) -> None:
    sampler = _sampler(make_model("llada2_moe"))
    stopped = 0
    for seed in range(4):
        config = BlockSamplerConfig(max_new_tokens=22, block_size=4, temperature=2.0, seed=seed)
        whole = sampler.sample(_prompts(), config)
        ended = sampler.sample(_prompts(), dataclasses.replace(config, early_stop=True))
        assert whole.answers is not None and ended.answers is not None and ended.num_committed is not None
        assert whole.nfe is not None and ended.nfe is not None
        for row in range(len(_prompts())):
            answer = whole.answers[row].tolist()
            length = answer.index(EOS) + 1 if EOS in answer else 22
            assert ended.answers[row].tolist() == answer[:length] + [PAD] * (22 - length)
            assert ended.num_committed[row] == length
            shown = _prompts()[row] + answer[:length]
            assert ended.sequences[row].tolist() == (shown + [PAD] * 33)[: ended.sequences.shape[1]]
            stopped += int(ended.nfe[row] < whole.nfe[row])
    assert stopped > 0


def test_an_end_token_in_the_prompt_ends_nothing(make_model) -> None:
    sampler = _sampler(make_model("llada2_moe"))
    config = BlockSamplerConfig(max_new_tokens=10, block_size=4, suppress_tokens=(EOS,))
    for prompt in ([3, EOS, 5], [3, EOS, 5, 1, 2]):
        plain = sampler.sample([prompt], config)
        ended = sampler.sample([prompt], dataclasses.replace(config, early_stop=True))
        assert torch.equal(plain.sequences, ended.sequences)


def test_editing_replaces_tokens_of_the_answer_alone(make_model) -> None:
    sampler = _sampler(make_model("llada2_moe"))
    config = BlockSamplerConfig(
        max_new_tokens=14, block_size=8, steps_per_block=1, editing_threshold=0.0, max_post_steps=4, histories=True
    )
    output = sampler.sample(_prompts(), config)
    assert output.histories is not None
    replaced = False
    for before, after in zip(output.histories[:-1], output.histories[1:], strict=True):
        replaced |= bool(((before != after) & (before != MASK)).any())
    assert replaced
    for row, prompt in enumerate(_prompts()):
        for state in output.histories:
            assert state[row, : len(prompt)].tolist() == prompt
    assert torch.equal(output.histories[-1], output.sequences)


def test_block_size_follows_the_family(make_model) -> None:
    model = make_model("llada2_moe")
    config = BlockSamplerConfig(max_new_tokens=6, threshold=0.5)
    own = _sampler(model).sample(_prompts(), config).sequences
    named = _sampler(model).sample(_prompts(), dataclasses.replace(config, block_size=32)).sequences
    assert torch.equal(own, named)


@pytest.mark.parametrize("name", BLOCK_PRESETS)
def test_presets_are_settings(make_model, name: str) -> None:
    config = BlockSamplerConfig(**BLOCK_PRESETS[name])
    assert config.threshold is not None and (config.editing_threshold is None) == (config.sub_block_size == 8)
    assert _sampler(make_model("llada2_moe")).block_size(config) == 32


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 4},
        {"sub_block_size": 0},
        {"steps_per_block": 0},
        {"min_transfer": 0},
        {"threshold": 0.0},
        {"top_k": 0, "temperature": 1.0},
        {"top_p": 1.0, "temperature": 1.0},
        {"top_p": 0.5},
        {"editing_threshold": 1.5},
        {"editing_threshold": -0.1},
        {"max_post_steps": -1, "editing_threshold": 0.5},
        {"max_post_steps": 3},
        {"sub_block_size": 2.0},
        {"sub_block_size": True},
        {"steps_per_block": 1.5},
        {"min_transfer": 1.5},
        {"min_transfer": None},
        {"top_k": 3.0, "temperature": 1.0},
        {"max_post_steps": 2.0, "editing_threshold": 0.5},
        {"block_size": True},
        {"max_new_tokens": None},
    ],
)
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        BlockSamplerConfig(**settings)


def test_bad_input(make_model) -> None:
    sampler = _sampler(make_model("llada2_moe", max_position_embeddings=16))
    with pytest.raises(ValueError, match="at least one token"):
        sampler.sample([[]])
    with pytest.raises(ValueError, match="in whole blocks of 4, need 20 positions and the model has 16"):
        sampler.sample([[1] * 9], BlockSamplerConfig(max_new_tokens=8, block_size=4))
    with pytest.raises(ValueError, match="sub_block_size=3 does not divide block_size=4: choose a divisor"):
        sampler.sample([[1]], BlockSamplerConfig(max_new_tokens=4, block_size=4, sub_block_size=3))
    with pytest.raises(ValueError, match="sub_block_size=64 does not divide block_size=32"):
        sampler.sample([[1]], BlockSamplerConfig(max_new_tokens=4, sub_block_size=64))
    for settings, message in (
        ({"min_transfer": 9}, "min_transfer=9 has no effect beyond sub_block_size=8"),
        ({"steps_per_block": 3}, "steps_per_block=3 cannot be kept with sub_block_size=8: .* one of 4 sub-blocks"),
    ):
        config = BlockSamplerConfig(max_new_tokens=4, sub_block_size=8, **settings)
        with pytest.raises(ValueError, match=message):
            sampler.check_fit(config)  # the block size is the family's
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, block_size=32)
        sampler.check_fit(dataclasses.replace(config, sub_block_size=16, min_transfer=16))
    with pytest.raises(ValueError, match="padding at the end"):
        sampler.infill(torch.tensor([[1, MASK, 2]]), None, torch.tensor([[0, 1, 1]]))
    with pytest.raises(ValueError, match="early_stop has no effect"):
        sampler.infill(torch.tensor([[1, MASK]]), BlockSamplerConfig(early_stop=True))
    with pytest.raises(ValueError, match="2 seeds for 1 rows"):
        sampler.sample([[1]], BlockSamplerConfig(max_new_tokens=4, block_size=4, temperature=1.0), seeds=[1, 2])
