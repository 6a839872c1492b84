"""unroll(): against a loop written out, its gradients, and the reveal rules."""

import pytest
import torch
import torch.nn.functional as F

from dllm.core.noising import make_generator
from dllm.utils.parsing import InputError
from memdlm.relay import RelayConfig, RelayState, RevealRule, unroll

MASK = 39


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(0, 39, (3, 8), generator=generator)
    maskable = torch.ones(3, 8, dtype=torch.bool)
    maskable[:, 0] = False
    return input_ids, maskable


def network_of(model, shift=0):
    def network(step, noised_ids, is_masked, positions):
        return model(noised_ids, logit_positions=positions - shift)

    return network


def run(model, channel, config, rows, state=None, block_size=4, **options):
    input_ids, maskable = rows
    rule = RevealRule(config, block_size, MASK)
    if channel is not None and state is None:
        state = channel.first(*input_ids.shape)
    return unroll(network_of(model), input_ids, maskable, maskable, config, rule, channel, state, **options)


def naive_losses(model, channel, rows, threshold, num_steps):
    """The K losses and the last mask, position by position; blocks of four."""
    input_ids, maskable = rows
    is_masked, hidden, losses = maskable.clone(), torch.zeros(3, 8, channel.size, dtype=torch.float64), []
    for _ in range(num_steps):
        with channel.passing(RelayState(hidden, torch.ones(3, dtype=torch.bool))):
            logits = model(torch.where(is_masked, MASK, input_ids)).logits
        hidden = channel.taken
        places = [(row, column) for row in range(3) for column in range(8) if is_masked[row, column]]
        terms = [-F.log_softmax(logits[place], -1)[input_ids[place]] for place in places]
        losses.append(sum(terms) / len(terms))
        probabilities = torch.softmax(logits.index_fill(2, torch.tensor([MASK]), -torch.inf), -1).amax(-1)
        revealed = []
        for row in range(3):
            for start in (0, 4):
                left = [c for c in range(start, start + 4) if is_masked[row, c]]
                if left:
                    best = max(left, key=lambda c: probabilities[row, c])
                    revealed += [(row, c) for c in left if c == best or probabilities[row, c] > threshold]
        for place in revealed:
            is_masked[place] = False
    return losses, is_masked


