import dataclasses

import pytest
import torch
from transformers import DynamicCache

from dllm.core.samplers import MDLM_PRESETS, BlockSamplerConfig, MDLMSampler, MDLMSamplerConfig
from dllm.models.backbone import DiffusionLMOutput

MASK, PAD, EOS = 39, 38, 37


class _Tokenizer:
    special_tokens_map = {"mask_token": "<mask>", "pad_token": "<pad>", "eos_token": "<eos>"}

    def get_vocab(self) -> dict[str, int]:
        return {"<mask>": MASK, "<pad>": PAD, "<eos>": EOS}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.get_vocab()[token]


def _sampler(model) -> MDLMSampler:
    return MDLMSampler(model, _Tokenizer())  # pyright: ignore


def _noised() -> torch.Tensor:
    ids = torch.randint(0, 37, (3, 9), generator=torch.Generator().manual_seed(2))
    ids[0, 4:] = MASK
    ids[1, 2] = MASK  # row 2 has nothing to fill in
    return ids


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 37, (length,), generator=generator).tolist() for length in (5, 2, 7)]


def _logits(model, ids: torch.Tensor, shift: int) -> torch.Tensor:
    """Logits [L, V] that predict each token of `ids` [L], the mask token excluded; a naive full forward."""
    logits = model(input_ids=ids[None]).logits[0]
    logits = torch.cat([logits[:1]] * shift + [logits[: len(logits) - shift]])
    logits[:, MASK] = -torch.inf
    return logits


