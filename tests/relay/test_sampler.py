"""Decoding with a relay: the naive loop, batches and singles, caches, blocks, and the zero gate. All in float64."""

import dataclasses

import pytest
import torch

from dllm.core.samplers import BlockSampler, BlockSamplerConfig, MDLMSampler, MDLMSamplerConfig
from memdlm.relay import RelayBlockSampler, RelayMDLMSampler, RelayState

MASK, EOS = 39, 38


class Tokenizer:
    """As much of a tokenizer as samplers ask for."""

    special_tokens_map = {"mask_token": "<mask>", "pad_token": "<pad>", "eos_token": "<eos>"}

    def get_vocab(self):
        return {"<mask>": MASK, "<eos>": EOS, "<pad>": 37}

    def convert_tokens_to_ids(self, token):
        return self.get_vocab()[token]


PROMPTS = [[3, 8, 1, 9, 4], [7, 2], [5, 5, 6, 1, 2, 3, 30, 21]]


def samplers(model, kind="mdlm"):
    plain, relay = {"mdlm": (MDLMSampler, RelayMDLMSampler), "block": (BlockSampler, RelayBlockSampler)}[kind]
    return plain(model, Tokenizer()), relay(model, Tokenizer())


SETTINGS = {
    "llada_moe": [
        MDLMSamplerConfig(max_new_tokens=8),
        MDLMSamplerConfig(max_new_tokens=8, block_size=4, steps=4),
        MDLMSamplerConfig(max_new_tokens=8, threshold=0.3, cfg_scale=0.5),
        MDLMSamplerConfig(max_new_tokens=8, block_size=4, threshold=0.2, cache="prefix"),
        MDLMSamplerConfig(max_new_tokens=8, block_size=4, threshold=0.2, cache="dual"),
        MDLMSamplerConfig(max_new_tokens=8, max_uncertainty=1.2),
        MDLMSamplerConfig(max_new_tokens=8, temperature=1.0, early_stop=True),
    ],
    "llada2_moe": [
        BlockSamplerConfig(max_new_tokens=8, block_size=4),
        BlockSamplerConfig(max_new_tokens=8, block_size=4, threshold=0.2, use_cache=False),
        BlockSamplerConfig(max_new_tokens=8, block_size=4, threshold=0.2, editing_threshold=0.3, max_post_steps=2),
        BlockSamplerConfig(max_new_tokens=8, block_size=4, temperature=1.0, early_stop=True),
    ],
    "fast_dllm_v2": [
        BlockSamplerConfig(max_new_tokens=8, block_size=4, threshold=0.2),
        BlockSamplerConfig(max_new_tokens=8, block_size=4, sub_block_size=2, threshold=0.2),
        BlockSamplerConfig(max_new_tokens=8, block_size=4, sub_block_size=2, use_cache=False),
    ],
}
KIND = {"llada_moe": "mdlm", "llada2_moe": "block", "fast_dllm_v2": "block"}
CASES = [(family, config) for family, configs in SETTINGS.items() for config in configs]


@pytest.mark.parametrize("positions", ["mask", "all"])
@pytest.mark.parametrize("family, config", CASES)
def test_a_batch_equals_its_singles(relay_model, family, config, positions):
    model, _ = relay_model(family, positions=positions)
    _, sampler = samplers(model, KIND[family])
    together = sampler.sample(PROMPTS, config)
    for row, prompt in enumerate(PROMPTS):
        alone = sampler.sample([prompt], config)
        assert together.answers[row].tolist() == alone.answers[0].tolist()
        assert together.nfe[row] == alone.nfe[0]


@pytest.mark.parametrize("family, config", CASES)
def test_a_zero_gate_decodes_like_the_base_model(relay_model, family, config):
    model, channel = relay_model(family)
    torch.nn.init.zeros_(channel.norm.weight)
    torch.nn.init.zeros_(channel.norm.bias)
    plain, relay = samplers(model, KIND[family])
    expected, found = plain.sample(PROMPTS, config), relay.sample(PROMPTS, config)
    assert torch.equal(found.answers, expected.answers) and torch.equal(found.nfe, expected.nfe)


