"""Mixture of experts against the naive sum, experts by row, gradients of every parameter, router losses."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from dllm.models.layers import SwiGLU
from dllm.models.moe import GroupedMoE, RoutedExperts, RouterRecorder, SparseMoE, load_balancing_loss, run_experts


def naive(moe: SparseMoE, x: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, in float64, one token at a time."""
    rows = []
    for token in x.double().reshape(-1, x.shape[-1]):
        logits = [float(token @ row) for row in moe.gate.weight.detach()]
        scale = sum(math.exp(value) for value in logits)
        scores = [math.exp(value) / scale for value in logits]
        if moe.expert_bias is not None:
            scores = [score + float(bias) for score, bias in zip(scores, moe.expert_bias, strict=True)]
        best = sorted(range(len(scores)), key=lambda e: -scores[e])[: moe.top_k]
        rows.append(sum(scores[e] * moe.experts[e](token) for e in best))
    return torch.stack(rows).view(x.shape)


def make(num_experts=5, top_k=2, expert_bias=False) -> SparseMoE:
    moe = SparseMoE(6, 4, num_experts, top_k, layer_idx=0, expert_bias=expert_bias).double()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_()
        if moe.expert_bias is not None:
            moe.expert_bias.normal_()
    return moe


@pytest.mark.parametrize("expert_bias", [False, True])
@pytest.mark.parametrize("num_experts, top_k", [(5, 2), (3, 3), (40, 1)])
def test_dispatch_is_the_naive_mixture(num_experts, top_k, expert_bias):
    moe = make(num_experts, top_k, expert_bias)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    # Router scores are float64 here, so only the order of sums differs.
    torch.testing.assert_close(moe(x), naive(moe, x), atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(moe(x), naive(moe, x), atol=1e-12, rtol=1e-12)


def test_gradient_of_the_dispatch():
    moe = make(num_experts=3, top_k=2)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moe, (x,))