@torch.no_grad()
def _naive(model, prompt: list[int], new: int, block_size: int, steps: int, scale: float, shift: int) -> torch.Tensor:
    """Greedy decoding of one prompt, one token at a time inside a step."""
    given = torch.arange(len(prompt) + new) < len(prompt)
    ids = torch.tensor(prompt + [MASK] * new)
    num_blocks = -(-new // block_size)
    for block in range(num_blocks):
        start = len(prompt) + block * block_size
        end = min(start + block_size, len(ids))
        own = steps // num_blocks + (block < steps % num_blocks)
        own = min(own, end - start)
        for step in range(own):
            logits = _logits(model, ids, shift)
            if scale:
                blank = torch.where(given, MASK, ids)
                free = model(input_ids=blank[None]).logits[0]
                free = torch.cat([free[:1]] * shift + [free[: len(free) - shift]])
                logits = free + (1 + scale) * (logits - free)
                logits[:, MASK] = -torch.inf
            best = torch.softmax(logits, dim=-1).max(dim=-1)
            masked = [i for i in range(start, end) if ids[i] == MASK]
            masked.sort(key=lambda i: -float(best.values[i]))
            count = (end - start) // own + (step < (end - start) % own)
            for i in masked[:count]:
                ids[i] = best.indices[i]
    return ids


@pytest.mark.parametrize("remasking", ["low_confidence", "random", "margin", "entropy"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_fills_every_mask_and_touches_nothing_else(make_model, remasking: str, temperature: float) -> None:
    sampler = _sampler(make_model())
    noised = _noised()
    config = MDLMSamplerConfig(steps=3, temperature=temperature, remasking=remasking)  # pyright: ignore
    filled = sampler.infill(noised, config)
    assert not (filled.sequences == MASK).any()
    assert torch.equal(filled.sequences[noised != MASK], noised[noised != MASK])
    assert torch.equal(filled.sequences, sampler.infill(noised, config).sequences)
    assert filled.nfe is not None and filled.nfe.tolist() == [3, 1, 0]
    assert filled.num_committed is not None and filled.num_committed.tolist() == [5, 1, 0]
    assert filled.tokens_per_forward.tolist() == pytest.approx([5 / 3, 1, 0])


@pytest.mark.parametrize("family", ["llada", "llada_moe"])
@pytest.mark.parametrize(
    ("block_size", "steps", "scale", "shift"),
    [(11, 11, 0, 0), (4, 11, 0, 0), (4, 5, 0, 0), (4, 3, 0.5, 0), (11, 4, 0, 1), (3, 6, 0.8, 1)],
)
def test_sample_equals_a_naive_loop(make_model, family: str, block_size, steps, scale, shift) -> None:
    model = make_model(family).double()
    sampler = _sampler(model)
    sampler.spec = dataclasses.replace(sampler.spec, logit_shift=shift)
    config = MDLMSamplerConfig(max_new_tokens=11, block_size=block_size, steps=steps, cfg_scale=scale)
    output = sampler.sample(_prompts(), config)
    for row, prompt in enumerate(_prompts()):
        wanted = _naive(model, prompt, 11, block_size, steps, scale, shift)
        assert output.sequences[row, : len(wanted)].tolist() == wanted.tolist()
        assert (output.sequences[row, len(wanted) :] == PAD).all()
        assert output.answers is not None
        assert output.answers[row].tolist() == wanted[len(prompt) :].tolist()


SETTINGS = {
    "plain": {"steps": 8},
    "one_block": {"block_size": None, "steps": 5},
    "threshold": {"threshold": 0.1},
    "threshold_and_steps": {"threshold": 0.2, "steps": 6},
    "temperature": {"temperature": 0.9},
    "random": {"remasking": "random", "steps": 6},
    "margin": {"remasking": "margin", "steps": 6},
    "entropy": {"remasking": "entropy", "temperature": 0.4},
    "guided": {"cfg_scale": 0.7, "steps": 6},
    "early_stop": {"early_stop": True, "temperature": 1.5},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual", "early_stop": True, "temperature": 1.5},
    "dual_guided": {"cache": "dual", "cfg_scale": 0.7, "threshold": 0.1},
    "suppressed": {"suppress_tokens": (1, 2, 3, 4, 5), "steps": 6},
}


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("family", ["llada", "llada_moe"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_equals_its_singles(make_model, family: str, name: str, shift: int) -> None:
    sampler = _sampler(make_model(family).double())  # float32 products vary with their shape
    sampler.spec = dataclasses.replace(sampler.spec, logit_shift=shift)
    config = MDLMSamplerConfig(**{"max_new_tokens": 13, "block_size": 4, **SETTINGS[name]})
    prompts = [*_prompts(), _prompts()[0][:1]]
    batch = sampler.sample(prompts, config)
    backwards = sampler.sample(prompts[::-1], config)
    assert batch.answers is not None and batch.nfe is not None and batch.num_committed is not None
    assert backwards.answers is not None
    for row, prompt in enumerate(prompts):
        single = sampler.sample([prompt], config)
        assert single.answers is not None and single.nfe is not None and single.num_committed is not None
        assert batch.answers[row].tolist() == single.answers[0].tolist()
        assert backwards.answers[-1 - row].tolist() == single.answers[0].tolist()
        assert batch.nfe[row] == single.nfe[0]
        assert batch.num_committed[row] == single.num_committed[0]
        assert batch.sequences[row, : len(prompt) + 13].tolist() == single.sequences[0].tolist()


@pytest.mark.parametrize("settings", [{"steps": 4}, {"temperature": 0.8, "block_size": 4}])
def test_infilling_a_batch_equals_its_singles(make_model, settings: dict) -> None:
    sampler = _sampler(make_model().double())
    noised = torch.randint(0, 37, (3, 12), generator=torch.Generator().manual_seed(5))
    noised[0, 1:9] = MASK
    noised[1, 5] = MASK
    noised[2, 8:] = MASK
    config = MDLMSamplerConfig(**settings)
    batch = sampler.infill(noised, config)
    for row in range(3):
        single = sampler.infill(noised[row : row + 1], config)
        assert torch.equal(batch.sequences[row : row + 1], single.sequences)
        assert batch.nfe is not None and single.nfe is not None and batch.nfe[row] == single.nfe[0]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "block_size": 4}, {"threshold": 0.2}])
def test_infilling_ignores_what_is_padding(make_model, settings: dict) -> None:
    sampler = _sampler(make_model().double())
    noised = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(5))
    noised[0, 3:7] = MASK
    noised[1, 8:] = MASK
    real = torch.ones_like(noised)
    real[0, 10:] = 0
    noised[0, 10:] = MASK  # hidden, so nothing to fill in
    output = sampler.infill(noised, MDLMSamplerConfig(**settings), real)
    single = sampler.infill(noised[:1, :10], MDLMSamplerConfig(**settings))
    assert torch.equal(output.sequences[:1, :10], single.sequences)
    assert (output.sequences[0, 10:] == MASK).all()
    assert output.num_committed is not None and output.num_committed.tolist() == [4, 4]
    assert output.nfe is not None and single.nfe is not None and output.nfe[0] == single.nfe[0]


@torch.no_grad()
def test_guidance_of_infilling_hides_all_given_tokens(make_model) -> None:
    model = make_model().double()
    noised = _noised()[:1]
    given = noised[0] != MASK
    wanted = noised[0].clone()
    for _ in range(int((~given).sum())):
        free = model(input_ids=torch.where(given, MASK, wanted)[None]).logits[0]
        logits = free + 1.6 * (model(input_ids=wanted[None]).logits[0] - free)
        logits[:, MASK] = -torch.inf
        best = torch.softmax(logits, dim=-1).max(dim=-1)
        place = int(torch.where(wanted == MASK, best.values, -1.0).argmax())
        wanted[place] = best.indices[place]
    output = _sampler(model).infill(noised, MDLMSamplerConfig(cfg_scale=0.6))
    assert torch.equal(output.sequences[0], wanted)
    assert output.nfe is not None and output.nfe.tolist() == [10]


@torch.no_grad()
def _naive_cached(model, prompt: list[int], new: int, block_size: int, dual: bool) -> torch.Tensor:
    """Fast-dLLM's decoding with one token per step, with transformers' own cache."""
    ids = torch.tensor([prompt + [MASK] * new])
    for start in range(len(prompt), ids.shape[1], block_size):
        end = min(start + block_size, ids.shape[1])
        full = DynamicCache()
        logits = model(input_ids=ids, past_key_values=full).logits[0, start:end]
        for _ in range(end - start):
            logits[:, MASK] = -torch.inf
            best = torch.softmax(logits, dim=-1).max(dim=-1)
            masked = ids[0, start:end] == MASK
            place = int(torch.where(masked, best.values, -1.0).argmax())
            ids[0, start + place] = best.indices[place]
            old = DynamicCache()
            for index, layer in enumerate(full.layers):
                assert layer.keys is not None and layer.values is not None
                parts = [slice(0, start), slice(end, None)] if dual else [slice(0, start)]
                keys, values = (torch.cat([x[:, :, p] for p in parts], dim=2) for x in (layer.keys, layer.values))
                old.update(keys, values, index)
            last = end if dual else ids.shape[1]
            # Attention does not care in which order the keys stand: they carry their positions.
            logits = model(
                input_ids=ids[:, start:last], position_ids=torch.arange(start, last)[None], past_key_values=old
            ).logits[0, : end - start]
    return ids[0]


@pytest.mark.parametrize("family", ["llada", "llada_moe"])
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_caches_equal_a_naive_loop(make_model, family: str, kind: str) -> None:
    model = make_model(family).double()
    config = MDLMSamplerConfig(max_new_tokens=10, block_size=4, cache=kind)  # pyright: ignore
    plain = MDLMSamplerConfig(max_new_tokens=10, block_size=4)
    differs = False
    for prompt in _prompts():
        output = _sampler(model).sample([prompt], config)
        assert output.sequences[0].tolist() == _naive_cached(model, prompt, 10, 4, kind == "dual").tolist()
        differs |= not torch.equal(output.sequences, _sampler(model).sample([prompt], plain).sequences)
    assert differs  # the caches are approximate, and these prompts show it


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_cache_that_is_never_read_changes_nothing(make_model, kind: str) -> None:
    sampler = _sampler(make_model().double())
    settings = {"max_new_tokens": 12, "block_size": 4, "steps": 3}  # one step per block
    cached = sampler.sample(_prompts(), MDLMSamplerConfig(**settings, cache=kind))  # pyright: ignore
    assert torch.equal(cached.sequences, sampler.sample(_prompts(), MDLMSamplerConfig(**settings)).sequences)


def _counting(model) -> list[torch.Size]:
    """Notes the shape of the logits of every forward of `model`."""
    seen: list[torch.Size] = []
    original = model.forward

    def forward(**inputs) -> DiffusionLMOutput:
        output = original(**inputs)
        seen.append(output.logits.shape)
        return output

    model.forward = forward
    return seen


def test_head_sees_only_what_can_still_change(make_model) -> None:
    model = make_model()
    seen = _counting(model)
    _sampler(model).infill(_noised(), MDLMSamplerConfig(steps=2))
    # Row 0 has 5 masks and commits 3, then 2; every row brings as many candidates as the fullest one.
    assert seen == [(15, 40), (6, 40)]
    del seen[:]
    _sampler(model).sample(_prompts()[:1], MDLMSamplerConfig(max_new_tokens=6, block_size=4, steps=4))
    assert seen == [(4, 40), (2, 40), (2, 40), (1, 40)]


@pytest.mark.parametrize("scale", [0.0, 0.5])
@pytest.mark.parametrize("threshold", [None, 0.05])
def test_nfe_counts_the_forwards(make_model, scale: float, threshold: float | None) -> None:
    model = make_model()
    seen = _counting(model)
    config = MDLMSamplerConfig(max_new_tokens=9, block_size=5, cfg_scale=scale, threshold=threshold)
    output = _sampler(model).sample(_prompts()[:1], config)
    assert output.nfe is not None and output.nfe.tolist() == [len(seen)]
    if threshold is None:
        assert len(seen) == 9 * (2 if scale else 1)


def test_steps_beyond_the_number_of_masks_cost_nothing(make_model) -> None:
    sampler = _sampler(make_model())
    few = sampler.sample(_prompts(), MDLMSamplerConfig(max_new_tokens=6))
    many = sampler.sample(_prompts(), MDLMSamplerConfig(max_new_tokens=6, steps=500))
    assert torch.equal(few.sequences, many.sequences)
    assert many.nfe is not None and many.nfe.tolist() == [6, 6, 6]


def test_threshold_commits_what_is_sure_enough(make_model) -> None:
    sampler = _sampler(make_model())
    settings = {"max_new_tokens": 8, "block_size": 4}
    at_once = sampler.sample(_prompts(), MDLMSamplerConfig(**settings, threshold=1e-6))
    assert at_once.nfe is not None and at_once.nfe.tolist() == [2, 2, 2]
    never = sampler.sample(_prompts(), MDLMSamplerConfig(**settings, threshold=1.0))
    assert torch.equal(never.sequences, sampler.sample(_prompts(), MDLMSamplerConfig(**settings)).sequences)
    both = sampler.sample(_prompts(), MDLMSamplerConfig(**settings, threshold=1.0, steps=4))
    assert both.nfe is not None and both.nfe.tolist() == [4, 4, 4]


def test_early_stop_keeps_the_answer_up_to_its_end(make_model) -> None:
    model = make_model()
    sampler = _sampler(model)
    settings = {"max_new_tokens": 24, "block_size": 4, "temperature": 2.0}
    stopped_early = 0
    for seed in range(12):
        config = MDLMSamplerConfig(**settings, seed=seed)
        whole = sampler.sample(_prompts(), config)
        ended = sampler.sample(_prompts(), dataclasses.replace(config, early_stop=True))
        assert whole.answers is not None and ended.answers is not None
        assert whole.nfe is not None and ended.nfe is not None and ended.num_committed is not None
        for row in range(3):
            answer = whole.answers[row].tolist()
            length = answer.index(EOS) + 1 if EOS in answer else 24
            assert ended.answers[row].tolist() == answer[:length] + [PAD] * (24 - length)
            assert ended.num_committed[row] == length
            assert ended.nfe[row] <= whole.nfe[row]
            stopped_early += int(ended.nfe[row] < whole.nfe[row])
    assert stopped_early > 0


def test_masks_in_a_prompt_stay(make_model) -> None:
    sampler = _sampler(make_model())
    prompts = [[3, MASK, 5, MASK], [MASK]]
    output = sampler.sample(prompts, MDLMSamplerConfig(max_new_tokens=6, steps=3))
    assert output.answers is not None and not (output.answers == MASK).any()
    assert output.sequences[0, :4].tolist() == prompts[0]
    assert output.sequences[1, :1].tolist() == prompts[1]


def test_suppressed_tokens_are_never_proposed(make_model) -> None:
    sampler = _sampler(make_model())
    noised = _noised()
    masked = noised == MASK
    first = set(sampler.infill(noised).sequences[masked].tolist())
    config = MDLMSamplerConfig(suppress_tokens=tuple(first))
    assert not first & set(sampler.infill(noised, config).sequences[masked].tolist())


def test_draws_follow_from_seed_and_prompt(make_model) -> None:
    sampler = _sampler(make_model())
    prompt = _prompts()[0]
    config = MDLMSamplerConfig(max_new_tokens=12, temperature=1.0)
    torch.manual_seed(1)
    first = sampler.sample([prompt, prompt], config).answers
    torch.manual_seed(2)
    assert first is not None and torch.equal(first, sampler.sample([prompt, prompt], config).answers)  # pyright: ignore
    assert torch.equal(first[0], first[1])
    several = sampler.sample([prompt, prompt], config, seeds=[1, 2]).answers
    other = sampler.sample([prompt], dataclasses.replace(config, seed=7)).answers
    assert several is not None and other is not None
    assert not torch.equal(several[0], several[1])
    assert not torch.equal(other[0], first[0])


def test_nothing_is_drawn_without_a_temperature(make_model) -> None:
    sampler = _sampler(make_model())
    before = torch.get_rng_state()
    sampler.sample(_prompts(), MDLMSamplerConfig(max_new_tokens=4, temperature=0.5))
    assert torch.equal(before, torch.get_rng_state())
    config = MDLMSamplerConfig(max_new_tokens=4)
    one = sampler.sample(_prompts(), config, seeds=[1, 2, 3]).sequences
    assert torch.equal(one, sampler.sample(_prompts(), config).sequences)


def test_histories_and_observer_show_every_state(make_model) -> None:
    sampler = _sampler(make_model())
    shown: list[torch.Tensor] = []
    config = MDLMSamplerConfig(max_new_tokens=6, block_size=3, histories=True)
    output = sampler.sample(_prompts(), config, on_step=shown.append)
    assert output.histories is not None and len(output.histories) == len(shown) == 6
    for step, (state, seen) in enumerate(zip(output.histories, shown, strict=True)):
        assert torch.equal(state, seen)
        assert (state == MASK).sum(dim=1).tolist() == [5 - step] * 3
        kept = state != MASK
        assert torch.equal(state[kept], output.sequences[kept])  # committed tokens never change
    assert torch.equal(shown[-1], output.sequences)


@pytest.mark.parametrize("name", MDLM_PRESETS)
def test_presets_are_settings(name: str) -> None:
    assert MDLMSamplerConfig(**MDLM_PRESETS[name]) != MDLMSamplerConfig()


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"temperature": -1.0},
        {"remasking": "best"},
        {"max_new_tokens": 0},
        {"block_size": 0},
        {"threshold": 0.0},
        {"threshold": 1.5},
        {"threshold": 0.5, "remasking": "entropy"},
        {"cfg_scale": -0.1},
        {"cache": "triple"},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"cfg_scale": float("nan")},
        {"cfg_scale": float("inf")},
        {"max_new_tokens": 4.0},
        {"block_size": 2.5},
    ],
)
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        MDLMSamplerConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"suppress_tokens": (40,)}, "suppress_tokens holds 40, the model knows 0 to 39"),
        ({"suppress_tokens": (-1,)}, "suppress_tokens holds -1"),
        ({"suppress_tokens": tuple(range(39))}, "leaves no token"),
    ],
)
def test_settings_that_do_not_fit_the_model(make_model, settings: dict, said: str) -> None:
    sampler = _sampler(make_model())
    for call in (lambda config: sampler.sample([[1]], config), lambda config: sampler.infill(_noised(), config)):
        with pytest.raises(ValueError, match=said):
            call(MDLMSamplerConfig(max_new_tokens=2, **settings))


