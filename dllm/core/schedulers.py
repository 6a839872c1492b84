"""Masking schedules alpha(t): the probability that a token is still visible at time t in [0, 1].

alpha falls from 1 at t = 0 (clean) to 0 at t = 1 (all masked); a maskable token is masked with probability 1 -
alpha(t). A new schedule is a subclass with `alpha` and `alpha_derivative`; it registers itself under its class name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from dllm.utils.parsing import InputError

# Keeps the weight finite at t = 0, where 1 - alpha(t) is 0; at the smallest t in use (1e-3) it changes the weight by
# 0.1 %.
WEIGHT_EPSILON = 1e-6


class BaseAlphaScheduler(ABC):
    """A masking schedule; every method takes and returns a float tensor of any shape (or a float)."""

    registry: dict[str, type[BaseAlphaScheduler]] = {}

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        BaseAlphaScheduler.registry[cls.__name__] = cls

    @abstractmethod
    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Probability that a token is visible at time t, in [0, 1]."""

    @abstractmethod
    def alpha_derivative(self, t: torch.Tensor) -> torch.Tensor:
        """d alpha / dt at time t; never positive."""

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """Loss weight of a masked position: w(t) = -alpha'(t) / (1 - alpha(t) + 1e-6), which is 1 / (t + 1e-6) for the
        linear schedule.

        It turns the mean cross-entropy over masked positions into the negative ELBO (MDLM, arXiv 2406.07524, equation
        10).
        """
        return -self.alpha_derivative(t) / (1 - self.alpha(t) + WEIGHT_EPSILON)


class LinearAlphaScheduler(BaseAlphaScheduler):
    """alpha(t) = 1 - t, the schedule of LLaDA (arXiv 2502.09992)."""

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t

    def alpha_derivative(self, t: torch.Tensor) -> torch.Tensor:
        return -torch.ones_like(t)


class CosineAlphaScheduler(BaseAlphaScheduler):
    """alpha(t) = 1 - cos(pi / 2 * (1 - t)) (MDLM, arXiv 2406.07524)."""

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def alpha_derivative(self, t: torch.Tensor) -> torch.Tensor:
        return -(math.pi / 2) * torch.sin(math.pi / 2 * (1 - t))


def _short(name: str) -> str:
    return name.lower().removesuffix("alphascheduler")


def get_alpha_scheduler_class(name: str) -> type[BaseAlphaScheduler]:
    """The schedule class called `name`: the class name or its short form ("linear", "cosine"), in any case.

    Raises:
        InputError: unknown name; the message lists the known ones.
    """
    by_short_name = {_short(key): cls for key, cls in BaseAlphaScheduler.registry.items()}
    if _short(name) not in by_short_name:
        known = ", ".join(sorted(by_short_name))
        raise InputError(f"unknown masking schedule {name!r}: choose one of {known}")
    return by_short_name[_short(name)]


def make_alpha_scheduler(name: str) -> BaseAlphaScheduler:
    """An instance of the schedule called `name`; see `get_alpha_scheduler_class` for the names."""
    return get_alpha_scheduler_class(name)()
