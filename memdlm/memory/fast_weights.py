"""Fast weights: matrices that live outside the module tree and are added to linears by forward hooks.

Shapes: B rows, R rank, P numbers in one memory, G memories (1 for scope batch, B for scope row).
`state_dict()`, `parameters()` and optimizer groups of the model never see them.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dllm.core.noising import make_generator
from dllm.models.backbone import Backbone
from dllm.models.moe import RoutedExperts
from dllm.models.spec import ModelSpec
from dllm.utils.parsing import InputError
from memdlm.memory.config import MemoryConfig


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
            if name.rsplit(".", 1)[-1] in leaves and isinstance(_unwrapped(module), nn.Linear):
                targets[f"{prefix}.{index}.{name}"] = module
    if not targets:
        raise InputError(
            f"mem_inner_target_modules={','.join(roles)} match no linear in the layers from {start} on: "
            "name roles that these layers have, or raise mem_inner_layer_fraction"
        )
    return targets


def base_linear(module: nn.Module) -> nn.Linear:
    """The linear itself, under a PEFT adapter if there is one."""
    linear = _unwrapped(module)
    assert isinstance(linear, nn.Linear)
    return linear


def _unwrapped(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


class LowRank:
    """y += (alpha / R) * (x A^T) B^T with A [R, in] ~ Kaiming-uniform (a = sqrt 5) and B [out, R] = 0 (LoRA, arXiv
    2106.09685)."""

    names = ("A", "B")

    def __init__(self, rank: int, alpha: float) -> None:
        self.rank, self.scale = rank, alpha / rank

    def shapes(self, linear: nn.Linear) -> tuple[tuple[int, int], ...]:
        """Shapes of A and B."""
        return (self.rank, linear.in_features), (linear.out_features, self.rank)

    def bounds(self, linear: nn.Linear) -> tuple[float, ...]:
        """Initial values are U(-bound, bound), for A and B."""
        return 1 / math.sqrt(linear.in_features), 0.0

    def apply(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """What is added to the linear's output [..., out] for its input `x` [..., in]."""
        return _product(_product(x, a) * self.scale, b)  # scaled where it is small