@pytest.mark.parametrize("threshold", [0.3, 0.99])
def test_losses_reveals_and_states_are_those_of_the_loop(relay_model, rows, threshold):
    model, channel = relay_model()
    config = RelayConfig(num_steps=3, threshold=threshold)
    made = run(model, channel, config, rows)
    losses, is_masked = naive_losses(model, channel, rows, threshold, 3)
    torch.testing.assert_close(torch.stack(made.losses), torch.stack(losses).detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(made.loss, torch.stack(losses).sum(), rtol=1e-10, atol=0)
    assert torch.equal(made.is_masked, is_masked)
    assert sum(made.num_revealed) == rows[1].sum() - is_masked.sum()
    assert made.mask_ratios[0] == 1


def test_stop_gradient_has_the_same_losses_and_other_gradients(relay_model, rows):
    model, channel = relay_model()
    gradients = {}
    for window in (1, 2):
        model.zero_grad()
        made = run(model, channel, RelayConfig(bptt_window=window), rows)
        made.loss.backward()
        gradients[window] = made.losses, model.backbone.embedding.weight.grad.clone()
    assert torch.equal(torch.stack(gradients[1][0]), torch.stack(gradients[2][0]))
    assert not torch.allclose(gradients[1][1], gradients[2][1])


@pytest.mark.parametrize("window, reaches", [(1, False), (2, True)])
def test_the_gradient_of_the_second_loss_with_respect_to_the_first_state(relay_model, rows, window, reaches):
    model, channel = relay_model()
    taken = []
    input_ids, maskable = rows
    config = RelayConfig(bptt_window=window)

    def network(step, noised_ids, is_masked, positions):
        output = model(noised_ids, logit_positions=positions)
        taken.append((channel.taken, output.logits))
        return output

    rule = RevealRule(config, 4, MASK)
    made = unroll(network, input_ids, maskable, maskable, config, rule, channel, channel.first(3, 8))
    (gradient,) = torch.autograd.grad(taken[1][1].square().sum(), taken[0][0], allow_unused=True)
    assert (gradient is not None and bool(gradient.abs().sum() > 0)) is reaches
    assert made.hidden is not None


@pytest.mark.parametrize("window, crossings", [(1, []), (2, [1, 3]), (3, [1, 2]), (4, [1, 2, 3])])
def test_gradients_flow_through_windows_of_forwards(relay_model, rows, window, crossings):
    """Forward s passes gradient on to forward s + 1 inside a window, and never across its end."""
    model, channel = relay_model()
    states = []

    def network(step, noised_ids, is_masked, positions):
        states.append(channel._state.hidden)
        return model(noised_ids, logit_positions=positions)

    input_ids, maskable = rows
    config = RelayConfig(num_steps=4, bptt_window=window)
    unroll(network, input_ids, maskable, maskable, config, RevealRule(config, 4, MASK), channel, channel.first(3, 8))
    assert [step for step in range(1, 4) if states[step].requires_grad] == crossings


def test_the_share_of_the_gradient_that_comes_through_the_relay(relay_model, rows):
    model, channel = relay_model()
    config = RelayConfig()
    made = run(model, channel, config, rows, watch_gradient=True)
    made.loss.backward()
    kept = []
    input_ids, maskable = rows

    def network(step, noised_ids, is_masked, positions):
        output = model(noised_ids, logit_positions=positions)
        kept.append(channel.taken)
        return output

    again = unroll(
        network, input_ids, maskable, maskable, config, RevealRule(config, 4, MASK), channel, channel.first(3, 8)
    )
    (total,) = torch.autograd.grad(again.loss, kept[0], retain_graph=True)
    # The first loss alone does not go through the relay.
    nll = F.cross_entropy(model.head(kept[0].flatten(0, 1)[maskable.flatten()]), input_ids[maskable])
    (own,) = torch.autograd.grad(nll, kept[0], retain_graph=True)
    relay = total - own
    expected = relay.norm() / (relay.norm() + own.norm())
    torch.testing.assert_close(made.gradients.value(), expected, rtol=1e-8, atol=0)
    assert 0 < float(expected) < 1
    stopped = run(model, channel, RelayConfig(bptt_window=1), rows, watch_gradient=True)
    stopped.loss.backward()
    assert float(stopped.gradients.value()) == 0


def test_the_gate_learns_only_from_forwards_that_have_a_state(make_model, rows):
    from memdlm.relay import RelayChannel

    model = make_model()
    channel = RelayChannel.attach(model, RelayConfig())
    for num_steps, learns in ((1, False), (2, True)):
        model.zero_grad()
        run(model, channel, RelayConfig(num_steps=num_steps), rows).loss.backward()
        assert bool(channel.norm.weight.grad.abs().sum() > 0) is learns
        assert bool(channel.norm.bias.grad.abs().sum() > 0)


def test_a_row_that_is_done_adds_nothing(relay_model, rows):
    model, channel = relay_model()
    input_ids, maskable = rows
    config = RelayConfig(num_steps=2)
    rule = RevealRule(config, 4, MASK)
    is_masked = maskable.clone()
    is_masked[1] = False
    made = unroll(network_of(model), input_ids, maskable, is_masked, config, rule, channel, channel.first(3, 8))
    few = [row for row in (0, 2)]
    alone = unroll(
        network_of(model),
        input_ids[few],
        maskable[few],
        is_masked[few],
        config,
        rule,
        channel,
        channel.first(2, 8),
    )
    torch.testing.assert_close(made.loss, alone.loss, rtol=1e-10, atol=0)
    none = unroll(network_of(model), input_ids, maskable, maskable & False, config, rule, channel, channel.first(3, 8))
    none.loss.backward()
    assert float(none.loss.detach()) == 0 and int(sum(none.num_revealed)) == 0


def test_uniform_states_reveal_nothing(make_model, rows):
    made = run(make_model(), None, RelayConfig.for_arm("mask_uniform"), rows)
    assert int(made.num_revealed[0]) == 0 and torch.equal(made.is_masked, rows[1]) and made.hidden is None


def scores_to_logits(scores, positions):
    """Logits [N, 40] whose largest probability at position i is scores[i]; the mask token has none."""
    probability = scores.reshape(-1)[positions][:, None]
    rest = (1 - probability) / 38
    logits = rest.log().expand(-1, 40).clone()
    logits[:, 5] = probability[:, 0].log()
    logits[:, MASK] = 7.0  # the rule must not count it
    return logits


def test_the_three_rules():
    scores = torch.full((2, 8), 0.1, dtype=torch.float64)
    scores[0, [1, 2, 5]] = torch.tensor([0.9, 0.95, 0.3], dtype=torch.float64)
    scores[1, [4, 7]] = torch.tensor([0.86, 0.85], dtype=torch.float64)
    is_masked = torch.ones(2, 8, dtype=torch.bool)
    is_masked[0, 0] = is_masked[1, 0] = False
    positions = is_masked.reshape(-1).nonzero()[:, 0]
    logits = scores_to_logits(scores, positions)

    def revealed(**settings):
        rule = RevealRule(RelayConfig(**settings), 4, MASK)
        chosen = rule(logits, positions, is_masked, (1, 2))
        return [row.nonzero()[:, 0].tolist() for row in chosen]

    # In every block of four what is surer than 0.85, or the surest.
    assert revealed() == [[1, 2, 5], [1, 4]]
    assert revealed(threshold=0.92) == [[2, 5], [1, 4]]
    # The earliest inner block of two with masks.
    assert revealed(reveal="aligned", inner_block_size=2) == [[1, 5], [1, 4]]
    # The row: 0.05 + 0.10 < 0.16; 0.14 < 0.16 < 0.14 + 0.15.
    assert revealed(reveal="uncertainty", tau=0.16) == [[1, 2], [4]]
    assert revealed(reveal="uncertainty", tau=0.01) == [[2], [4]]


def test_the_jitter_is_one_draw_per_forward_and_repeats():
    rule = RevealRule(RelayConfig(reveal="uncertainty", tau=0.15, tau_jitter=0.1), None, MASK)
    draws = [rule.tau((1, step)) for step in range(200)]
    assert draws == [rule.tau((1, step)) for step in range(200)]
    raw = torch.tensor([float(torch.randn((), generator=make_generator(1, s, "tau"))) for s in range(200)])
    torch.testing.assert_close(torch.tensor(draws), (0.15 + 0.1 * raw).clamp(min=0), rtol=1e-5, atol=1e-7)
    assert min(draws) == 0 and max(draws) > 0.3
    assert RevealRule(RelayConfig(reveal="uncertainty"), None, MASK).tau((1, 2)) == 0.15


def test_inner_blocks_that_do_not_divide_the_block_are_refused():
    with pytest.raises(InputError, match=r"relay_inner_block_size=3 does not divide the block size 32: .* 1, 2, 4, 8"):
        RevealRule(RelayConfig(reveal="aligned", inner_block_size=3), 32, MASK)