@pytest.mark.parametrize("rows, full, empty", [(None, (4, 2), (0, 2)), (2, (2, 2, 2), (2, 0, 2))])
def test_empty_experts_run_only_under_gradients(rows, full, empty):
    calls = []

    class Counted(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.index, self.linear = index, nn.Linear(2, 2)

        def forward(self, x):
            calls.append((self.index, tuple(x.shape)))
            return self.linear(x)

    experts = nn.ModuleList(Counted(i) for i in range(3))
    x, weights, chosen = torch.randn(4, 2), torch.ones(4, 1), torch.full((4, 1), 1)
    with torch.no_grad():
        run_experts(experts, x, weights, chosen, rows)
    assert calls == [(1, full)]
    calls.clear()
    run_experts(experts, x, weights, chosen, rows).sum().backward()
    assert calls == [(0, empty), (1, full), (2, empty)]
    assert all(parameter.grad is not None for parameter in experts.parameters())


def uneven_choice(rows: int, length: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, chosen) [rows * length, top_k] for 4 experts: expert 2 has tokens of row 1 alone, expert 3 none."""
    scores = torch.rand(rows, length, 4, dtype=torch.float64)
    scores[..., 2:] = 0
    scores[1, : length // 2, 2] = 2
    weights, chosen = scores.flatten(0, 1).topk(top_k, dim=-1)
    return weights, chosen


@pytest.mark.parametrize("top_k", [1, 2])
def test_by_row_is_the_default_path(top_k):
    # Biases make the results at padding non-zero: dropped they count in no value and no gradient.
    experts = nn.ModuleList(nn.Linear(6, 6) if e % 2 else SwiGLU(6, 4) for e in range(4)).double()
    x = torch.randn(21, 6, dtype=torch.float64)
    weights, chosen = uneven_choice(3, 7, top_k)
    results = []
    for rows in (None, 3):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = run_experts(experts, leaves[0], leaves[1], chosen, rows)
        results.append([y, *torch.autograd.grad(y.square().sum(), [*leaves, *experts.parameters()])])
    # Only the order of sums differs.
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2])
def test_chunks_by_row_hold_the_tokens_of_the_row_in_order(top_k):
    chunks = []

    class Recording(nn.Module):
        def forward(self, x):
            chunks.append(x)
            return x + 1  # not zero at padding

    x = torch.randn(21, 6)
    weights, chosen = uneven_choice(3, 7, top_k)
    y = run_experts(nn.ModuleList(Recording() for _ in range(4)), x, weights, chosen, rows=3)
    torch.testing.assert_close(y, (x + 1) * weights.sum(1, keepdim=True).float())
    for e, chunk in enumerate(chunks):
        expected = [[x[7 * b + i] for i in range(7) if e in chosen[7 * b + i]] for b in range(3)]
        longest = max(len(tokens) for tokens in expected)
        padded = [tokens + [torch.zeros(6)] * (longest - len(tokens)) for tokens in expected]
        assert chunk.shape == (3, longest, 6)
        assert all(torch.equal(chunk[b, n], padded[b][n]) for b in range(3) for n in range(longest))
    assert chunks[2][1].any() and not chunks[2][[0, 2]].any() and chunks[3].numel() == 0


def row_weights(moe: SparseMoE, deltas: torch.Tensor) -> None:
    """Adds deltas [B, F, D] to the gate projections by a hook: row b of the input meets deltas[b]."""
    for expert in moe.experts:
        expert.gate_proj.register_forward_hook(lambda _module, args, y: y + args[0] @ deltas.mT)


@pytest.mark.parametrize("num_experts, top_k", [(5, 2), (5, 1), (40, 1)])
def test_rows_with_weights_of_their_own_are_single_rows(num_experts, top_k):
    moe = make(num_experts, top_k)
    moe.by_row = True
    x, deltas = torch.randn(3, 7, 6, dtype=torch.float64), torch.randn(3, 4, 6, dtype=torch.float64)
    together, alone = copy.deepcopy(moe), [copy.deepcopy(moe) for _ in range(3)]
    row_weights(together, deltas)
    for b in range(3):
        row_weights(alone[b], deltas[b : b + 1])
    y = together(x)
    assert not torch.allclose(y, moe(x))
    torch.testing.assert_close(y, torch.cat([alone[b](x[b : b + 1]) for b in range(3)]), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("top_k", [1, 2])
def test_block_by_row_is_the_default_block(rows, top_k):
    moe = make(top_k=top_k, expert_bias=True)
    assert isinstance(moe, RoutedExperts) and not moe.by_row
    x = torch.randn(rows, 7, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for by_row in (False, True):
        moe.by_row = by_row
        y = moe(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *moe.parameters()])])
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=1e-12)


def test_by_row_has_a_gradient_of_the_gradient():
    moe = make(num_experts=3, top_k=2)
    moe.by_row = True
    x = torch.randn(2, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moe, (x,)) and torch.autograd.gradgradcheck(moe, (x,))


def test_by_row_in_bfloat16():
    moe = make().bfloat16()
    x = torch.randn(3, 7, 6, dtype=torch.bfloat16)
    expected = moe(x)
    moe.by_row = True
    y = moe(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and all(parameter.grad is not None for parameter in moe.parameters())
    torch.testing.assert_close(y, expected)


def test_rows_have_one_length():
    with pytest.raises(ValueError, match="4 tokens are not 3 rows"):
        run_experts(nn.ModuleList([nn.Identity()]), torch.ones(4, 2), torch.ones(4, 1), torch.zeros(4, 1).long(), 3)


@pytest.mark.parametrize("by_row", [False, True])
def test_the_device_is_read_once(by_row):
    reads = []

    class Reads(TorchFunctionMode):
        """Reads from Python; on the CPU tolist dispatches nothing."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
                reads.append(func)
            return func(*args, **(kwargs or {}))

    class Waits(TorchDispatchMode):
        """Operations that read a number (item, bool, int), or whose result's size is in the values."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
            if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave"):
                reads.append(func)
            return func(*args, **(kwargs or {}))

    moe = make()
    moe.by_row = by_row
    with Reads(), Waits():
        moe(torch.randn(3, 7, 6, dtype=torch.float64)).sum().backward()
    assert reads == [torch.Tensor.tolist]


def test_every_parameter_gets_a_gradient(make_model):
    model = make_model("llada_moe", num_experts=40, num_experts_per_tok=1)  # 3 tokens cannot reach 40 experts
    model(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    empty = [e for e in model.backbone.layers[1].mlp.experts if not e.gate_proj.weight.grad.any()]
    assert len(empty) >= 37


def test_all_parameters_of_the_dense_family_get_a_gradient(make_model, ids):
    model = make_model("llada")
    model(ids).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss(masked):
    layers, rows, length, num_experts, top_k = 3, 2, 5, 7, 3
    logits = tuple(torch.randn(rows * length, num_experts) for _ in range(layers))
    choices = tuple(layer.softmax(-1).topk(top_k, dim=-1).indices for layer in logits)
    mask = torch.ones(rows, length, dtype=torch.int64)
    if masked:
        mask[1, 3:] = 0
    expected = load_balancing_loss_func(logits, num_experts, top_k, mask if masked else None)
    got = load_balancing_loss(logits, choices, mask.flatten().bool() if masked else None)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_even_experts_give_k():
    choices = (torch.arange(12).view(6, 2) % 4,)
    assert load_balancing_loss((torch.zeros(6, 4),), choices).item() == pytest.approx(2.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_router_loss_of_the_model(make_model, ids, padding_mask, checkpointing):
    model = make_model("llada_moe").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    output = model(ids, attention_mask=padding_mask, output_router_logits=True)
    assert [tuple(x.shape) for x in output.router_logits] == [(21, 5), (21, 5)]  # the first layer is dense
    expected = load_balancing_loss_func(output.router_logits, 5, 2, padding_mask)
    torch.testing.assert_close(output.aux_loss, expected, atol=1e-6, rtol=1e-6)
    output.aux_loss.backward()
    got = [model.backbone.layers[i].mlp.gate.weight.grad for i in (1, 2)]
    plain = make_model("llada_moe")
    plain(ids, attention_mask=padding_mask, output_router_logits=True).aux_loss.backward()
    for index, gradient in zip((1, 2), got, strict=True):
        assert gradient.any() and torch.equal(gradient, plain.backbone.layers[index].mlp.gate.weight.grad)


def test_router_loss_trains(make_model, ids):
    model = make_model("llada_moe", output_router_logits=True)
    optimizer = torch.optim.SGD([layer.mlp.gate.weight for layer in model.backbone.layers[1:]], lr=0.3)
    losses = []
    for _ in range(30):
        loss = model(ids).aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_no_router_loss_unless_asked(make_model, ids):
    output = make_model("llada_moe")(ids)
    assert output.aux_loss is None and output.router_logits is None
    with pytest.raises(ValueError, match="no routed experts"):
        make_model("llada")(ids, output_router_logits=True)


def test_a_closed_recorder_takes_nothing():
    recorder = RouterRecorder()
    first, second = torch.zeros(1, 2), torch.ones(1, 2)
    recorder.record(1, first, first)
    recorder.record(1, second, second)
    recorder.record(0, second, second)
    logits, _ = recorder.close()
    assert torch.equal(torch.stack(logits), torch.stack([second, first]))
    recorder.record(2, second, second)
    assert len(recorder.close()[0]) == 2


def test_swiglu():
    layer = SwiGLU(3, 5).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    gate, up = x @ layer.gate_proj.weight.T, x @ layer.up_proj.weight.T
    expected = (gate / (1 + torch.exp(-gate)) * up) @ layer.down_proj.weight.T
    torch.testing.assert_close(layer(x), expected, atol=1e-14, rtol=1e-12)


def test_the_router_is_no_linear(make_model):
    model = make_model("llada_moe")
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert not any(name.endswith("mlp.gate") for name in linears)
    assert model.backbone.layers[1].mlp.gate.weight.shape == (5, 24)


def naive_grouped(moe: GroupedMoE, x: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, one token at a time: LLaDA2's choice within groups."""
    rows = []
    size = len(moe.experts) // moe.num_groups
    for token in x.double().reshape(-1, x.shape[-1]):
        scores = [1 / (1 + math.exp(-float(token @ row))) for row in moe.gate.weight.detach()]
        ranks = [score + float(bias) for score, bias in zip(scores, moe.gate.expert_bias, strict=True)]
        groups = [sorted(ranks[g * size : (g + 1) * size])[-2:] for g in range(moe.num_groups)]
        best = sorted(range(moe.num_groups), key=lambda g: -sum(groups[g]))[: moe.top_groups]
        allowed = [e for e in range(len(ranks)) if e // size in best]
        chosen = sorted(allowed, key=lambda e: -ranks[e])[: moe.top_k]
        total = sum(scores[e] for e in chosen) if moe.top_k > 1 else 1
        mixed = sum(moe.scale * scores[e] / total * moe.experts[e](token) for e in chosen)
        rows.append(mixed + (moe.shared_experts(token) if moe.shared_experts is not None else 0))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    "top_k, groups, top_groups, shared", [(2, 3, 2, 4), (1, 3, 1, None), (4, 2, 1, 8), (3, 1, 1, 4)]
)
def test_grouped_dispatch_is_the_naive_mixture(top_k, groups, top_groups, shared, by_row):
    moe = GroupedMoE(
        6, 4, 12, top_k, 0, num_groups=groups, top_groups=top_groups, scale=2.5, shared_width=shared
    ).double()
    with torch.no_grad():
        for tensor in (*moe.parameters(), moe.gate.expert_bias):
            tensor.normal_()
    moe.by_row = by_row
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(moe(x), naive_grouped(moe, x), atol=1e-12, rtol=1e-12)


def test_the_bias_of_the_group_router_enters_the_choice_alone():
    moe = GroupedMoE(6, 4, 4, 1, 0, num_groups=1, top_groups=1, scale=1.0, shared_width=None).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        moe.gate.expert_bias[2] = 10.0
    recorder = RouterRecorder()
    y = moe(x, recorder)
    (logits,), (chosen,) = recorder.close()
    assert (chosen == 2).all()
    torch.testing.assert_close(y[0], logits[:, 2:3].sigmoid() * moe.experts[2](x[0]), atol=1e-12, rtol=1e-12)
    assert "expert_bias" in moe.gate.state_dict()


def test_load_balancing_loss_of_sigmoid_scores():
    logits = torch.randn(10, 6)
    chosen = logits.topk(2, dim=-1).indices
    p = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    share = torch.bincount(chosen.flatten(), minlength=6) / 10
    got = load_balancing_loss((logits,), (chosen,), scores="sigmoid")
    torch.testing.assert_close(got, 6 * (share * p.mean(0)).sum())
