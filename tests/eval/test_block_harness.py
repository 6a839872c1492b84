"""The harness over BlockSampler, and likelihoods block by block, against enumeration and the sampler used by hand. A
float64 model: in float32 products of other sizes round in another way."""

import dataclasses
import itertools
import pathlib
import re

import pytest
import torch
from lm_eval.api.instance import Instance

from dllm.core.attention import block_causal_mask
from dllm.core.eval import BlockEvalConfig, BlockEvalHarness
from dllm.core.eval.config import parse_model_args
from dllm.core.eval.likelihood import Item, Scorer, greedy_matches, item_blocks, item_states, log_likelihoods
from dllm.core.noising import make_generator
from dllm.core.samplers import BLOCK_PRESETS, BlockSampler, BlockSamplerConfig
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.parsing import InputError

MASK, PAD = 39, 38
FAMILIES = ["llada", "llada2_moe"]
# Contexts that end inside a block, at its end, and before the first one's end; targets over one, two and four blocks.
ITEMS = [
    Item((4, 5, 6), (7, 8, 9)),
    Item((1, 2, 3, 4, 5, 6, 7, 8), (5, 4, 3, 2)),
    Item((1,), (2, 3)),
    Item((9, 8, 7, 6, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)),
]


@pytest.fixture
def scorer(make_model):
    def make(family: str = "llada2_moe", **settings) -> Scorer:
        return Scorer(make_model(family).double(), MASK, PAD, **{"block_size": 4, **settings})

    return make


def _log_probability(scorer: Scorer, seen: list[int], masked: list[int]) -> float:
    """Sum of log p of the tokens at `masked`, of a row of which nothing more is seen; one plain forward."""
    ids = torch.tensor(seen)
    ids[masked] = MASK
    assert scorer.block_size is not None
    mask = block_causal_mask(len(ids), scorer.block_size)
    log_p = scorer.lm(ids[None], attention_mask=mask).logits[0].log_softmax(-1)
    return sum(float(log_p[place, seen[place]]) for place in masked)


