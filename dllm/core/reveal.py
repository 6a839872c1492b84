"""Which masked positions a denoising step commits: how many, by which confidence. No loops over rows, no draws without
a generator or a key.

Shapes: B rows, L positions, V vocabulary, S steps, K blocks of a row, s positions of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch

from dllm.core.losses import chunk_rows

Remasking = Literal["low_confidence", "random", "margin", "entropy"]
# Which positions to commit: (scores [rows, n], allowed bool [rows, n]) -> bool [rows, n].
RevealRule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def get_num_transfer_tokens(num_masked: torch.Tensor, steps: int | torch.Tensor) -> torch.Tensor:
    """How many tokens each row commits at each step: int64 [B, S], row sums equal `num_masked`, earlier steps take the
    remainder.

    Args:
        num_masked: int64 [B].
        steps: S, at least 1; or each row's own number, int64 [B] on the CPU (S is then the largest).

    Raises:
        ValueError: steps below 1.
    """
    each = torch.as_tensor(steps, device=num_masked.device).expand_as(num_masked)  # [B]
    most = int(torch.as_tensor(steps).max())
    if bool((torch.as_tensor(steps) < 1).any()):
        raise ValueError(f"steps must be at least 1, got {steps}")
    step = torch.arange(most, device=num_masked.device)[None, :]  # [1, S]
    share, rest = (num_masked // each)[:, None], (num_masked % each)[:, None]  # [B, 1]
    return torch.where(step < each[:, None], share + (step < rest), 0)


def add_gumbel_noise(
    logits: torch.Tensor, temperature: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Logits whose argmax is a sample from softmax(logits / temperature); the logits themselves at temperature 0
    (nothing is drawn).

    Computed in float64: in lower precision the noise of the maximum is distorted and sampling collapses (arXiv
    2409.02908).
    """
    if temperature == 0:
        return logits
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float64)
    return perturb(logits, temperature, uniform)


def perturb(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """logits / temperature - log(-log(u)), float64: Gumbel noise made from uniform draws u in [0, 1), of the same
    shape."""
    # u = 0 would give an infinite Gumbel value.
    gumbel = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))
    return logits.double() / temperature + gumbel


def hashed_uniform(keys: torch.Tensor) -> torch.Tensor:
    """A uniform draw in (0, 1) that is a fixed function of each key: float64, of the shape of `keys`.

    The draws of a row depend on nothing but its keys, so neither on the rows beside it nor on the device, and need no
    loop over generators. SplitMix64's output function (doi 10.1145/2660193.2660195); the upper 53 bits are used.

    Args:
        keys: int64; different draws need different keys (see `mix_keys`).
    """
    return (_shift(_splitmix(keys), 11).double() + 0.5) * 2.0**-53


def mix_keys(keys: torch.Tensor, counter: torch.Tensor | int) -> torch.Tensor:
    """Keys of further draws, int64 of the broadcast shape: one for every (key, counter)."""
    # As a tensor: its product wraps around, that of a Python number does not.
    return _splitmix(keys + _GOLDEN * (torch.as_tensor(counter, device=keys.device) + 1))


