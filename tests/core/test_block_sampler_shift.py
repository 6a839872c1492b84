"""BlockSampler where the logit at a place predicts the next token: against a naive loop, cache on = off, a batch = its
singles."""

import dataclasses

import pytest
import torch

from dllm.core.attention import block_causal_mask
from dllm.core.samplers import BLOCK_PRESETS, BlockSampler, BlockSamplerConfig

MASK, PAD, EOS = 39, 38, 37
SIZE, NEW = 4, 11
# The family that is made so, and another one that is told to be.
FAMILIES = ["fast_dllm_v2", "llada2_moe"]


class _Tokenizer:
    special_tokens_map = {"mask_token": "<mask>", "pad_token": "<pad>", "eos_token": "<eos>"}

    def get_vocab(self) -> dict[str, int]:
        return {"<mask>": MASK, "<pad>": PAD, "<eos>": EOS}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.get_vocab()[token]


def _sampler(model) -> BlockSampler:
    sampler = BlockSampler(model, _Tokenizer())  # pyright: ignore
    sampler.spec = dataclasses.replace(sampler.spec, logit_shift=1)
    return sampler


def _prompts() -> list[list[int]]:
    """Inside a block, whole blocks, one block, one token."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 37, (length,), generator=generator).tolist() for length in (5, 8, 11, 4, 1, 12)]


@torch.no_grad()
def _predictions(model, ids: torch.Tensor) -> tuple[list[float], list[int]]:
    """(probability, token) that each place of `ids` [n] predicts for the place behind it; block-causal, no cache."""
    logits = model(input_ids=ids[None], attention_mask=block_causal_mask(len(ids), SIZE)).logits[0]
    logits[:, MASK] = -torch.inf
    best = torch.softmax(logits, dim=-1).max(dim=-1)
    return best.values.tolist(), best.indices.tolist()


def _has_ended(answer: list[int], ends: tuple[int, ...]) -> bool:
    """Whether one of `ends` stands in the answer with no mask before it."""
    first = next((token for token in answer if token == MASK or token in ends), MASK)
    return first != MASK


def _naive(
    model, prompt: list[int], config: BlockSamplerConfig, ends: tuple[int, ...] = ()
) -> tuple[list[int], int, int]:
    """(answer, denoising steps, forwards over finished blocks) of one prompt; it ends where one of `ends` does."""
    total = -((len(prompt) + NEW) // -SIZE) * SIZE
    ids = torch.tensor(prompt + [MASK] * (total - len(prompt)))
    num_steps = num_leads = 0
    part, share = config.sub_block_size or SIZE, config.steps_per_block or SIZE
    for start in range(len(prompt) // SIZE * SIZE, total, SIZE):
        if ids[start] == MASK:
            ids[start] = _predictions(model, ids[:start])[1][-1]
            num_leads += 1
        masks_at_first = sum(int(ids[i]) == MASK for i in range(start, start + SIZE))
        for step in range(SIZE):
            masked = [i for i in range(start, start + SIZE) if ids[i] == MASK]
            if not masked or _has_ended(ids[len(prompt) :].tolist(), ends):
                break
            probabilities, tokens = _predictions(model, ids[: start + SIZE])
            masked = [i for i in masked if i // part == masked[0] // part]
            masked.sort(key=lambda i: -probabilities[i - 1])
            count = masks_at_first // share + (step < masks_at_first % share)
            chosen = masked[: max(config.min_transfer, count)]
            if config.threshold is not None:
                chosen = [i for i in masked if i in chosen or probabilities[i - 1] > config.threshold]
            for i in chosen:
                ids[i] = tokens[i - 1]
            num_steps += 1
        if _has_ended(ids[len(prompt) :].tolist(), ends):
            break
    return ids[len(prompt) : len(prompt) + NEW].tolist(), num_steps, num_leads


SETTINGS = {
    "plain": {},
    "steps": {"steps_per_block": 2},
    "transfer": {"min_transfer": 2},
    "threshold": {"threshold": 0.2},
    "sub_blocks": {"sub_block_size": 2, "threshold": 0.2},
    "sub_blocks_and_steps": {"sub_block_size": 2, "steps_per_block": 2},
    "one_by_one": {"sub_block_size": 1},
}
DRAWN = {
    "temperature": {"temperature": 0.9, "sub_block_size": 2},
    "top_k": {"temperature": 1.2, "top_k": 3, "threshold": 0.3},
    "early_stop": {"temperature": 2.0, "early_stop": True, "sub_block_size": 2, "threshold": 0.1},
    "suppressed": {"suppress_tokens": (1, 2, 3), "threshold": 0.3},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_sample_equals_a_naive_loop(make_model, family: str, name: str) -> None:
    model = make_model(family).double()
    config = BlockSamplerConfig(max_new_tokens=NEW, block_size=SIZE, **SETTINGS[name])
    output = _sampler(model).sample(_prompts(), config)
    assert output.answers is not None and output.nfe is not None and output.cache_forwards is not None
    for row, prompt in enumerate(_prompts()):
        answer, steps, leads = _naive(model, prompt, config)
        assert output.answers[row].tolist() == answer
        assert output.nfe[row] == steps
        # Whole blocks of the prompt are computed in one forward, the last of them alone if the answer begins behind it.
        before = len(prompt) - SIZE if len(prompt) % SIZE == 0 else len(prompt) // SIZE
        assert output.cache_forwards[row] == leads + (before > 0)


@pytest.mark.parametrize("name", [*SETTINGS, *DRAWN])
def test_cache_and_batch_change_nothing(make_model, name: str) -> None:
    sampler = _sampler(make_model("fast_dllm_v2").double())  # float32 products vary with their shape
    config = BlockSamplerConfig(max_new_tokens=17, block_size=SIZE, **{**SETTINGS, **DRAWN}[name])
    batch = sampler.sample(_prompts(), config)
    without = sampler.sample(_prompts(), dataclasses.replace(config, use_cache=False))
    assert batch.answers is not None and batch.nfe is not None and batch.num_committed is not None
    assert batch.cache_forwards is not None and without.nfe is not None
    assert torch.equal(batch.sequences, without.sequences)
    assert torch.equal(batch.nfe, without.nfe)
    assert len(set(batch.nfe.tolist())) > 1
    for row, prompt in enumerate(_prompts()):
        single = sampler.sample([prompt], config)
        assert single.answers is not None and single.nfe is not None and single.num_committed is not None
        assert single.cache_forwards is not None
        assert batch.answers[row].tolist() == single.answers[0].tolist()
        assert batch.nfe[row] == single.nfe[0] == single.batch_forwards
        assert batch.cache_forwards[row] == single.cache_forwards[0]
        assert batch.num_committed[row] == single.num_committed[0]


@pytest.mark.parametrize("name", ["plain", "sub_blocks"])
def test_nfe_ends_with_the_answer(make_model, name: str) -> None:
    sampler, prompts = _sampler(make_model("fast_dllm_v2").double()), _prompts()[:3]
    config = BlockSamplerConfig(max_new_tokens=NEW, block_size=SIZE, **SETTINGS[name])
    whole = sampler.sample(prompts, config).answers
    assert whole is not None
    # The second of a block, and one that a finished block's last logit gives.
    sampler.end_token_ids = [int(whole[0, 4]), int(whole[2, 1])]
    config = dataclasses.replace(config, early_stop=True)
    batch = sampler.sample(prompts, config)
    assert batch.answers is not None and batch.nfe is not None and batch.cache_forwards is not None
    num_cut = 0
    for row, prompt in enumerate(prompts):
        ids, steps, leads = _naive(sampler.model, prompt, config, tuple(sampler.end_token_ids))
        length = next((i + 1 for i, token in enumerate(ids) if token in sampler.end_token_ids), NEW)
        num_cut += MASK in ids[length : length + -(len(prompt) + length) % SIZE]  # of the block of the end
        assert batch.answers[row].tolist() == ids[:length] + [PAD] * (NEW - length)
        before = len(prompt) - SIZE if len(prompt) % SIZE == 0 else len(prompt) // SIZE
        assert (batch.nfe[row], batch.cache_forwards[row]) == (steps, leads + (before > 0))
        single = sampler.sample([prompt], config)
        assert single.nfe is not None and single.nfe[0] == steps
    assert num_cut > 0


def test_early_stop_cuts_an_answer_behind_its_end(make_model) -> None:
    sampler = _sampler(make_model("fast_dllm_v2").double())
    stopped = 0
    for seed in range(4):
        config = BlockSamplerConfig(max_new_tokens=22, block_size=SIZE, temperature=2.0, seed=seed, sub_block_size=2)
        whole = sampler.sample(_prompts(), config)
        ended = sampler.sample(_prompts(), dataclasses.replace(config, early_stop=True))
        assert whole.answers is not None and ended.answers is not None
        assert whole.nfe is not None and ended.nfe is not None
        for row in range(len(_prompts())):
            answer = whole.answers[row].tolist()
            length = answer.index(EOS) + 1 if EOS in answer else 22
            assert ended.answers[row].tolist() == answer[:length] + [PAD] * (22 - length)
            stopped += int(ended.nfe[row] < whole.nfe[row])
    assert stopped > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"threshold": 0.2, "sub_block_size": 2}, {"temperature": 0.8}])
def test_infilling(make_model, family: str, settings: dict) -> None:
    sampler = _sampler(make_model(family).double())
    noised = torch.randint(0, 37, (5, 18), generator=torch.Generator().manual_seed(5))
    noised[0, 1:9] = MASK
    noised[1, [2, 15]] = MASK  # two blocks without masks between them
    noised[2, 8:] = MASK  # row 3 has nothing to fill in
    noised[4, [4, 12, 13]] = MASK  # the first of a block and nothing else, a block without masks, a block's first two
    real = torch.ones_like(noised)
    real[1, 17:] = 0
    config = BlockSamplerConfig(block_size=SIZE, **settings)
    batch = sampler.infill(noised, config, real)
    without = sampler.infill(noised, dataclasses.replace(config, use_cache=False), real)
    assert torch.equal(batch.sequences, without.sequences)
    assert not (batch.sequences == MASK).any()
    assert torch.equal(batch.sequences[noised != MASK], noised[noised != MASK])
    assert batch.nfe is not None and without.nfe is not None and torch.equal(batch.nfe, without.nfe)
    assert int(batch.nfe[4]) == 1  # two of its three masks are the first ones of their blocks
    assert batch.cache_forwards is not None and int(batch.cache_forwards[3]) == 0
    for row in range(5):
        length = int(real[row].sum())
        single = sampler.infill(noised[row : row + 1, :length], config)
        assert torch.equal(batch.sequences[row, :length], single.sequences[0])
        assert single.nfe is not None and batch.nfe[row] == single.nfe[0]
        assert single.cache_forwards is not None and batch.cache_forwards[row] == single.cache_forwards[0]


def test_every_step_sees_one_block(make_model) -> None:
    model = make_model("fast_dllm_v2")
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    output = _sampler(model).sample(_prompts()[5:], BlockSamplerConfig(max_new_tokens=8, block_size=SIZE))
    # 12 tokens: two blocks at once; then for each of two blocks the one before it, and a step per mask that is left.
    assert widths == [8] + [4] * (1 + 3) * 2
    assert output.nfe is not None and output.nfe.tolist() == [6]
    assert output.cache_forwards is not None and output.cache_forwards.tolist() == [3]


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_blocks_of_one_token_are_decoded_from_left_to_right(make_model, use_cache: bool) -> None:
    model = make_model("fast_dllm_v2").double()
    config = BlockSamplerConfig(max_new_tokens=6, block_size=1, use_cache=use_cache)
    output = _sampler(model).sample(_prompts()[:5], config)
    assert output.answers is not None and output.nfe is not None and output.cache_forwards is not None
    for row, prompt in enumerate(_prompts()[:5]):
        ids = torch.tensor(prompt)
        for _ in range(6):
            logits = model(input_ids=ids[None], attention_mask=block_causal_mask(len(ids), 1)).logits[0, -1]
            logits[MASK] = -torch.inf
            ids = torch.cat([ids, logits.argmax()[None]])
        assert output.answers[row].tolist() == ids[len(prompt) :].tolist()
        # One token per denoising forward; the prompt without its last token is computed before.
        assert (output.nfe[row], output.cache_forwards[row]) == (6, use_cache and len(prompt) > 1)
    assert output.tokens_per_forward.tolist() == [1.0] * 5 and output.batch_forwards == 6


def test_sub_blocks_are_filled_in_from_left_to_right(make_model) -> None:
    sampler = _sampler(make_model("fast_dllm_v2").double())
    config = BlockSamplerConfig(max_new_tokens=16, block_size=8, sub_block_size=2, histories=True)
    output = sampler.sample([_prompts()[0], _prompts()[1]], config)
    assert output.histories is not None
    for row, length in enumerate((5, 8)):
        for state in output.histories:
            masked = (state[row, : length + 16] == MASK).nonzero()[:, 0].tolist()
            # Behind the first sub-block with masks nothing is filled in but what a finished block's logits gave.
            assert not masked or all(i in masked for i in range(masked[0] // 2 * 2 + 2, length + 16))
    whole = dataclasses.replace(config, sub_block_size=8)
    assert torch.equal(
        sampler.sample(_prompts(), whole).sequences,
        sampler.sample(_prompts(), dataclasses.replace(whole, sub_block_size=None)).sequences,
    )


def test_the_preset_decodes_the_family(make_model) -> None:
    sampler = _sampler(make_model("fast_dllm_v2").double())
    config = BlockSamplerConfig(**BLOCK_PRESETS["fast_dllm_v2"], max_new_tokens=40)
    output = sampler.sample(_prompts(), config)
    assert output.answers is not None and not (output.answers == MASK).any()
    assert torch.equal(
        output.sequences, sampler.sample(_prompts(), dataclasses.replace(config, use_cache=False)).sequences
    )


def test_editing_is_refused(make_model) -> None:
    with pytest.raises(ValueError, match="drop editing_threshold"):
        _sampler(make_model("fast_dllm_v2")).sample([[1]], BlockSamplerConfig(editing_threshold=0.5))