def test_the_end_of_a_turn_ends_an_answer(make_model) -> None:
    class Tokenizer(_Tokenizer):
        def get_vocab(self) -> dict[str, int]:
            return {**super().get_vocab(), "<|role_end|>": 36}

    sampler = MDLMSampler(make_model(), Tokenizer())  # pyright: ignore
    assert sampler.end_token_ids == [36, EOS]
    everything_else = tuple(token for token in range(39) if token != 36)
    config = MDLMSamplerConfig(max_new_tokens=5, suppress_tokens=everything_else, early_stop=True)
    answers = sampler.sample([[1, 2]], config).answers
    assert answers is not None and answers.tolist() == [[36, PAD, PAD, PAD, PAD]]


def test_each_step_draws_anew(make_model) -> None:
    # Logits that never change: a position keeps its proposal from step to step unless the draws are new ones.
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    config = MDLMSamplerConfig(max_new_tokens=30, steps=30, temperature=1.0, remasking="random")
    once = MDLMSamplerConfig(max_new_tokens=30, steps=1, temperature=1.0, remasking="random")
    answers = [_sampler(model).sample([[1, 2]], settings).answers for settings in (config, once)]
    assert answers[0] is not None and answers[1] is not None
    assert int((answers[0] == answers[1]).sum()) < 15  # by chance 1 in 39, and one more from the first step


