"""The inner loop against a naive version: whole forwards with merged weights, in float64, one memory at a time."""

import dataclasses
import itertools
import math

import pytest
import torch

from dllm.core.schedulers import LinearAlphaScheduler
from dllm.data.collators import PaddingCollator
from dllm.models import get_spec, spec_of
from memdlm.memory.collator import MemoryCollator, inner_plan
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric import ParametricMemory
from memdlm.memory.plan import InnerPlan

FAMILIES = ["llada", "llada_moe", "fast_dllm_v2"]
MASK = 39


def _plan(config: MemoryConfig, family: str, lengths=(9, 6, 7)) -> InnerPlan:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, 38, (length,), generator=generator).tolist()
        prompt = 2 + index
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "example_id": index})
    collator = MemoryCollator(
        PaddingCollator(2),
        config=config,
        scheduler=LinearAlphaScheduler(),
        mask_token_id=MASK,
        time_epsilon=0.3,
        logit_shift=get_spec(family).logit_shift,
    )
    return inner_plan(collator(rows))


def _settings(**overrides) -> MemoryConfig:
    tiny = {"inner_rank": 4, "inner_alpha": 8.0} if overrides.get("inner_adapter_type") != "full" else {}
    return MemoryConfig(**{"inner_layer_fraction": 0.5, "inner_lr": 0.3, "inner_grad_clip": 0.05, **tiny, **overrides})


def _doubled(plan: InnerPlan) -> InnerPlan:
    # The loss weights take the dtype of t.
    return dataclasses.replace(plan, steps=[dataclasses.replace(step, t=step.t.double()) for step in plan.steps])


def _row(plan: InnerPlan, row: int) -> InnerPlan:
    """The part of `plan` that belongs to one row."""

    def of_row(step):
        mine = step.loss_positions // plan.length == row
        return dataclasses.replace(
            step,
            loss_positions=step.loss_positions[mine] - row * plan.length,
            targets=step.targets[mine],
            t=step.t[row : row + 1],
        )

    return dataclasses.replace(
        plan,
        states=[state[row : row + 1] for state in plan.states],
        steps=[of_row(step) for step in plan.steps],
        attention_mask=None if plan.attention_mask is None else plan.attention_mask[row : row + 1],
        row_seeds=plan.row_seeds[row : row + 1],
    )


class _Naive:
    """phi_K of one memory: no hooks, split point, gathering, chunks or flat gradient."""

    def __init__(self, model, memory: ParametricMemory) -> None:
        self.model, self.memory, self.config = model, memory, memory.config
        self.weights = dict(model.backbone.named_parameters())

    def outputs(self, matrices: list[torch.Tensor], plan: InnerPlan, state: int):
        """(last hidden states after the final norm, logits) that predict each position, [B, L, ...]."""
        names = list(self.memory.fast.targets)
        merged = {}
        for index, name in enumerate(names):
            own = matrices[index :: len(names)]
            scale = self.config.inner_alpha / self.config.inner_rank
            delta = own[0] if len(own) == 1 else scale * own[1] @ own[0]
            merged[f"model.{name}.weight"] = self.weights[f"{name}.weight"] + delta
        inputs = {"attention_mask": plan.attention_mask, "output_hidden_states": True}
        output = torch.func.functional_call(self.model, merged, (plan.states[state],), inputs)
        if spec_of(self.model).logit_shift == 0:
            return output.hidden_states[-1], output.logits
        # Nothing predicts the first position, and nothing asks for it.
        return tuple(torch.cat([x[:, :1], x[:, :-1]], dim=1) for x in (output.hidden_states[-1], output.logits))

    def losses(self, matrices: list[torch.Tensor], plan: InnerPlan, step) -> torch.Tensor:
        """The objective at every position, [B, L]."""
        hidden, logits = self.outputs(matrices, plan, step.student)
        if self.config.inner_loss_type == "ce":
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64).reshape(-1)
            tokens[step.loss_positions] = step.targets
            return -torch.log_softmax(logits, dim=-1).gather(2, tokens.view(*hidden.shape[:2], 1))[..., 0]
        fixed = [matrix.detach() for matrix in matrices]
        seen, wanted = (value.detach() for value in self.outputs(fixed, plan, step.teacher))
        if self.config.inner_loss_type == "distill_hidden":
            if self.config.distill_hidden_type == "mse":
                return ((hidden - seen) ** 2).sum(dim=-1) / hidden.shape[-1]
            dots = (hidden * seen).sum(dim=-1)
            return 1 - dots / ((hidden**2).sum(dim=-1) * (seen**2).sum(dim=-1)).sqrt()
        tau = self.config.distill_temperature
        p, q = torch.softmax(wanted / tau, dim=-1), torch.softmax(logits / tau, dim=-1)
        if self.config.inner_loss_type == "distill_reverse":
            p, q = q, p
        return (p * (p / q).log()).sum(dim=-1)

    def loss(self, matrices: list[torch.Tensor], plan: InnerPlan, step) -> torch.Tensor:
        values = self.losses(matrices, plan, step)
        chosen = torch.zeros(values.numel(), dtype=torch.bool)
        chosen[step.loss_positions] = True
        chosen = chosen.view_as(values)
        weight = [1 / (float(t) + 1e-6) if self.config.loss_weight_type == "scheduler" else 1.0 for t in step.t]
        per_row = [weight[b] * values[b][chosen[b]].sum() for b in range(len(values))]
        counts = [int(chosen[b].sum()) for b in range(len(values))]
        return {
            "token": sum(per_row) / sum(counts),
            "sequence": sum(row / max(n, 1) for row, n in zip(per_row, counts, strict=True)) / len(values),
            "batch": sum(per_row) / len(values),
        }[self.config.loss_norm_type]

    def fit(self, plan: InnerPlan, phi: torch.Tensor):
        """(phi_K [P], losses, gradient norms) from phi_0 [P]."""
        matrices = [matrix.clone() for matrix in self.memory.fast.views(phi)]
        losses, norms = [], []
        for step in [step for _ in range(self.config.num_inner_epochs) for step in plan.steps]:
            if len(step.loss_positions) == 0:  # no gradient, no step
                losses.append(0.0)
                norms.append(0.0)
                continue
            leaves = [matrix.detach().requires_grad_() for matrix in matrices]
            loss = self.loss(leaves, plan, step)
            gradients = torch.autograd.grad(loss, leaves)
            whole = math.sqrt(sum(float((g * g).sum()) for g in gradients))
            for index, gradient in enumerate(gradients):
                norm = whole if self.config.clip_kind == "global" else math.sqrt(float((gradient * gradient).sum()))
                limit = self.config.inner_grad_clip
                factor = limit / norm if limit and norm > limit else 1.0
                matrices[index] = matrices[index] - self.config.inner_lr * factor * gradient
            losses.append(float(loss.detach()))
            norms.append(whole)
        return torch.cat([matrix.reshape(-1) for matrix in matrices]), losses, norms