@pytest.mark.parametrize("family, config", CASES)
def test_the_relay_changes_what_is_decoded(relay_model, family, config):
    """So that the other tests compare something."""
    model, _ = relay_model(family, positions="all")
    plain, relay = samplers(model, KIND[family])
    assert not torch.equal(plain.sample(PROMPTS, config).answers, relay.sample(PROMPTS, config).answers)


@pytest.mark.parametrize("first_state", ["zeros", "none"])
@pytest.mark.parametrize("positions", ["mask", "all"])
def test_whole_row_decoding_is_the_naive_loop(relay_model, first_state, positions):
    model, channel = relay_model(first_state=first_state, positions=positions)
    config = MDLMSamplerConfig(max_new_tokens=6)
    prompt = PROMPTS[0]
    ids = torch.tensor([prompt + [MASK] * 6])
    hidden, is_set = torch.zeros(1, 11, channel.size, dtype=torch.float64), torch.tensor([False])
    for _ in range(6):
        with channel.passing(RelayState(hidden, is_set)):
            logits = model(ids).logits[0]
        hidden, is_set = channel.taken, torch.tensor([True])
        logits[:, MASK] = -torch.inf
        sure, tokens = torch.softmax(logits, -1).max(-1)
        best = max((i for i in range(11) if ids[0, i] == MASK), key=lambda i: sure[i])
        ids[0, best] = tokens[best]
    _, sampler = samplers(model)
    assert sampler.sample([prompt], config).sequences.tolist() == ids.tolist()


@pytest.mark.parametrize("family", ["llada2_moe", "fast_dllm_v2"])
@pytest.mark.parametrize("positions", ["mask", "all"])
def test_block_decoding_is_the_naive_loop(relay_model, family, positions):
    """Block by block, all columns in every forward; the state begins anew in each block and is added nowhere else."""
    model, channel = relay_model(family, positions=positions, block_size=4)
    shift = int(family == "fast_dllm_v2")
    prompt, new = PROMPTS[0] + [11, 12, 13], 8  # the prompt ends with a block
    ids = torch.tensor([prompt + [MASK] * new])
    blocks = torch.arange(16) // 4
    for start in range(8, 16, 4):
        end = start + 4
        mask = (blocks[None, :end] <= blocks[:end, None])[None, None]
        if shift:  # the block before, with its final tokens and without a state, names the first token
            logits = model(ids[:, :end], attention_mask=mask).logits[0, start - 1]
            logits[MASK] = -torch.inf
            ids[0, start] = logits.argmax()
        hidden, is_set = torch.zeros(1, end, channel.size, dtype=torch.float64), torch.tensor([False])
        own = torch.zeros(1, end, dtype=torch.bool)
        own[:, start:] = True
        while MASK in ids[0, start:end]:
            with channel.passing(RelayState(hidden, is_set, allowed=own)):
                logits = model(ids[:, :end], attention_mask=mask).logits[0]
            hidden, is_set = channel.taken, torch.tensor([True])
            logits[:, MASK] = -torch.inf
            sure, tokens = torch.softmax(logits, -1).max(-1)
            left = [i for i in range(start, end) if ids[0, i] == MASK]
            best = max(left, key=lambda i: sure[i - shift])
            ids[0, best] = tokens[best - shift]
    _, sampler = samplers(model, "block")
    for use_cache in (True, False):
        config = BlockSamplerConfig(max_new_tokens=new, block_size=4, use_cache=use_cache)
        assert sampler.sample([prompt], config).sequences.tolist() == ids.tolist()


@pytest.mark.parametrize("family", ["llada2_moe", "fast_dllm_v2"])
@pytest.mark.parametrize("positions", ["mask", "all"])
@pytest.mark.parametrize("threshold", [None, 0.1])
def test_the_cache_changes_nothing(relay_model, family, positions, threshold):
    model, _ = relay_model(family, positions=positions)
    _, sampler = samplers(model, "block")
    config = BlockSamplerConfig(max_new_tokens=10, block_size=4, threshold=threshold)
    cached = sampler.sample(PROMPTS, config)
    plain = sampler.sample(PROMPTS, dataclasses.replace(config, use_cache=False))
    assert torch.equal(cached.answers, plain.answers) and torch.equal(cached.nfe, plain.nfe)