_GOLDEN, _FIRST, _SECOND = (
    value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # as signed numbers; products wrap around


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x >> bits with zeros from the left (torch repeats the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def propose(
    logits: torch.Tensor,
    remasking: Remasking = "low_confidence",
    temperature: float = 0.0,
    keys: torch.Tensor | None = None,
    banned: torch.Tensor | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, how sure the model is of them): int64 [N] and float [N], float32 or wider.

    The token is the argmax, or at a temperature a draw from softmax(logits / temperature); the score is `confidence`
    of the logits without noise. A chunk of positions at a time, like `dllm.core.losses.token_nll`.

    Args:
        logits: [N, V].
        remasking: see `confidence`.
        temperature: 0 draws nothing.
        keys: int64 [N], one for the draws of each position; needed at a temperature and by "random".
        banned: int64 ids that are never proposed and have no probability.
        top_k, top_p: at a temperature draw only among the k likeliest tokens, and among the likeliest ones that
            together hold the share p of softmax(logits / temperature); None: among all. The score does not change.
    """
    rows = chunk_rows(logits.shape[-1], logits.device)
    tokens, scores = [], []
    for start in range(0, len(logits), rows):
        part = logits[start : start + rows]
        part = part.to(torch.promote_types(part.dtype, torch.float32), copy=banned is not None)
        own = None if keys is None else keys[start : start + rows]
        if banned is not None:
            part[:, banned] = -torch.inf
        noisy = part
        if temperature > 0:
            assert own is not None
            each = mix_keys(own[:, None], torch.arange(1, part.shape[-1] + 1, device=part.device))  # [n, V]
            noisy = perturb(narrow(part, temperature, top_k, top_p), temperature, hashed_uniform(each))
        chosen = noisy.argmax(dim=-1)
        tokens.append(chosen)
        if remasking == "random":
            assert own is not None
            scores.append(hashed_uniform(mix_keys(own, 0)))
        else:
            scores.append(confidence(part, chosen, remasking))
    if not tokens:
        return logits.new_zeros(0, dtype=torch.int64), logits.new_zeros(0, dtype=torch.float32)
    return torch.cat(tokens), torch.cat(scores)


def narrow(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """`logits` [..., V] with -inf at all tokens but the `top_k` likeliest, and of those the fewest likeliest that hold
    the share `top_p` of softmax(logits / temperature); None leaves them."""
    if top_k is not None:
        best = logits.topk(min(top_k, logits.shape[-1]), dim=-1).indices  # by rank: values may be tied
        is_best = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)
        logits = logits.masked_fill(~is_best, -torch.inf)
    if top_p is not None:
        sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
        shares = torch.softmax(sorted_logits / temperature, dim=-1)
        beyond = shares.cumsum(dim=-1) - shares >= top_p  # the tokens before it suffice
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits


def confidence(
    logits: torch.Tensor, tokens: torch.Tensor, remasking: Remasking, generator: torch.Generator | None = None
) -> torch.Tensor:
    """How sure the model is of each proposed token, higher is surer: float [...], float32 or wider.

    "low_confidence" p(token); "margin" p of the best minus p of the second; "entropy" minus the entropy of p; "random"
    a uniform draw.

    Args:
        logits: [..., V].
        tokens: int64 [...].
        remasking: which of the four.
        generator: needed by "random".
    """
    if remasking == "random":
        return torch.rand(tokens.shape, generator=generator, device=tokens.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if remasking == "low_confidence":
        return (logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(dim=-1)).exp()
    if remasking == "margin":
        best = (logits.topk(2, dim=-1).values - logits.logsumexp(dim=-1, keepdim=True)).exp()
        return best[..., 0] - best[..., 1]
    if remasking == "entropy":
        probabilities = torch.softmax(logits, dim=-1)
        return (probabilities * torch.log(probabilities.clamp(min=1e-20))).sum(dim=-1)
    raise ValueError(f"unknown remasking {remasking!r}: choose one of {', '.join(get_args(Remasking))}")


def choose_positions(scores: torch.Tensor, allowed: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The `counts[b]` allowed positions of row b with the highest scores: bool [B, L]; ties go to the lower position.

    Rows with fewer allowed positions than their count give all of them.

    Args:
        scores: float [B, L].
        allowed: bool [B, L].
        counts: int64 [B].
    """
    ranked = torch.where(allowed, scores, torch.full_like(scores, -torch.inf))
    order = ranked.argsort(dim=1, descending=True, stable=True)  # [B, L]
    rank = order.argsort(dim=1)  # [B, L], 0 for the best position
    return allowed & (rank < counts[:, None])


def choose_above(scores: torch.Tensor, allowed: torch.Tensor, threshold: float) -> torch.Tensor:
    """Allowed positions whose score exceeds `threshold`, and in every row at least the best allowed one: bool [B,
    L]."""
    best = choose_positions(scores, allowed, torch.ones(scores.shape[0], dtype=torch.int64, device=scores.device))
    return best | (allowed & (scores > threshold))


def choose_within(scores: torch.Tensor, allowed: torch.Tensor, max_uncertainty: float | torch.Tensor) -> torch.Tensor:
    """The surest allowed positions of every row whose 1 - score add up to less than `max_uncertainty`, as many as do,
    and at least the best allowed one: bool [B, L]; ties go to the lower position.

    Sorted by 1 - score, that is the longest prefix with a sum strictly below it (Relay, arXiv 2605.22967, Sudoku).

    Args:
        scores: probabilities, float [B, L].
        allowed: bool [B, L].
        max_uncertainty: a number, or a tensor without dimensions; from 0 on down the best one alone is chosen.
    """
    # Sums must not fall again: rounding may put a probability a little above 1.
    doubts = torch.where(allowed, (1 - scores).clamp(min=0), torch.inf)
    counts = (doubts.sort(dim=1).values.cumsum(dim=1) < max_uncertainty).sum(dim=1)  # [B]
    return choose_positions(scores, allowed, counts.clamp(min=1))


def earliest_part(allowed: torch.Tensor, part_size: int) -> torch.Tensor:
    """`allowed` [B, L] inside the earliest of its parts of `part_size` positions that has any, False outside: bool [B,
    L]."""
    first = allowed.int().argmax(dim=1, keepdim=True) // part_size  # [B, 1]
    return allowed & (torch.arange(allowed.shape[1], device=allowed.device) // part_size == first)


def choose_in_blocks(
    rule: RevealRule, scores: torch.Tensor, allowed: torch.Tensor, block_size: int, part_size: int | None = None
) -> torch.Tensor:
    """What `rule` chooses in each block of a row by itself, in all blocks at once: bool [B, L].

    The same as `rule` on every slice [:, k * block_size : (k + 1) * block_size]; the last block may be shorter. A rule
    that commits at least the best position of a row so commits at least the best one of every block.

    Args:
        rule: applied to [B * K, s]; for example `lambda scores, allowed: choose_above(scores, allowed, 0.85)`.
        scores: float [B, L].
        allowed: bool [B, L].
        block_size: s, at least 1; blocks are counted from the first position.
        part_size: only the earliest part of this many positions that has an allowed one may be chosen from, in each
            block (`earliest_part`); a divisor of block_size. None: the whole block.

    Raises:
        ValueError: block_size below 1, or a part_size that does not divide it.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if part_size is not None and (part_size < 1 or block_size % part_size):
        raise ValueError(f"part_size={part_size} does not divide block_size={block_size}: choose a divisor")
    num_rows, length = scores.shape
    missing = (0, -length % block_size)
    scores = torch.nn.functional.pad(scores, missing).view(-1, block_size)  # [B * K, s]
    allowed = torch.nn.functional.pad(allowed, missing).view(-1, block_size)
    if part_size is not None:
        allowed = earliest_part(allowed, part_size)
    return rule(scores, allowed).view(num_rows, -1)[:, :length]
