"""The decoder loop: masks, heads on some positions, cache, activation checkpointing, wrappers, refusals."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from dllm.core.attention import block_causal_mask
from dllm.models import spec_of, unwrap


def grads(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def test_hidden_states_are_the_inputs_of_the_layers(family, make_model, ids):
    model = make_model(family)
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == len(model.backbone.layers) + 1
    for index, state in enumerate(states[:-1]):
        assert torch.equal(state, model.backbone(ids, stop_at=index).hidden)
    assert torch.equal(states[-1], model.backbone(ids).last_hidden_state)


@torch.no_grad()
def test_logit_positions_are_the_gathered_logits(family, make_model, ids):
    model = make_model(family, dtype=torch.float64)
    positions = torch.tensor([20, 0, 7, 7])
    full = model(ids).logits.flatten(0, 1)
    # float64: a product of another shape may sum in another order.
    torch.testing.assert_close(model(ids, logit_positions=positions).logits, full[positions], atol=1e-12, rtol=0)
    assert model(ids, logit_positions=positions[:0]).logits.shape == (0, 23)


@torch.no_grad()
def test_input_embeddings_instead_of_ids(family, make_model, ids):
    model = make_model(family)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_is_not_seen(family, implementation, make_model, ids, padding_mask):
    model = make_model(family, implementation, torch.float64)
    other = torch.where(padding_mask.bool(), ids, (ids + 1) % 23)
    keep = padding_mask.bool()
    first = model(ids, attention_mask=padding_mask).logits[keep]
    torch.testing.assert_close(model(other, attention_mask=padding_mask).logits[keep], first, atol=1e-12, rtol=0)
    short = model(ids[1:2, :5]).logits[0]
    torch.testing.assert_close(model(ids, attention_mask=padding_mask).logits[1, :5], short, atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_batch_equals_its_rows(family, make_model, ids):
    model = make_model(family, dtype=torch.float64)
    batch = model(ids).logits
    rows = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(batch, rows, atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cache_of_finished_blocks_is_exact(family, implementation, make_model, ids):
    model = make_model(family, implementation, torch.float64)
    block, length = 2, ids.shape[1]
    full = model(ids, attention_mask=block_causal_mask(length, block)).logits
    cache, parts = DynamicCache(), []
    for start in range(0, length, block):
        part = ids[:, start : start + block]
        mask = block_causal_mask(part.shape[1], block, past_length=start)
        parts.append(model(part, attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-12, rtol=0)


@torch.no_grad()
def test_cache_with_a_padding_mask_over_all_positions(family, make_model, ids, padding_mask):
    model = make_model(family, dtype=torch.float64)
    sees = padding_mask.bool()[:, None, None] & block_causal_mask(7, 3)
    full = model(ids, attention_mask=sees).logits
    output = model(ids[:, :3], use_cache=True)
    second = model(ids[:, 3:6], attention_mask=padding_mask[:, :6], past_key_values=output.past_key_values).logits
    torch.testing.assert_close(second, full[:, 3:6], atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="cached"):
        model(ids[:, 6:], attention_mask=padding_mask[:, 6:], past_key_values=output.past_key_values)


def test_activation_checkpointing_changes_nothing(family, make_model, ids, padding_mask):
    def run(checkpointed: bool):
        model = make_model(family).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert all(layer.gradient_checkpointing for layer in model.backbone.layers)
        loss = model(ids, attention_mask=padding_mask).logits.square().mean()
        loss.backward()
        return loss.detach(), grads(model)

    (loss, expected), (other_loss, got) = run(False), run(True)
    assert torch.equal(loss, other_loss)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_cache_while_checkpointing_is_refused(family, make_model, ids):
    model = make_model(family).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="eval"):
        model(ids, use_cache=True)


def test_dropout_follows_the_configuration(family, make_model, ids):
    rates = {
        "llada": ["attention_dropout", "residual_dropout", "embedding_dropout"],
        "llada_moe": ["attention_dropout"],
        "llada2_moe": ["attention_dropout"],
        "fast_dllm_v2": ["attention_dropout"],
        "rotary_encoder": ["attention_dropout", "residual_dropout"],
    }
    for rate in rates[family]:
        model = make_model(family, **{rate: 0.5})
        plain = model(ids).logits
        assert torch.equal(model(ids).logits, plain)
        model.train()
        assert not torch.equal(model(ids).logits, plain)


@torch.no_grad()
def test_bfloat16_stays_close(family, make_model, ids):
    model = make_model(family)
    exact = model(ids).logits
    rough = model.to(torch.bfloat16)(ids).logits
    assert rough.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits and there are three layers: a few percent of the largest logit.
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()


def test_unwrap(family, make_model):
    model = make_model(family)
    assert unwrap(model) is model
    assert unwrap(torch.compile(model)) is model
    roles = spec_of(model).linear_roles
    adapted = get_peft_model(model, LoraConfig(target_modules=[roles["o_proj"]], task_type="CAUSAL_LM"))
    assert unwrap(adapted) is model
    with pytest.raises(TypeError, match="Linear is no model"):
        unwrap(torch.nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="samplers"):
        model.prepare_inputs_for_generation()


def test_forward_through_peft(family, make_model, ids):
    model = make_model(family)
    plain = model(ids).logits
    roles = spec_of(model).linear_roles
    adapted = get_peft_model(model, LoraConfig(target_modules=[roles["o_proj"]], task_type="CAUSAL_LM"))
    assert torch.equal(adapted(input_ids=ids, logit_positions=None).logits, plain)
    adapted(input_ids=ids, logit_positions=torch.tensor([1, 2])).logits.sum().backward()
    assert all("lora" in name for name in grads(adapted))


def test_refusals(family, make_model, ids):
    model = make_model(family)
    with pytest.raises(ValueError, match="labels"):
        model(ids, labels=ids)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="return_dict"):
        model(ids, return_dict=False)
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(TypeError):
        model(ids, unknown_argument=1)


def test_model_with_position_ids(family, make_model, ids):
    model = make_model(family, dtype=torch.float64)
    shifted = model(ids, position_ids=torch.arange(7)[None] + 5).logits
    # Rotary positions are relative: a common shift changes nothing but rounding.
    torch.testing.assert_close(shifted, model(ids).logits, atol=1e-9, rtol=0)
    turned = model(ids, position_ids=torch.arange(7).flip(0)[None]).logits
    assert (turned - shifted).abs().max() > 1e-3