def test_infilling_rows_side_by_side(relay_model):
    model, _ = relay_model(preset="sudoku")
    _, sampler = samplers(model)
    rows = torch.tensor([[3, MASK, 5, MASK, 7, MASK], [MASK, 2, 3, 4, 5, 6], [MASK, MASK, MASK, MASK, MASK, 1]])
    config = MDLMSamplerConfig(max_uncertainty=1.5)
    together = sampler.infill(rows, config)
    for index in range(3):
        alone = sampler.infill(rows[index : index + 1], config)
        assert together.sequences[index].tolist() == alone.sequences[0].tolist()
        assert together.nfe[index] == alone.nfe[0]
    assert len(set(together.nfe.tolist())) > 1


def test_a_call_begins_without_the_state_of_the_call_before(relay_model):
    model, _ = relay_model(positions="all")
    _, sampler = samplers(model)
    config = MDLMSamplerConfig(max_new_tokens=6)
    first = sampler.sample(PROMPTS[:1], config).answers
    sampler.sample(PROMPTS[2:], config)
    assert torch.equal(sampler.sample(PROMPTS[:1], config).answers, first)


def test_zeroed_decodes_with_the_norm_and_without_the_state(relay_model):
    model, channel = relay_model(positions="all")
    config = MDLMSamplerConfig(max_new_tokens=6)
    control = RelayMDLMSampler(model, Tokenizer(), zeroed=True).sample(PROMPTS, config)
    with channel.first_forwards():
        expected = MDLMSampler(model, Tokenizer()).sample(PROMPTS, config)
    assert torch.equal(control.answers, expected.answers)
    carried = RelayMDLMSampler(model, Tokenizer()).sample(PROMPTS, config)
    assert not torch.equal(control.answers, carried.answers)


def test_each_pass_of_guidance_has_a_state_of_its_own(relay_model):
    model, channel = relay_model()
    scale, prompt = 0.7, PROMPTS[0]
    ids = torch.tensor([prompt + [MASK] * 5])
    given, both = ids != MASK, [(torch.zeros(1, 10, channel.size, dtype=torch.float64), torch.tensor([False]))] * 2
    for _ in range(5):
        logits, after = [], []
        for (hidden, is_set), seen in zip(both, (ids, ids.masked_fill(given, MASK)), strict=True):
            with channel.passing(RelayState(hidden, is_set)):
                logits.append(model(seen).logits[0])
            after.append((channel.taken, torch.tensor([True])))
        both = after
        guided = logits[1] + (1 + scale) * (logits[0] - logits[1])
        guided[:, MASK] = -torch.inf
        sure, tokens = torch.softmax(guided, -1).max(-1)
        best = max((i for i in range(10) if ids[0, i] == MASK), key=lambda i: sure[i])
        ids[0, best] = tokens[best]
    _, sampler = samplers(model)
    assert (
        sampler.sample([prompt], MDLMSamplerConfig(max_new_tokens=5, cfg_scale=scale)).sequences.tolist()
        == ids.tolist()
    )


def test_a_later_block_has_no_state_before_it_was_in_a_window(relay_model):
    """With the dual cache the first forward of a block adds nothing at columns that no forward has written yet."""
    model, channel = relay_model(first_state="none", positions="all")
    _, sampler = samplers(model)
    seen, add = [], channel.add

    def spy(input_ids, embedded):
        state = sampler.channel._state
        seen.append((state.is_set.any(dim=2) if state.is_set.dim() == 3 else state.is_set).clone())
        return add(input_ids, embedded)

    sampler.channel.add = spy
    sampler.sample([PROMPTS[0]], MDLMSamplerConfig(max_new_tokens=8, block_size=4, cache="dual"))
    first_of_second_block = next(s for s in seen[1:] if s.shape[1] == 13)
    assert not bool(first_of_second_block[0, 9:].any())
