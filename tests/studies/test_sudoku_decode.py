"""Decoding boards: the published loop, one board at a time, and sums over puzzles."""

import pytest
import torch

from dllm.core.samplers import MDLMSampler
from memdlm.relay import RelayChannel, RelayConfig
from memdlm.relay.sampler import RelayMDLMSampler
from memdlm.studies.sudoku.board import BoardScores, digit_tokenizer, to_ids
from memdlm.studies.sudoku.decode import Solutions, evaluate, solve_with, summarise
from memdlm.studies.sudoku.puzzles import make_puzzles
from memdlm.studies.sudoku.run import make_model

TOKENIZER = digit_tokenizer(85)


def sharp_model(make_options, carries: bool):
    """Random weights in float64, some predictions sure and others not."""
    model = make_model(make_options(), TOKENIZER, seed=3)
    if carries:
        RelayChannel.attach(model, RelayConfig.for_arm("relay", "sudoku"))
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    return model.double().eval()


@torch.no_grad()
def published_loop(model, clues: list[int], tau: float, carries: bool, zeroed: bool) -> tuple[list[int], int]:
    """One board: (tokens, forwards until it is full). Without the sampler, the reveal rules and the channel."""
    backbone, ids = model.backbone, torch.tensor([clues])
    hidden, forwards = torch.zeros(1, len(clues), 32, dtype=torch.float64), 0
    while (ids == 2).any():
        embedded = backbone.embed_tokens(ids)
        if carries:
            embedded = embedded + backbone.relay_layer_norm(hidden)
        output = model(inputs_embeds=embedded, output_hidden_states=True)
        logits, forwards = output.logits[0].clone(), forwards + 1
        if carries and not zeroed:
            # Input of the final norm: what the last layer gives.
            hidden = backbone.layers[-1](
                output.hidden_states[-2],
                attention_mask=None,
                position_embeddings=backbone.rotary_emb(embedded, POSITIONS),
            )
        logits[:, 2] = -torch.inf
        best = logits.softmax(-1).max(-1)
        order = sorted((float(1 - best.values[cell]), cell) for cell in range(16) if ids[0, cell] == 2)
        spent = 0.0
        for rank, (doubt, cell) in enumerate(order):
            spent += doubt
            if rank and spent >= tau:
                break
            ids[0, cell] = best.indices[cell]
    return ids[0].tolist(), forwards


POSITIONS = torch.arange(16)[None]


@pytest.mark.parametrize("carries, zeroed", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("tau", [0.05, 0.6, 3.0])
def test_boards_are_solved_as_published_one_by_one(make_options, carries, zeroed, tau):
    model = sharp_model(make_options, carries)
    clue_ids = to_ids(TOKENIZER, [puzzle.clues for puzzle in make_puzzles(4, 7, (4, 10), seed=1)])
    sampler = RelayMDLMSampler(model, TOKENIZER, zeroed=zeroed) if carries else MDLMSampler(model, TOKENIZER)
    found = solve_with(sampler, clue_ids, tau, batch_size=3)
    wanted = [published_loop(model, clues, tau, carries, zeroed) for clues in clue_ids.tolist()]
    assert found.ids.tolist() == [ids for ids, _ in wanted]
    forwards = [count for _, count in wanted]
    assert found.nfe.tolist() == forwards
    assert found.batch_nfe.tolist() == [max(forwards[i - i % 3 : i - i % 3 + 3]) + 1 for i in range(7)]


def test_what_is_carried_matters(make_options):
    model = sharp_model(make_options, True)
    clue_ids = to_ids(TOKENIZER, [puzzle.clues for puzzle in make_puzzles(4, 7, (8, 10), seed=1)])
    own, control = (solve_with(RelayMDLMSampler(model, TOKENIZER, zeroed=z), clue_ids, 0.6, 7) for z in (False, True))
    assert not torch.equal(own.ids, control.ids)


def test_sums_over_puzzles():
    found = Solutions(torch.zeros(4, 16), torch.tensor([2, 4, 6, 8]), torch.tensor([9, 9, 9, 11]))
    scores = BoardScores(
        torch.tensor([True, False, False, False]),
        torch.tensor([1.0, 0.5, 0.0, 0.5], dtype=torch.float64),
        torch.tensor([True, True, False, False]),
    )
    assert summarise(found, scores) == {
        "num_puzzles": 4,
        "exact": 0.25,
        "token_accuracy": 0.5,
        "legal": 0.5,
        "nfe": 5.0,
        "batch_nfe": 9.5,
    }
    half = summarise(found, scores, torch.tensor([True, False, False, True]))
    assert (half["num_puzzles"], half["exact"], half["nfe"], half["batch_nfe"]) == (2, 0.5, 5.0, 10.0)


def test_tiers_sum_up_to_all_puzzles(make_options):
    model = make_model(make_options(), TOKENIZER, seed=0).eval()
    puzzles = make_puzzles(9, 6, (50, 54), seed=2)
    entries = evaluate(MDLMSampler(model, TOKENIZER), puzzles, TOKENIZER, [0.1, 5.0], batch_size=4)
    assert [entry["tau"] for entry in entries] == [0.1, 5.0]
    for entry in entries:
        parts = entry["by_tier"].values()
        assert sum(part["num_puzzles"] for part in parts) == entry["num_puzzles"] == 6
        for key in ("token_accuracy", "nfe", "batch_nfe"):
            whole = sum(part[key] * part["num_puzzles"] for part in parts) / 6
            assert whole == pytest.approx(entry[key])
    assert entries[1]["nfe"] < entries[0]["nfe"]
