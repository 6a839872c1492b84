"""Small models with a relay whose gate is open, and what a forward with a state should be, written out naively."""

import pytest
import torch

from memdlm.relay import RelayChannel, RelayConfig


@pytest.fixture
def relay_model(make_model):
    """A function (family, preset, dtype, **settings) -> (model with a random relay norm, its channel)."""

    def make(family="llada_moe", preset="llm", dtype=torch.float64, block_size=None, **settings):
        model = make_model(family).to(dtype)
        channel = RelayChannel.attach(model, RelayConfig.for_arm("relay", preset, **settings), block_size=block_size)
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in channel.norm.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
        return model, channel

    return make


@pytest.fixture
def draw():
    """A function (*shape) -> float64 normal draws, new ones at each call."""
    generator = torch.Generator().manual_seed(23)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def ids():
    """[3, 8] tokens of the tiny models (vocabulary 40), some of them masked (39)."""
    generator = torch.Generator().manual_seed(31)
    tokens = torch.randint(0, 39, (3, 8), generator=generator)
    return tokens.masked_fill(torch.rand(3, 8, generator=generator) < 0.5, 39)