class Dense:
    """y += x D^T with D [out, in] = 0."""

    names = ("D",)

    def shapes(self, linear: nn.Linear) -> tuple[tuple[int, int], ...]:
        """Shape of D."""
        return ((linear.out_features, linear.in_features),)

    def bounds(self, linear: nn.Linear) -> tuple[float, ...]:
        """D starts at zero."""
        return (0.0,)

    def apply(self, x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        """What is added to the linear's output [..., out] for its input `x` [..., in]."""
        return _product(x, d)


ADAPTERS: dict[str, Callable[[MemoryConfig], LowRank | Dense]] = {
    "lora": lambda config: LowRank(config.inner_rank, config.inner_alpha),
    "full": lambda config: Dense(),
}


def repeat_each(values: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """values[..., i] repeated sizes[i] times along the last dimension."""
    return values.repeat_interleave(_constant(sizes, values.device), dim=-1, output_size=sum(sizes))


@functools.lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Kept on the device: copying it there anew in every inner step would wait for the device.
    return torch.tensor(values, device=device)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T: [..., in] -> [..., out] for a shared weight [out, in], or [B, n, in] -> [B, n, out] for one per row."""
    weight = weight.to(x.dtype)
    return F.linear(x, weight) if weight.dim() == 2 else x @ weight.transpose(1, 2)


class FastWeights:
    """Fast weights of a set of linears: y_i = linear_i(x) + adapter(x) while attached and set.

    The values of one memory are ONE flat float32 row of P numbers, first the first matrix of every linear (A_0, A_1,
    ...), then the second of every linear (B_0, B_1, ...): one gradient, one norm kernel per step, one all-reduce. With
    scope "batch" there is one memory for all rows, phi [1, P]; with scope "row" one per sequence, phi [B, P], and
    linears see inputs whose first dimension is the row (routed experts are switched to that form while a memory is in
    place). Set as `shared`, a memory of scope "row" serves all rows of any batch as that of scope "batch" does. Unset
    ("not written") adds nothing: the model is the base model bit for bit.

    Args:
        targets: name -> linear (plain, quantised or PEFT-wrapped).
        routed: the blocks of routed experts among whose linears the targets may be.
        config: adapter, rank, alpha, scope.
        dtype: of the activations; the values are cast to it once when they are set.
    """

    def __init__(
        self,
        targets: Mapping[str, nn.Module],
        routed: Sequence[RoutedExperts],
        config: MemoryConfig,
        dtype: torch.dtype,
    ) -> None:
        self.targets = dict(targets)
        self.routed = list(routed)
        self.adapter = ADAPTERS[config.inner_adapter_type](config)
        self.by_row = config.scope == "row"
        self.dtype = dtype
        linears = [base_linear(module) for module in self.targets.values()]
        self.shapes = [shape for kind in zip(*map(self.adapter.shapes, linears), strict=True) for shape in kind]
        self.bounds = [bound for kind in zip(*map(self.adapter.bounds, linears), strict=True) for bound in kind]
        self.sizes = tuple(rows * columns for rows, columns in self.shapes)
        self.numel = sum(self.sizes)
        self._value: torch.Tensor | None = None
        self._matrices: list[tuple[torch.Tensor, ...]] = []  # of each target
        self._set_by_row = False  # whether what is in place is one memory per row
        self._attached = False

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The matrices A_0, A_1, ..., B_0, B_1, ... as views of `flat` [..., P], each [..., rows, columns]."""
        parts = flat.split(self.sizes, dim=-1)
        return [part.view(*flat.shape[:-1], *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def initial(self, *seed_parts: int | str, device: torch.device | str) -> torch.Tensor:
        """Initial values of one memory, flat float32 [P], from a generator on `device` seeded with `seed_parts`."""
        flat = torch.zeros(self.numel, device=device)
        drawn = [(size, bound) for size, bound in zip(self.sizes, self.bounds, strict=True) if bound]
        if drawn:  # they come first
            sizes, bounds = zip(*drawn, strict=True)
            generator = make_generator(*seed_parts, device=device)
            uniform = torch.rand(sum(sizes), generator=generator, device=device)
            spread = repeat_each(_constant(bounds, flat.device), sizes)
            flat[: sum(sizes)] = (2 * uniform - 1) * spread
        return flat

    def named(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """{"<linear>.A": [..., R, in], "<linear>.B": [..., out, R]} (or ".D") as views of `flat` [..., P]."""
        names = [f"{name}.{which}" for which in self.adapter.names for name in self.targets]
        return dict(zip(names, self.views(flat), strict=True))

    def set(self, flat: torch.Tensor | None, *, shared: bool = False) -> None:
        """Puts `flat` [G, P] in place (a tensor that requires grad gets gradients), or with None takes the memory away.

        Args:
            flat: the values; None unsets.
            shared: with scope "row" and G = 1, this memory for all rows of whatever batch.

        Raises:
            ValueError: a tensor of another shape.
        """
        by_row = self.by_row and not shared
        if flat is not None and (flat.dim() != 2 or flat.shape[1] != self.numel or (len(flat) > 1 and not by_row)):
            wanted = "B" if by_row else "1"
            raise ValueError(f"fast weights are [{wanted}, {self.numel}], got a tensor of shape {list(flat.shape)}")
        self._value = flat
        self._matrices = []
        self._set_by_row = flat is not None and by_row
        if flat is not None:
            matrices = self.views((flat if by_row else flat[0]).to(self.dtype))
            kinds = [matrices[start :: len(self.targets)] for start in range(len(self.targets))]
            self._matrices = [tuple(kind) for kind in kinds]
        for block in self.routed if self.by_row else ():
            block.by_row = self._set_by_row

    @property
    def value(self) -> torch.Tensor | None:
        """phi [G, P], or None while no memory is in place."""
        return self._value

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are in place."""
        return self._attached

    @property
    def is_set(self) -> bool:
        """Whether a memory is in place."""
        return self._value is not None

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
            if self._value is None:
                return None
            (x,) = args
            if self._set_by_row and len(x) != len(self._value):
                raise ValueError(
                    f"a memory of {len(self._value)} rows (mem_scope=row) is in place, the batch has {len(x)}: write "
                    "one for this batch, or reset() it"
                )
            return output + self.adapter.apply(x, *self._matrices[index]).to(output.dtype)

        return hook
