"""Block diffusion: the training forward on [x_t ; x_0] is what decoding block by block would compute."""

import pytest
import torch

from dllm.core.attention import block_causal_mask, in_two_halves, two_halves_inputs, two_halves_mask

FAMILIES = ["llada", "llada_moe", "llada2_moe", "fast_dllm_v2"]
MASK = 39
BLOCK = 4


def _states(length: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """(clean [2, L], noised [2, L]) ids; the last block is shorter."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(3, 38, (2, length), generator=generator)
    return clean, torch.where(torch.rand(2, length, generator=generator) < 0.5, MASK, clean)


def _training_logits(model, clean: torch.Tensor, noised: torch.Tensor, padding=None) -> torch.Tensor:
    length = clean.shape[1]
    layout = two_halves_inputs(model.config._attn_implementation, length, BLOCK, padding, clean.device)
    return model(input_ids=torch.cat([noised, clean], dim=1), **layout).logits[:, :length]


def _decoding_logits(model, clean: torch.Tensor, noised: torch.Tensor) -> torch.Tensor:
    """Each block from a forward of its own on [clean blocks before it, noised block]."""
    parts = []
    for start in range(0, clean.shape[1], BLOCK):
        ids = torch.cat([clean[:, :start], noised[:, start : start + BLOCK]], dim=1)
        parts.append(model(ids, attention_mask=block_causal_mask(ids.shape[1], BLOCK)).logits[:, start:])
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_training_logits_are_those_of_decoding(make_model, family: str) -> None:
    model = make_model(family).double()
    clean, noised = _states()
    # float64: products of other shapes differ in the last digits.
    torch.testing.assert_close(
        _training_logits(model, clean, noised), _decoding_logits(model, clean, noised), rtol=1e-9, atol=1e-9
    )


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_no_block_sees_a_later_one_or_its_own_answer(make_model, family: str) -> None:
    model = make_model(family).double()
    clean, noised = _states()
    logits = _training_logits(model, clean, noised)
    for start in range(0, 10, BLOCK):
        other_clean, other_noised = clean.clone(), noised.clone()
        other_clean[:, start:] = (clean[:, start:] + 7) % 30 + 3  # its own clean block too
        other_noised[:, start + BLOCK :] = (noised[:, start + BLOCK :] + 5) % 30 + 3
        other = _training_logits(model, other_clean, other_noised)
        end = start + BLOCK
        # Experts multiply as many tokens at a time as chose them, and other tokens choose otherwise: the last digits.
        exact = {} if family == "llada" else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(other[:, :end], logits[:, :end], **(exact or {"rtol": 0, "atol": 0}))
        if end < 10:
            assert not torch.allclose(other[:, end:], logits[:, end:])


@torch.no_grad()
def test_the_clean_past_and_the_own_noise_matter(make_model) -> None:
    model = make_model("llada2_moe").double()
    clean, noised = _states()
    logits = _training_logits(model, clean, noised)
    earlier, own = clean.clone(), noised.clone()
    earlier[:, 0] = (clean[:, 0] + 3) % 30 + 3
    own[:, 4] = (noised[:, 4] + 3) % 30 + 3
    assert not torch.allclose(_training_logits(model, earlier, noised)[:, 4:], logits[:, 4:])
    assert not torch.allclose(_training_logits(model, clean, own)[:, 4:8], logits[:, 4:8])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_padded_behind_have_the_logits_of_rows_alone(make_model, family: str) -> None:
    model = make_model(family).double()
    clean, noised = _states()
    padding = torch.ones(2, 10, dtype=torch.int64)
    padding[1, 6:] = 0
    logits = _training_logits(model, clean, noised, padding)
    assert logits.isfinite().all()
    alone = _training_logits(model, clean[1:, :6], noised[1:, :6])
    torch.testing.assert_close(logits[1:, :6], alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits[:1], _training_logits(model, clean[:1], noised[:1]), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_block_as_long_as_the_row_needs_no_clean_half(make_model) -> None:
    model = make_model("llada2_moe").double()
    clean, noised = _states(BLOCK)
    torch.testing.assert_close(_training_logits(model, clean, noised), model(noised).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_flex_is_sdpa(make_model, padded: bool) -> None:
    """Without the compiler, whose CPU kernels have no backward."""
    model = make_model("llada2_moe", num_key_value_heads=2)
    clean, noised = _states()
    padding = None
    if padded:
        padding = torch.ones(2, 10, dtype=torch.int64)
        padding[0, 7:] = 0
    expected = _training_logits(model, clean, noised, padding)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        got = _training_logits(model, clean, noised, padding)
    seen = torch.ones(2, 10, dtype=torch.bool) if padding is None else padding.bool()
    # float32: the two sum in different orders.
    torch.testing.assert_close(got[seen], expected[seen], rtol=1e-4, atol=1e-4)


def test_flat_positions_move_to_the_noised_half() -> None:
    ids = torch.arange(12).view(3, 4)
    both = torch.cat([ids, -ids], dim=1).flatten()
    positions = torch.tensor([0, 3, 4, 7, 11])
    assert both[in_two_halves(positions, 4)].tolist() == positions.tolist()


def test_mask_of_one_block_is_full_within_each_half() -> None:
    mask = two_halves_mask(5, 5)[0, 0]
    assert mask[:5, :5].all() and not mask[:5, 5:].any() and not mask[5:, :5].any() and mask[5:, 5:].all()