@torch.no_grad()
def _bound(scorer: Scorer, item: Item) -> float:
    """Block by block: mean over k, over the subsets of k of the block's tokens, of (T / k) * their log-probability."""
    row, start = [*item.context, *item.target], len(item.context)
    places = range(start, len(row))
    total = 0.0
    for _, group in itertools.groupby(places, key=lambda place: place // scorer.block_size):
        own = list(group)
        for k in range(1, len(own) + 1):
            subsets = list(itertools.combinations(own, k))
            values = [_log_probability(scorer, row[: own[-1] + 1], list(subset)) for subset in subsets]
            total += sum(values) / (len(values) * k)
    return total


# Likelihoods.


def test_parts_of_a_target_end_where_blocks_do() -> None:
    parts = item_blocks(ITEMS[3], 4)
    assert [len(part.context) for part in parts] == [5, 8, 12]
    assert [part.target for part in parts] == [(1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert all(
        part.context + part.target == (9, 8, 7, 6, 5, 1, 2, 3, 4, 5, 6, 7, 8, 9)[:n]
        for part, n in zip(parts, (8, 12, 14), strict=True)
    )
    assert item_blocks(ITEMS[1], 4) == [ITEMS[1]] and item_blocks(ITEMS[3], None) == [ITEMS[3]]
    assert item_blocks(Item((1, 2), ()), 4) == item_blocks(Item((1, 2), ()), None) == []
    assert item_states(ITEMS[3], 10, 4) == 7 + 10 + 3 and item_states(ITEMS[3], 10, None) == 10


@pytest.mark.parametrize("family", FAMILIES)
def test_with_enough_states_the_likelihood_is_the_bound_itself(scorer, family) -> None:
    model = scorer(family, batch_size=3)
    values = log_likelihoods(model, ITEMS, mc_num=15, seed=0)
    for item, value in zip(ITEMS, values, strict=True):
        assert value == pytest.approx(_bound(model, item), abs=1e-9)


def test_drawn_states_give_the_bound_on_average(scorer) -> None:
    model = scorer(batch_size=64)
    item = ITEMS[3]
    drawn = torch.tensor([log_likelihoods(model, [item], mc_num=3, seed=seed)[0] for seed in range(60)])
    error = float(drawn.std()) / len(drawn) ** 0.5
    assert 0 < error < 0.05 * abs(float(drawn.mean()))
    assert abs(float(drawn.mean()) - _bound(model, item)) < 4 * error


def test_blocks_of_one_token_are_the_chain_rule(scorer) -> None:
    model = scorer(block_size=1)
    item = ITEMS[3]
    row, start = [*item.context, *item.target], len(item.context)
    with torch.no_grad():
        expected = sum(_log_probability(model, row[: place + 1], [place]) for place in range(start, len(row)))
    assert log_likelihoods(model, [item], mc_num=1, seed=5) == [pytest.approx(expected, abs=1e-9)]


def test_one_block_for_all_is_full_attention(scorer) -> None:
    block, full = scorer(block_size=14, batch_size=16), scorer(block_size=None, batch_size=16)
    for mc_num in (5, 20):
        assert log_likelihoods(block, ITEMS, mc_num, 3) == log_likelihoods(full, ITEMS, mc_num, 3)
    assert greedy_matches(block, ITEMS) == greedy_matches(full, ITEMS)
    several = scorer(block_size=4, batch_size=16)
    assert log_likelihoods(several, ITEMS[:1], 7, 0) != pytest.approx(log_likelihoods(full, ITEMS[:1], 7, 0), abs=1e-3)


def test_a_batch_of_states_equals_states_one_by_one(scorer) -> None:
    together = log_likelihoods(scorer(batch_size=7), ITEMS, mc_num=6, seed=1)
    alone = [log_likelihoods(scorer(), [item], mc_num=6, seed=1)[0] for item in reversed(ITEMS)]
    assert together == pytest.approx(alone[::-1], abs=1e-9)


class _Tokenizer:
    special_tokens_map = {"mask_token": "<mask>", "pad_token": "<pad>", "eos_token": "<eos>"}

    def get_vocab(self) -> dict[str, int]:
        return {"<mask>": MASK, "<pad>": PAD, "<eos>": 37}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.get_vocab()[token]


@pytest.mark.parametrize("family", ["llada2_moe", "fast_dllm_v2"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_decoding_is_what_the_sampler_does(scorer, family, batch_size) -> None:
    """Where answers end with a block: a last block cut short is decoded without what would follow."""
    model = scorer(family, batch_size=batch_size)
    sampler = BlockSampler(model.lm, _Tokenizer())  # pyright: ignore
    items, expected = [Item((3,), ())], [(True, 0)]
    for context, length in (((4, 5, 6, 11, 2, 7), 10), ((1, 2, 3, 4), 4), ((9,), 3)):
        config = BlockSamplerConfig(max_new_tokens=length, block_size=4, histories=True)
        output = sampler.sample([context], config)
        states = [state[0, len(context) :].tolist() for state in output.histories]
        assert len(states) == length
        items.append(Item(context, tuple(states[-1])))
        expected.append((True, length))
        for step, state in enumerate(states):
            # Wrong at the token that this step fills in: there it ends.
            before = [MASK] * length if step == 0 else states[step - 1]
            place = next(j for j in range(length) if state[j] != before[j])
            wrong = list(states[-1])
            wrong[place] = (wrong[place] + 1) % 30
            items.append(Item(context, tuple(wrong)))
            expected.append((False, step + 1))
    assert greedy_matches(model, items) == expected


@torch.no_grad()
def test_the_first_token_of_a_block_comes_first_though_others_are_surer(make_model) -> None:
    model = make_model("fast_dllm_v2", initializer_range=0.5).double()
    sampler = BlockSampler(model, _Tokenizer())  # pyright: ignore
    config = BlockSamplerConfig(max_new_tokens=8, block_size=4)
    contexts = [tuple(torch.randint(0, 37, (4,), generator=make_generator(seed)).tolist()) for seed in range(4)]
    answers = sampler.sample(contexts, config).answers
    assert answers is not None
    items = [Item(context, tuple(answer)) for context, answer in zip(contexts, answers.tolist(), strict=True)]
    num_surer = 0
    for item in items:
        ids = torch.tensor(item.context + item.target)
        for start in (4, 8):
            noised = ids[: start + 4].clone()
            noised[start:] = MASK
            logits = model(noised[None], attention_mask=block_causal_mask(start + 4, 4)).logits[0, start - 1 : -1]
            logits[:, MASK] = -torch.inf
            sure = logits.softmax(-1).amax(-1)  # of the tokens of the block
            num_surer += bool(sure[0] < sure[1:].max())
    assert num_surer > 0  # else the order would not matter
    scorer = Scorer(model, MASK, PAD, batch_size=3, block_size=4)
    assert greedy_matches(scorer, items) == [(True, 8)] * len(items)
    # Wrong in the first token: the very first step says so.
    wrong = [Item(item.context, ((item.target[0] + 1) % 37, *item.target[1:])) for item in items]
    assert greedy_matches(scorer, wrong) == [(False, 1)] * len(items)


# The harness.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("block") / "m"
    sizes = {"num_hidden_layers": 2, "num_experts": 4, "n_group": 2, "topk_group": 1, "initializer_range": 0.2}
    return str(make_tiny_checkpoint(folder, "llada2_moe", max_position_embeddings=100, **sizes))


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint).double()


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """(model, tokenizer) of a family whose logits are shifted."""
    folder = tmp_path_factory.mktemp("shifted") / "m"
    make_tiny_checkpoint(
        folder, "fast_dllm_v2", num_hidden_layers=2, max_position_embeddings=100, initializer_range=0.2
    )
    return load_model(str(folder)).double(), load_tokenizer(str(folder))


@pytest.fixture
def make_harness(model, tokenizer):
    def make(**arguments) -> BlockEvalHarness:
        return BlockEvalHarness(model=model, tokenizer=tokenizer, **arguments)

    return make


def generations(texts, **gen_kwargs) -> list[Instance]:
    return [
        Instance("generate_until", {}, (text, dict(gen_kwargs)), 0, metadata=("task", index, 1))
        for index, text in enumerate(texts)
    ]


TEXTS = ["def f(x):", "The old man and", "import json, sys, pathlib as p\n\n", "a b c d e f g h", ""]


def test_answers_are_the_samplers_in_any_batch(make_harness, model, tokenizer) -> None:
    arguments = {"block_size": 8, "steps": 4, "threshold": 0.3, "editing_threshold": 0.3}
    requests = generations(TEXTS, max_gen_toks=11)
    answers = make_harness(batch_size=4, **arguments).generate_until(requests)
    assert answers == make_harness(batch_size=1, **arguments).generate_until(requests)
    assert len(set(answers)) > 3
    sampler = BlockSampler(model, tokenizer)
    config = BlockSamplerConfig(
        max_new_tokens=11, block_size=8, steps_per_block=4, threshold=0.3, editing_threshold=0.3
    )
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = sampler.sample([tokenizer.encode(text) or [tokenizer.bos_token_id]], config).answers[0].tolist()
        ids = ids[: next((i for i, token in enumerate(ids) if token in sampler.end_token_ids), 11)]
        assert answer == tokenizer.decode(ids, skip_special_tokens=True)


def test_every_argument_reaches_the_sampler(make_harness, monkeypatch) -> None:
    seen = []
    original = BlockSampler.sample
    monkeypatch.setattr(BlockSampler, "sample", lambda self, p, c: (seen.append(c), original(self, p, c))[1])
    given = {
        "steps": 3, "block_size": 4, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "threshold": 0.75,
        "sub_block_size": 2, "min_transfer": 2, "editing_threshold": 0.25, "max_post_steps": 2, "use_cache": False,
        "seed": 3,
    }  # fmt: skip
    assert set(given) == set(BlockEvalConfig.sampler_fields)
    make_harness(**given).generate_until(generations(["a"], max_gen_toks=6))
    make_harness().generate_until(generations(["a"], max_gen_toks=6, **given))
    fields = {("steps_per_block" if name == "steps" else name): value for name, value in given.items()}
    assert seen == [BlockSamplerConfig(max_new_tokens=6, early_stop=True, **fields)] * 2
    for name, preset in BLOCK_PRESETS.items():
        make_harness(preset=name, threshold=0.9, max_length=96).generate_until(generations(["a"], max_gen_toks=6))
        assert seen[-1] == BlockSamplerConfig(**{**preset, "threshold": 0.9, "max_new_tokens": 6, "early_stop": True})
    with pytest.raises(InputError, match="sub_block_size=3 does not divide block_size=32"):
        make_harness(sub_block_size=3)
    # The task may bring the temperature that a share to draw from needs.
    make_harness(top_k=3).generate_until(generations(["a"], max_gen_toks=6, do_sample=True, temperature=0.5))
    assert (seen[-1].top_k, seen[-1].temperature) == (3, 0.5)
    with pytest.raises(InputError, match="top_k and top_p have no effect at temperature 0"):
        make_harness(top_k=3).generate_until(generations(["a"], max_gen_toks=6))


def _widths(harness, requests) -> list[int]:
    """Number of tokens of every forward."""
    widths = []
    hook = harness.lm.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    harness.generate_until(requests)
    hook.remove()
    return widths


def test_the_cost_is_an_upper_bound_that_plain_decoding_reaches(make_harness, capsys, tokenizer) -> None:
    text = "one two three four five six seven eight nine ten"
    length = len(tokenizer.encode(text))
    for arguments in (
        {},
        {"use_cache": False},
        {"steps": 3},
        {"min_transfer": 3},
        {"steps": 5, "min_transfer": 3},
        {"sub_block_size": 2},
        {"sub_block_size": 2, "steps": 2},
        {"sub_block_size": 2, "min_transfer": 2},
        {"threshold": 0.2, "editing_threshold": 0.1, "max_post_steps": 2},
    ):
        harness = make_harness(block_size=4, early_stop=False, **arguments)
        seen = _widths(harness, generations([text], max_gen_toks=10))
        forwards, work = harness.decoding_cost(harness.sampler_config({"max_new_tokens": 10}), length)
        if "threshold" in arguments:
            assert len(seen) <= forwards and sum(seen) <= work
        else:
            assert (len(seen), sum(seen)) == (forwards, work), arguments
        assert f"at most {forwards:,} forwards of one row" in capsys.readouterr().err
        info = harness.get_model_info()
        assert info["mean_cache_forwards"] == (length >= 4 and harness.config.use_cache)
        assert info["mean_nfe"] + info["mean_cache_forwards"] == len(seen)


@pytest.mark.parametrize("num_words", [9, 12, 4])
def test_the_cost_with_shifted_logits(shifted, num_words: int) -> None:
    model, tokenizer = shifted
    text = "one two three four five six seven eight nine ten eleven twelve"
    prompt = tokenizer.encode(text)[:num_words]
    text = tokenizer.decode(prompt)
    assert tokenizer.encode(text) == prompt
    for arguments in ({}, {"use_cache": False}, {"steps": 2}, {"sub_block_size": 2, "min_transfer": 2}):
        harness = BlockEvalHarness(model=model, tokenizer=tokenizer, block_size=4, early_stop=False, **arguments)
        seen = _widths(harness, generations([text], max_gen_toks=10))
        cost = harness.decoding_cost(harness.sampler_config({"max_new_tokens": 10}), num_words)
        assert (len(seen), sum(seen)) == cost, arguments
        info = harness.get_model_info()
        assert info["mean_nfe"] + info["mean_cache_forwards"] == len(seen)
    with pytest.raises(InputError, match="drop editing_threshold"):
        BlockEvalHarness(model=model, tokenizer=tokenizer, preset="quality")


def test_likelihoods_are_scored_with_the_block_size_that_decodes(make_harness, model, tokenizer) -> None:
    context, continuation = "The quick brown fox jumps over", " the lazy dog and runs away from it"
    request = Instance("loglikelihood", {}, (context, continuation), 0, metadata=("task", 0, 1))
    target = tokenizer.encode(context + continuation)[len(tokenizer.encode(context)) :]
    item = Item(tuple(tokenizer.encode(context)), tuple(target))
    found = {}
    for arguments, size in (({"block_size": 4}, 4), ({"preset": "speed", "block_size": 8}, 8), ({}, 32)):
        scorer = Scorer(model, tokenizer.mask_token_id, tokenizer.pad_token_id, block_size=size)
        ((value, is_greedy),) = make_harness(batch_size=4, mc_num=7, **arguments).loglikelihood([request])
        assert value == pytest.approx(log_likelihoods(scorer, [item], 7, 0)[0], abs=1e-9) and is_greedy is False
        found[size] = value
    assert len(set(found.values())) == 3
    text = Instance("loglikelihood_rolling", {}, (context + continuation,), 0, metadata=("task", 0, 1))
    (value,) = make_harness(block_size=4, max_length=16, mc_num=15).loglikelihood_rolling([text])
    assert value < 0


def test_the_samplers_greedy_answer_is_a_greedy_continuation(make_harness, model, tokenizer) -> None:
    prompt = "The quick"
    size = len(tokenizer.encode(prompt)) + 1
    answers = BlockSampler(model, tokenizer).sample(
        [tokenizer.encode(prompt)], BlockSamplerConfig(max_new_tokens=1, block_size=size)
    )
    (answer,) = tokenizer.batch_decode(answers.answers)
    assert tokenizer.encode(prompt + answer) == [*tokenizer.encode(prompt), *answers.answers[0].tolist()]
    request = Instance("loglikelihood", {}, (prompt, answer), 0, metadata=("task", 0, 1))
    assert make_harness(block_size=size).loglikelihood([request])[0][1] is True
    assert make_harness(block_size=size, check_greedy=False).loglikelihood([request])[0][1] is False


def test_prompts_leave_room_for_whole_blocks(make_harness, tokenizer) -> None:
    """100 positions hold three blocks of 32: 96 tokens of prompt and answer."""
    text = " ".join(["word"] * 95)
    length = len(tokenizer.encode(text))
    assert length > 92
    with pytest.raises(InputError, match=f"a prompt of {length} tokens and 4 behind it exceed max_length=96 by"):
        make_harness().generate_until(generations([text], max_gen_toks=4))
    harness = make_harness(truncation="left", steps=1)
    harness.generate_until(generations([text], max_gen_toks=4))
    assert harness.get_model_info()["num_truncated"] == 1
    with pytest.raises(InputError, match="max_length=20 has no room for a block of 32"):
        make_harness(max_length=20).generate_until(generations(["a"], max_gen_toks=4))
    with pytest.raises(InputError, match="max_length=101 exceeds the model's 100 positions"):
        make_harness(max_length=101)


def test_a_bidirectional_family_needs_the_block_size_it_was_trained_with(tmp_path) -> None:
    folder = str(make_tiny_checkpoint(tmp_path / "m", "llada_moe", num_hidden_layers=2, num_experts=4))
    with pytest.raises(InputError, match=r"attends bidirectional: .* name its block_size, else use the adapter llada"):
        BlockEvalHarness(pretrained=folder, device="cpu")
    harness = BlockEvalHarness(pretrained=folder, device="cpu", block_size=8)
    answers = harness.generate_until(generations(TEXTS[:2], max_gen_toks=8))
    assert len(answers) == 2 and harness.scoring_block_size == 8
    assert BlockEvalHarness(pretrained=folder, device="cpu", preset="quality").scoring_block_size == 32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps_per_block": 3}, r"unknown model argument steps_per_block; known: .*steps"),
        ({"remasking": "margin"}, "unknown model argument remasking"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"editing_threshold": 1.5}, r"editing_threshold must be in \[0, 1\]"),
        ({"threshold": 0}, r"threshold must be in \(0, 1\]"),
        ({"top_p": 1.0}, r"top_p must be in \(0, 1\)"),
        ({"sub_block_size": 3, "block_size": 8}, "sub_block_size=3 does not divide block_size=8"),
        (
            {"sub_block_size": 8, "preset": "quality", "steps": 2},
            "steps_per_block=2 cannot be kept with sub_block_size=8",
        ),
        ({"max_post_steps": 3}, "max_post_steps has no effect without editing_threshold"),
        ({"top_k": 3, "temperature": 0}, "have no effect at temperature 0"),
        ({"preset": "llada"}, "preset 'llada' is unknown: choose one of quality, speed"),
        ({"cfg": 1.5}, "decoding block by block has no classifier-free guidance"),
    ],
)
def test_arguments_that_are_refused(given, message) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_model_args(BlockEvalConfig, {"pretrained": "m", **given})
    assert "\n" not in str(caught.value)
    parse_model_args(BlockEvalConfig, {"pretrained": "m", "cfg": 0.0})


def test_the_docs_name_every_argument() -> None:
    page = pathlib.Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
    words = set(re.findall(r"`(\w+)`", page.read_text()))
    assert {field.name for field in dataclasses.fields(BlockEvalConfig)} <= words
