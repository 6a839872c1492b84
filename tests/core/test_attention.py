"""Masks: the same rule in every form and for every implementation gives the same attention."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import DynamicCache

from dllm.core.attention import (
    block_causal_mask,
    prepare_mask,
    two_halves_block_mask,
    two_halves_inputs,
    two_halves_mask,
)
from dllm.models import LLaDAMoEConfig, LLaDAMoEModelLM

B, L = 3, 7


def make_model(implementation: str) -> LLaDAMoEModelLM:
    config = LLaDAMoEConfig(
        vocab_size=19,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        num_experts=3,
        num_experts_per_tok=2,
        expert_intermediate_size=8,
        initializer_range=0.3,
    )
    torch.manual_seed(3)
    return LLaDAMoEModelLM._from_config(config, attn_implementation=implementation).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 19, (B, L))


@pytest.fixture
def padding() -> torch.Tensor:
    mask = torch.ones(B, L, dtype=torch.int64)
    mask[1, 5:] = 0
    mask[2, 2] = 0
    return mask


def forms(padding: torch.Tensor) -> dict[str, torch.Tensor]:
    sees = padding.bool()[:, None, None].expand(B, 1, L, L)
    lowest = torch.finfo(torch.float32).min
    additive = torch.zeros(B, 1, L, L).masked_fill(~sees, lowest)
    return {
        "bool 2-D": padding.bool(),
        "bool 4-D": sees,
        "additive": additive,
        "additive float64": additive.double(),
        "additive bfloat16": additive.bfloat16(),
        "additive -inf": torch.zeros(B, 1, L, L).masked_fill(~sees, -torch.inf),
    }


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_form_of_a_padding_mask(implementation, dtype, ids, padding):
    model = make_model(implementation).to(dtype)
    expected = model(ids, attention_mask=padding).logits
    assert expected.isfinite().all()
    for name, mask in forms(padding).items():
        got = model(ids, attention_mask=mask).logits
        # sdpa may take another kernel for an additive mask than for a boolean one: bfloat16 differs in its last bits.
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
def test_sdpa_is_eager(ids, padding):
    sdpa, eager = make_model("sdpa"), make_model("eager")
    for mask in (None, padding, block_causal_mask(L, 3)):
        left, right = (model(ids, attention_mask=mask).logits for model in (sdpa, eager))
        # float32: the two sum in different orders.
        torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


def check_flex(masks, ids: torch.Tensor) -> None:
    sdpa, flex = make_model("sdpa"), make_model("flex_attention")
    for mask in masks:
        left, right = (model(ids, attention_mask=mask).logits for model in (sdpa, flex))
        torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@torch.no_grad()
def test_flex_is_sdpa(ids, padding):
    """Without the compiler, whose CPU kernels take half a minute each and have no backward."""
    sees = padding.bool()[:, None, None] & block_causal_mask(L, 3)
    additive = torch.zeros(B, 1, L, L).masked_fill(~sees, torch.finfo(torch.float32).min)
    with torch.compiler.set_stance("force_eager"):
        check_flex((padding, block_causal_mask(L, 3), sees, additive, None), ids)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padding", "4-D"])
@torch.no_grad()
def test_compiled_flex_is_sdpa(kind, ids, padding):
    torch.compiler.reset()
    masks = {"padding": padding, "4-D": padding.bool()[:, None, None] & block_causal_mask(L, 3)}
    check_flex((masks[kind],), ids)


def flex_mask(mask: torch.Tensor) -> torch.Tensor:
    """The [B, H, L, S] boolean mask that a BlockMask stands for."""
    hidden = torch.zeros(B, L, 4)
    model = make_model("flex_attention")
    block = prepare_mask(model.config, hidden, mask)
    assert isinstance(block, BlockMask)
    rows, queries, keys = torch.arange(B), torch.arange(L), torch.arange(mask.shape[-1])
    return block.mask_mod(rows[:, None, None, None], torch.tensor(0), queries[:, None], keys[None])


def test_flex_masks_say_the_same(padding):
    sees = padding.bool()[:, None, None].expand(B, 1, L, L)
    assert torch.equal(flex_mask(sees), sees)
    assert torch.equal(flex_mask(padding).expand(B, 1, L, L), sees)
    blocks = block_causal_mask(L, 2)
    assert torch.equal(flex_mask(blocks), blocks.expand(B, 1, L, L))


def test_block_causal_mask():
    mask = block_causal_mask(7, 3)[0, 0]
    expected = [[j // 3 <= i // 3 for j in range(7)] for i in range(7)]
    assert mask.tolist() == expected
    assert torch.equal(block_causal_mask(4, 3, past_length=3)[0, 0], mask[3:])
    assert block_causal_mask(5, 5).all()
    assert torch.equal(block_causal_mask(5, 1)[0, 0], torch.ones(5, 5).tril().bool())
    with pytest.raises(ValueError, match="block_size"):
        block_causal_mask(5, 0)


def naive_two_halves(length: int, size: int) -> list[list[bool]]:
    """By the words: a noised position sees its noised block and the clean blocks before it, a clean one those up to its
    own."""
    rows = []
    for query in range(2 * length):
        row = []
        for key in range(2 * length):
            own, other = query % length // size, key % length // size
            if query < length:
                row.append(own == other if key < length else other < own)
            else:
                row.append(key >= length and other <= own)
        rows.append(row)
    return rows


@pytest.mark.parametrize(("length", "size"), [(7, 3), (6, 2), (5, 5), (4, 9), (3, 1)])
def test_two_halves_mask(length, size):
    mask = two_halves_mask(length, size)
    assert mask.shape == (1, 1, 2 * length, 2 * length) and mask[0, 0].tolist() == naive_two_halves(length, size)


def test_two_halves_mask_with_padding(padding):
    mask = two_halves_mask(L, 3, padding)
    assert mask.shape == (B, 1, 2 * L, 2 * L)
    for row in range(B):
        for key in range(2 * L):
            expected = two_halves_mask(L, 3)[0, 0, :, key] & bool(padding[row, key % L])
            assert torch.equal(mask[row, 0, :, key], expected)


@pytest.mark.parametrize("padded", [False, True])
def test_two_halves_mask_for_flex(padding, padded):
    chosen = padding if padded else None
    block = two_halves_block_mask(L, 3, chosen)
    rows, places = torch.arange(B), torch.arange(2 * L)
    seen = block.mask_mod(rows[:, None, None, None], torch.tensor(0), places[:, None], places[None])
    assert torch.equal(seen.expand(B, 1, 2 * L, 2 * L), two_halves_mask(L, 3, chosen).expand(B, 1, 2 * L, 2 * L))
    assert isinstance(two_halves_inputs("flex_attention", L, 3, chosen, padding.device)["attention_mask"], BlockMask)


def test_both_halves_have_the_same_positions():
    layout = two_halves_inputs("sdpa", 4, 2, None, torch.device("cpu"))
    assert layout["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert torch.equal(layout["attention_mask"], two_halves_mask(4, 2))


def test_two_halves_refusals(padding):
    for make in (two_halves_mask, two_halves_block_mask):
        with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
            make(L, 0)
        with pytest.raises(ValueError, match=r"padding has shape \[3, 7\], expected \[B, 6\]"):
            make(6, 2, padding)


@torch.no_grad()
def test_a_query_that_sees_nothing_is_finite(ids):
    mask = torch.ones(B, L, dtype=torch.int64)
    mask[1] = 0
    for implementation in ("sdpa", "eager"):
        assert make_model(implementation)(ids, attention_mask=mask).logits.isfinite().all()


def test_none_stays_none():
    config = make_model("sdpa").config
    assert prepare_mask(config, torch.zeros(B, L, 4), None) is None


def test_refusals(padding):
    hidden = torch.zeros(B, L, 4)
    sdpa, flash = (LLaDAMoEConfig() for _ in range(2))
    sdpa._attn_implementation, flash._attn_implementation = "sdpa", "flash_attention_2"
    for shape in [(B, L + 1), (B, L, L), (B, 1, L, L + 1), (2, 1, L, L), (B, 5, L, L)]:
        with pytest.raises(ValueError, match="attention_mask has shape"):
            prepare_mask(sdpa, hidden, torch.ones(shape).bool())
    with pytest.raises(ValueError, match="boolean or float"):
        prepare_mask(sdpa, hidden, torch.ones(B, 1, L, L, dtype=torch.int64))
    with pytest.raises(ValueError, match="flash"):
        prepare_mask(flash, hidden, torch.ones(B, 1, L, L).bool())
    block = prepare_mask(make_model("flex_attention").config, hidden, torch.ones(B, 1, L, L).bool())
    with pytest.raises(ValueError, match="flex_attention"):
        prepare_mask(sdpa, hidden, block)
    cache = DynamicCache()
    cache.update(torch.zeros(B, 1, 2, 4), torch.zeros(B, 1, 2, 4), 0)
    with pytest.raises(ValueError, match=r"\(3, 9\)"):
        prepare_mask(sdpa, hidden, padding, cache)


def test_a_two_dimensional_mask_that_is_added_is_refused(make_model) -> None:
    ids = torch.arange(6)[None]
    for mask in (torch.zeros(1, 6), torch.zeros(1, 6, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="must be boolean or integer"):
            make_model("llada2_moe")(input_ids=ids, attention_mask=mask)