def test_bad_input(make_model) -> None:
    sampler = _sampler(make_model(max_position_embeddings=30))
    with pytest.raises(ValueError, match="at least one token"):
        sampler.sample([[1], []])
    with pytest.raises(ValueError, match="at least one token"):
        sampler.sample([])
    with pytest.raises(ValueError, match="steps=2 is less than the 3 blocks"):
        sampler.sample(_prompts(), MDLMSamplerConfig(max_new_tokens=6, block_size=2, steps=2))
    for wrong in ([[40]], [[-1, 3]]):
        with pytest.raises(ValueError, match="token ids from"):
            sampler.sample(wrong)
    with pytest.raises(ValueError, match="need 31 positions and the model has 30"):
        sampler.sample([[1] * 21], MDLMSamplerConfig(max_new_tokens=10))
    with pytest.raises(ValueError, match="1 seeds for 2 rows"):
        sampler.sample([[1], [2]], MDLMSamplerConfig(max_new_tokens=2), seeds=[1])
    with pytest.raises(ValueError, match="takes a MDLMSamplerConfig, got a BlockSamplerConfig"):
        sampler.sample([[1]], BlockSamplerConfig())
    with pytest.raises(ValueError, match=r"shape \[rows, length\], got \[4\]"):
        sampler.infill(torch.tensor([1, 2, MASK, 3]))
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 2\], expected \[1, 3\]"):
        sampler.infill(torch.tensor([[1, MASK, 3]]), None, torch.ones(1, 2))
    with pytest.raises(ValueError, match="padding at the end"):
        sampler.infill(torch.tensor([[1, MASK, 3]]), None, torch.tensor([[0, 1, 1]]))
    with pytest.raises(ValueError, match="early_stop has no effect"):
        sampler.infill(_noised(), MDLMSamplerConfig(early_stop=True))
    sampler.spec = dataclasses.replace(sampler.spec, logit_shift=1)
    with pytest.raises(ValueError, match="first token of a row is masked"):
        sampler.infill(torch.tensor([[MASK, 3]]))
