"""Fast weights: low-rank matrices that live outside the module tree and are added to linears by forward hooks.

Shapes: T adapted linears, R rank, P numbers in all fast weights; linear i maps in_i -> out_i features.
`state_dict()`, `parameters()` and optimizer groups of the model never see them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dllm.core.noising import make_generator
from dllm.models.backbone import Backbone
from dllm.models.spec import ModelSpec
from dllm.utils.parsing import InputError


def first_adapted_layer(num_layers: int, fraction: float) -> int:
    """Index of the first layer with fast weights: max(0, int(num_layers * (1 - fraction))).

    Raises:
        InputError: the fraction is so small that no layer is left.
    """
    start = max(0, int(num_layers * (1 - fraction)))
    if start >= num_layers:
        raise InputError(
            f"mem_inner_layer_fraction={fraction} of {num_layers} layers leaves none: use at least {1 / num_layers:.3g}"
        )
    return start


def find_targets(backbone: Backbone, spec: ModelSpec, roles: tuple[str, ...], start: int) -> dict[str, nn.Module]:
    """The linears with one of `roles` in layers `start` and up, by their name inside the backbone, in module order.

    A linear under PEFT is taken with its adapter around it. A quantised linear is a linear.

    Raises:
        InputError: an unknown role (the known ones are listed), or no such linear in these layers.
    """
    unknown = [role for role in roles if role not in spec.linear_roles]
    if unknown:
        known = ", ".join(spec.linear_roles)
        raise InputError(f"unknown mem_inner_target_modules {', '.join(unknown)}: choose from {known}")
    leaves = {spec.linear_roles[role] for role in roles}
    prefix = spec.layers.split(".", 1)[1]  # the layers' name as seen from the backbone
    targets: dict[str, nn.Module] = {}
    for index, layer in enumerate(backbone.layers):
        if index < start:
            continue
        for name, module in layer.named_modules():
            if name.rsplit(".", 1)[-1] in leaves and isinstance(_base_linear(module), nn.Linear):
                targets[f"{prefix}.{index}.{name}"] = module
    if not targets:
        raise InputError(
            f"mem_inner_target_modules={','.join(roles)} match no linear in the layers from {start} on: "
            "name roles that these layers have, or raise mem_inner_layer_fraction"
        )
    return targets


def _base_linear(module: nn.Module) -> nn.Module:
    """The layer under a PEFT adapter; any other module is returned as it is."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


class FastWeights:
    """LoRA fast weights for a set of linears: y_i = linear_i(x) + (alpha / R) * (x A_i^T) B_i^T while attached and set.

    All values are kept as ONE flat float32 tensor [P], in the order A_0, B_0, A_1, B_1, ...: one gradient, one norm
    kernel per step, one all-reduce. A_i is [R, in_i], B_i is [out_i, R]. They are applied in the dtype of the
    activation. Unset ("not written") adds nothing: the model is the base model bit for bit.

    Args:
        targets: name -> linear (plain, quantised or PEFT-wrapped).
        rank: R.
        alpha: LoRA alpha.
    """

    def __init__(self, targets: Mapping[str, nn.Module], rank: int, alpha: float) -> None:
        self.targets = dict(targets)
        self.scale = alpha / rank
        self.shapes: list[tuple[int, int]] = []
        for module in self.targets.values():
            linear = _base_linear(module)
            assert isinstance(linear, nn.Linear)
            self.shapes += [(rank, linear.in_features), (linear.out_features, rank)]
        self.sizes = [rows * columns for rows, columns in self.shapes]
        self.numel = sum(self.sizes)
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._attached = False

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The matrices A_0, B_0, A_1, ... as views of `flat` [P]."""
        parts = flat.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def initial(self, *seed_parts: int | str, device: torch.device | str) -> torch.Tensor:
        """phi_0, flat float32 [P]: A ~ Kaiming-uniform with a = sqrt 5, i.e. U(-1/sqrt(in), 1/sqrt(in)), and B = 0.

        Drawn from a generator on `device` seeded with `seed_parts` alone.
        """
        generator = make_generator(*seed_parts, device=device)
        flat = torch.zeros(self.numel, device=device)
        for matrix in self.views(flat)[::2]:
            bound = 1 / math.sqrt(matrix.shape[1])
            matrix.uniform_(-bound, bound, generator=generator)
        return flat

    def named(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """{"<linear>.A": [R, in], "<linear>.B": [out, R]} as views of `flat` [P]."""
        names = [f"{name}.{which}" for name in self.targets for which in "AB"]
        return dict(zip(names, self.views(flat), strict=True))

    def set(self, flat: torch.Tensor | None) -> None:
        """Puts `flat` [P] in place (a tensor that requires grad gets gradients), or with None takes the memory away."""
        if flat is None:
            self._pairs = None
            return
        if flat.shape != (self.numel,):
            raise ValueError(f"fast weights have {self.numel} numbers, got a tensor of shape {tuple(flat.shape)}")
        matrices = self.views(flat)
        self._pairs = list(zip(matrices[::2], matrices[1::2], strict=True))

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are in place."""
        return self._attached

    @property
    def is_set(self) -> bool:
        """Whether a memory is in place."""
        return self._pairs is not None

    @contextlib.contextmanager
    def attached(self) -> Iterator[FastWeights]:
        """Hooks on the linears for the time of the block; leaving it, also by an exception, unsets the memory and
        removes them.

        Raises:
            RuntimeError: already attached.
        """
        if self._attached:
            raise RuntimeError(
                "these fast weights are already attached: leave the first `attached()` block before a second"
            )
        handles = [
            module.register_forward_hook(self._make_hook(index)) for index, module in enumerate(self.targets.values())
        ]
        self._attached = True
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._attached = False
            self.set(None)

    def _make_hook(self, index: int):
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if self._pairs is None:
                return None
            (x,) = args
            a, b = self._pairs[index]
            low = F.linear(x, a.to(x.dtype))  # [..., R]
            return output + (F.linear(low, b.to(x.dtype)) * self.scale).to(output.dtype)

        return hook