SETTINGS = {
    "tensor": {},
    "global": {"clip_kind": "global"},
    "norm_batch": {"inner_grad_clip": 0.0, "inner_lr": 0.01, "loss_norm_type": "batch"},
    "norm_sequence": {"inner_grad_clip": 0.0, "inner_lr": 0.01, "loss_norm_type": "sequence"},
    "scheduler_weight": {"loss_weight_type": "scheduler"},
    "newly_revealed": {"inner_loss_mask_mode": "newly_revealed", "num_inner_steps": 3},
    "epochs": {"num_inner_epochs": 3},
    "full": {"inner_adapter_type": "full"},
    "pre_only": {"masking_strategy": "pre_only", "inner_loss_type": "distill"},
    "no_progressive": {"masking_strategy": "no_progressive"},
    "progressive_memory": {"masking_strategy": "progressive_memory", "num_inner_steps": 3, "prompt_mask_ratio": 0.4},
    "distill": {"inner_loss_type": "distill", "num_inner_steps": 3},
    "distill_tau": {"inner_loss_type": "distill", "distill_temperature": 2.5},
    "distill_reverse": {"inner_loss_type": "distill_reverse", "distill_temperature": 0.7},
    "hidden_mse": {"inner_loss_type": "distill_hidden"},
    "hidden_cosine": {"inner_loss_type": "distill_hidden", "distill_hidden_type": "cosine"},
    "prompt": {"inner_target": "prompt", "prompt_mask_ratio": 0.5},
    "prompt_distill": {"inner_target": "prompt", "prompt_mask_ratio": 0.5, "inner_loss_type": "distill"},
    "disjoint": {"inner_target": "disjoint", "num_inner_steps": 3},
    "disjoint_distill": {"inner_target": "disjoint", "inner_loss_type": "distill"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["batch", "row"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_inner_loop_is_the_formula(make_model, name: str, scope: str, family: str) -> None:
    model = make_model(family).double()
    config = _settings(scope=scope, **SETTINGS[name])
    plan = _doubled(_plan(config, family))
    memory = ParametricMemory(model, config)
    initial = memory.initial(plan, 0).double()
    with memory.attached():
        report = memory.write(plan, initial)
        assert memory.fast.value is not None
        written = memory.fast.value.clone()
    assert len(report.losses) == len(plan.steps) * config.num_inner_epochs
    parts = [_row(plan, row) for row in range(plan.num_rows)] if scope == "row" else [plan]
    assert len(parts) == len(written)
    moved = 0.0
    for memory_index, part in enumerate(parts):
        phi, losses, norms = _Naive(model, memory).fit(part, initial[memory_index])
        # float64 on both sides; only the order of the products differs (W x + s B A x against (W + s B A) x), and the
        # steps amplify it.
        assert torch.allclose(written[memory_index], phi, rtol=1e-7, atol=1e-9)
        assert report.losses[:, memory_index].tolist() == pytest.approx(losses, rel=1e-8, abs=1e-12)
        assert report.grad_norms[:, memory_index].tolist() == pytest.approx(norms, rel=1e-6, abs=1e-12)
        moved += float((phi - initial[memory_index]).norm())
    assert moved > 1e-3  # far beyond the tolerance


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["response", "prompt", "disjoint"])
@pytest.mark.parametrize("objective", ["ce", "distill"])
def test_a_batch_of_rows_is_that_many_singles(make_model, family: str, target: str, objective: str) -> None:
    model = make_model(family).double()
    config = _settings(scope="row", inner_target=target, inner_loss_type=objective, inner_adapter_type="lora")
    # Rows of one length: what padding adds to a row is part of its input.
    plan = _doubled(_plan(config, family, lengths=(9, 9, 9)))
    memory = ParametricMemory(model, config)

    def write(plan: InnerPlan) -> tuple[torch.Tensor, torch.Tensor]:
        with memory.attached():
            memory.write(plan, memory.initial(plan, 5))
            assert memory.fast.value is not None
            return memory.fast.value, model(input_ids=plan.states[0], attention_mask=plan.attention_mask).logits

    together, logits = write(plan)
    for row in range(plan.num_rows):
        alone, own_logits = write(_row(plan, row))
        # float64 activations; phi itself is float32.
        assert torch.allclose(together[row], alone[0], rtol=1e-5, atol=1e-7)
        visible = slice(None) if plan.attention_mask is None else plan.attention_mask[row].bool()
        assert torch.allclose(logits[row][visible], own_logits[0][visible], rtol=1e-5, atol=1e-6)
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in itertools.combinations(together, 2))
