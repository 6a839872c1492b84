"""What samplers tell `run_model` is enough to carry a state per row: a toy that adds the last hidden state to the next
forward's embeddings decodes a batch like its singles, and with the exact cache as without."""

import dataclasses

import pytest
import torch

from dllm.core.samplers import BlockSampler, BlockSamplerConfig, MDLMSampler, MDLMSamplerConfig, Visit

MASK, PAD, EOS = 39, 38, 37


class _Tokenizer:
    special_tokens_map = {"mask_token": "<mask>", "pad_token": "<pad>", "eos_token": "<eos>"}

    def get_vocab(self) -> dict[str, int]:
        return {"<mask>": MASK, "<pad>": PAD, "<eos>": EOS}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.get_vocab()[token]


class _Carrying:
    """Adds the carried state at all positions, filled or not: the settled ones must be left out."""

    carries_state = True
    resets = False  # at a new block

    def begin(self, num_rows: int, width: int) -> None:
        size = self.lm.backbone.embedding.embedding_dim  # pyright: ignore
        self.state = torch.zeros(2, num_rows, width, size, dtype=torch.float64)
        self.start = torch.full((2, num_rows), -1)
        self.visits: list[Visit] = []

    def run_model(self, visit: Visit, **inputs):
        self.visits.append(visit)
        if self.resets:
            is_new = visit.active & (visit.start != self.start[visit.pass_index])
            self.state[visit.pass_index, is_new] = 0
            self.start[visit.pass_index] = torch.where(visit.active, visit.start, self.start[visit.pass_index])
        state = self.state[visit.pass_index]
        columns = visit.columns[..., None].expand(-1, -1, state.shape[2])  # [B, W, D]
        assert columns.shape[:2] == inputs["input_ids"].shape and visit.width == state.shape[1]
        carried = state.gather(1, columns) * visit.active[:, None, None]
        if visit.settled is not None:
            carried = carried * ~visit.settled[..., None]
        embedded = self.lm.backbone.embedding(inputs.pop("input_ids")) + 0.5 * carried  # pyright: ignore
        output = self.lm(**inputs, inputs_embeds=embedded, output_hidden_states=True)  # pyright: ignore
        new = torch.where(visit.active[:, None, None], output.hidden_states[-1], state.gather(1, columns))
        state.scatter_(1, columns, new)
        return output


class _CarryingMDLM(_Carrying, MDLMSampler):
    pass


class _CarryingBlocks(_Carrying, BlockSampler):
    resets = True


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 37, (length,), generator=generator).tolist() for length in (5, 8, 2, 11)]


def _made(sampler_class, model, shift: int = 0):
    sampler = sampler_class(model.double(), _Tokenizer())
    sampler.spec = dataclasses.replace(sampler.spec, logit_shift=shift)
    return sampler


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0.3},
        {"threshold": 0.3, "cfg_scale": 0.5},
        {"max_uncertainty": 1.0, "early_stop": True, "temperature": 1.0},
        {"threshold": 0.3, "cache": "prefix", "cfg_scale": 0.5},
        {"threshold": 0.3, "cache": "dual"},
    ],
)
def test_mdlm_batches_equal_singles(make_model, settings: dict) -> None:
    sampler = _made(_CarryingMDLM, make_model("llada"))
    config = MDLMSamplerConfig(max_new_tokens=10, block_size=5, **settings)
    batch = sampler.sample(_prompts(), config)
    # Rows are counted where they are told to be active, a forward of each pass once.
    told = torch.stack([visit.active for visit in sampler.visits]).sum(dim=0)
    assert torch.equal(told, batch.nfe)
    assert {visit.pass_index for visit in sampler.visits} == ({0, 1} if "cfg_scale" in settings else {0})
    plain = _made(MDLMSampler, make_model("llada")).sample(_prompts(), config)
    assert not torch.equal(plain.sequences, batch.sequences)  # the state matters
    for row, prompt in enumerate(_prompts()):
        single = sampler.sample([prompt], config)
        assert batch.answers[row].tolist() == single.answers[0].tolist()
        assert batch.nfe[row] == single.nfe[0]


@pytest.mark.parametrize(("cache", "end"), [("prefix", 18), ("dual", 13)])
def test_mdlm_caches_keep_nothing_carried(make_model, cache, end: int) -> None:
    sampler = _made(_CarryingMDLM, make_model("llada"))
    sampler.sample(_prompts()[1:2], MDLMSamplerConfig(max_new_tokens=10, block_size=5, cache=cache))
    first, later = sampler.visits[0], sampler.visits[1]
    assert first.columns.tolist() == [list(range(18))] and later.columns.tolist() == [list(range(8, end))]
    assert first.settled is not None and later.settled is None
    assert first.settled[0].tolist() == [not 8 <= column < end for column in range(18)]
    assert [visit.start.tolist() for visit in sampler.visits] == [[8]] * 5 + [[13]] * 5


BLOCK_SETTINGS = [
    {"threshold": 0.3},
    {"sub_block_size": 2, "threshold": 0.2},
    {"temperature": 1.0, "early_stop": True, "min_transfer": 2},
    {"threshold": 0.15, "editing_threshold": 0.2},
]


# Editing is refused for shifted logits.
@pytest.mark.parametrize(
    ("settings", "shift"), [(settings, 0) for settings in BLOCK_SETTINGS] + [(each, 1) for each in BLOCK_SETTINGS[:3]]
)
def test_block_batches_equal_singles_and_the_cache_changes_nothing(make_model, settings: dict, shift: int) -> None:
    family = "fast_dllm_v2" if shift else "llada2_moe"
    sampler = _made(_CarryingBlocks, make_model(family), shift)
    config = BlockSamplerConfig(max_new_tokens=14, block_size=4, **settings)
    batch = sampler.sample(_prompts(), config)
    visits = sampler.visits
    assert torch.equal(torch.stack([visit.active for visit in visits]).sum(dim=0), batch.nfe)
    assert all(visit.reveals or not visit.active.any() for visit in visits)
    assert [visit.reveals for visit in visits].index(True) == 1  # one forward over the prompts
    for visit in visits:
        assert torch.equal(visit.settled, visit.columns < visit.start[:, None])
    plain = _made(BlockSampler, make_model(family), shift).sample(_prompts(), config)
    assert not torch.equal(plain.sequences, batch.sequences)  # the state matters
    without = sampler.sample(_prompts(), dataclasses.replace(config, use_cache=False))
    assert torch.equal(batch.sequences, without.sequences) and torch.equal(batch.nfe, without.nfe)
    for row, prompt in enumerate(_prompts()):
        single = sampler.sample([prompt], config)
        assert batch.answers[row].tolist() == single.answers[0].tolist()
        assert batch.nfe[row] == single.nfe[0] and batch.cache_forwards[row] == single.cache_forwards[0]


def test_a_carried_state_makes_every_finished_block_stale(make_model) -> None:
    """The last step of a block edits nothing here, so without a state its keys are final already."""
    widths = {}
    for sampler_class in (BlockSampler, _CarryingBlocks):
        model = make_model("llada2_moe")
        seen: list[int] = []
        model.model.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(kwargs["position_ids"].shape[1]), with_kwargs=True
        )
        config = BlockSamplerConfig(max_new_tokens=12, block_size=4, threshold=0.15, editing_threshold=1.0)
        _made(sampler_class, model).sample(_prompts()[:1], config)
        widths[sampler_class] = seen.count(8)
    # 5 + 12 tokens are four blocks behind the first one: the second to the fourth are computed once more.
    assert widths == {BlockSampler: 0, _CarryingBlocks: 3}
