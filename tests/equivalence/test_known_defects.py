"""Mistakes that other implementations of memory training make, one test each; what is right names the test."""

import contextlib
import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dllm.core.schedulers import LinearAlphaScheduler
from dllm.data.collators import PaddingCollator
from dllm.models.moe import SparseMoE
from dllm.models.spec import load_config
from dllm.models.tiny import make_tiny_checkpoint
from memdlm import MemDLMConfig, MemDLMTrainer
from memdlm.memory import inner_loop
from memdlm.memory.collator import MemoryCollator, inner_plan
from memdlm.memory.config import MemoryConfig
from memdlm.memory.objectives import Objective, cross_entropy
from memdlm.memory.parametric import ParametricMemory

FAMILIES = ["llada", "llada_moe"]
MASK = 39


def _settings(**overrides) -> MemoryConfig:
    tiny = {"inner_rank": 4, "inner_alpha": 8.0} if overrides.get("inner_adapter_type") != "full" else {}
    return MemoryConfig(**{"inner_layer_fraction": 0.5, **tiny, **overrides})


def _rows(lengths=(16, 16, 16), seed: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, 38, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "example_id": index})
    return made


def _batch(config: MemoryConfig, rows: list[dict] | None = None) -> dict:
    collator = MemoryCollator(
        PaddingCollator(2), config=config, scheduler=LinearAlphaScheduler(), mask_token_id=MASK, time_epsilon=0.3
    )
    return collator(_rows() if rows is None else rows)


def _forward(model, memory: ParametricMemory, batch: dict) -> torch.Tensor:
    """Logits [N, V] of the outer forward, which writes the memory at the split point."""
    plan = inner_plan(batch)
    with memory.writing(plan, memory.prefixes(plan), memory.initial(plan, 0)):
        return model(input_ids=batch["noised_ids"], logit_positions=batch["loss_positions"]).logits


def _written(model, config: MemoryConfig, batch: dict | None = None) -> tuple[ParametricMemory, torch.Tensor]:
    """(memory, phi_K) of one outer forward."""
    batch = _batch(config) if batch is None else batch
    memory = ParametricMemory(model, config)
    with memory.attached():
        _forward(model, memory, batch)
        assert memory.fast.value is not None
        return memory, memory.fast.value.clone()


@contextlib.contextmanager
def _hooked(modules, hook):
    """`hook` runs before the hooks of a memory that is attached later."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- what the inner loop computes ---


@pytest.mark.parametrize("family", FAMILIES)
def test_student_and_teacher_are_both_read_after_the_final_norm(make_model, family: str) -> None:
    config = _settings(inner_loss_type="distill_hidden", masking_strategy="pre_only")
    batch = _batch(config)
    (step,) = batch["memory_plan"]["steps"]
    same = {**batch["memory_plan"], "steps": [{**step, "teacher": step["student"]}]}
    memory, _ = _written(make_model(family), config, {**batch, "memory_plan": same})
    assert memory.report is not None and memory.report.losses.tolist() == [[0.0]]
    memory, _ = _written(make_model(family), config, batch)
    assert memory.report is not None and float(memory.report.losses) > 0  # another state


def test_every_expert_learns_in_eval_mode_without_checkpointing(make_model) -> None:
    # Others run the experts without gradients unless the model is in train mode.
    model = make_model("llada_moe", shared_expert_intermediate_size=8, num_experts_per_tok=4)
    memory, phi = _written(model.eval(), _settings())
    matrices = {name: value for name, value in memory.fast.named(phi[0]).items() if name.endswith(".B")}
    assert len(matrices) == 2 * (4 + 1) * 3 and all(bool(matrix.any()) for matrix in matrices.values())
    assert torch.equal(phi, _written(model.train(), _settings())[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("roles", ["gate_proj,up_proj,down_proj", "q_proj,k_proj,v_proj,o_proj"])
def test_every_role_is_adapted_and_learns_in_every_family(make_model, family: str, roles: str) -> None:
    every_expert = {"num_experts_per_tok": 4} if family == "llada_moe" else {}
    model = make_model(family, **every_expert)
    memory, phi = _written(model, _settings(inner_target_modules=roles, inner_layer_fraction=0.3))
    matrices = {name: value for name, value in memory.fast.named(phi[0]).items() if name.endswith(".B")}
    experts = 4 if family == "llada_moe" and "gate_proj" in roles else 1
    assert len(matrices) == experts * len(roles.split(","))
    assert all(bool(matrix.any()) for matrix in matrices.values())


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_lora_does_not_act_in_the_inner_loop(make_model, training: bool) -> None:
    written = []
    for dropout in (0.5, 0.0):
        lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
        torch.manual_seed(6)
        model = get_peft_model(make_model("llada"), lora).train(training)
        assert isinstance(model, nn.Module)
        config = _settings()
        plan = inner_plan(_batch(config))
        memory = ParametricMemory(model, config)
        state = torch.random.get_rng_state()
        with memory.attached():
            memory.write(plan, memory.initial(plan, 0))
            assert memory.fast.value is not None
            written.append(memory.fast.value)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert {part.training for part in model.modules()} == {training}
    assert torch.equal(*written)


# --- precision ---


def test_small_updates_are_kept_under_bfloat16_weights(make_model) -> None:
    model = make_model("llada").bfloat16()
    config = _settings()
    batch = _batch(config)
    memory, phi = _written(model, config, batch)
    initial = memory.initial(inner_plan(batch), 0)
    half = len(memory.fast.targets)
    kept, lost, fine = [], [], []
    for start, end in zip(memory.fast.views(initial[0])[:half], memory.fast.views(phi[0])[:half], strict=True):
        kept.append((start != end).flatten())
        lost.append((start.bfloat16() == end.bfloat16()).flatten())
        fine.append((end != end.bfloat16()).flatten())
    # With B = 0 at first, A moves in the second step only, and by little: stored in bfloat16 it would hardly move.
    assert float(torch.cat(kept).float().mean()) > 0.8 and float(torch.cat(lost).float().mean()) > 0.5
    assert float(torch.cat(fine).float().mean()) > 0.9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a tiny LLaDA-MoE."""
    folder = tmp_path_factory.mktemp("defects") / "tiny"
    return make_tiny_checkpoint(
        folder, "llada_moe", hidden_size=32, num_hidden_layers=3, num_experts=4, initializer_range=0.1
    )


def _trainer(checkpoint, folder, labelled: bool = True, **settings) -> MemDLMTrainer:
    config, spec = load_config(checkpoint)
    assert spec is not None
    model = spec.model_class.from_pretrained(checkpoint, config=config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(4):
        ids = torch.randint(20, 200, (20,), generator=generator).tolist()
        rows.append(
            {"input_ids": ids, "labels": [-100] * 4 + ids[4:] if labelled else [-100] * 20, "example_id": index}
        )
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
        "mem_enabled": True,
        "mem_inner_rank": 4,
        "mem_inner_layer_fraction": 0.5,
    }
    args = MemDLMConfig(**{**defaults, **settings})
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return MemDLMTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("scope", ["batch", "row"])
def test_autocast_holds_in_the_inner_loop_as_in_the_outer_forward(checkpoint, tmp_path, scope: str) -> None:
    # Others call the layers past the wrapped forward, and then float32 products beside bfloat16 ones.
    trainer = _trainer(checkpoint, tmp_path, bf16=True, max_steps=1, mem_scope=scope)
    assert trainer.memory is not None
    fast = trainer.memory.fast
    seen: dict[bool, set] = {True: set(), False: set()}

    def note(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if fast.value is not None:
            seen[fast.value.requires_grad].add(output.dtype)

    adapted = list(trainer.lm.backbone.layers)[trainer.memory.start :]
    linears = [part for layer in adapted for part in layer.modules() if isinstance(part, nn.Linear)]
    with _hooked([*linears, trainer.lm.get_output_embeddings()], note):
        trainer.train()
    assert seen == {True: {torch.bfloat16}, False: {torch.bfloat16}}


class _OldAutocast(TorchFunctionMode):
    """bfloat16 products whose copies of weights stay as they were first made, as autocast keeps them up to torch 2.9: a
    copy made without gradients, used again, cuts its weight off."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not nn.functional.linear or not isinstance(args[1], nn.Parameter):
            return func(*args, **(kwargs or {}))
        copy = args[1].bfloat16()
        if torch.is_autocast_cache_enabled():
            copy = self.copies.setdefault(id(args[1]), copy)
        return func(args[0].bfloat16(), copy)


@pytest.mark.parametrize(
    ("family", "precision"),
    [*((family, lambda: torch.autocast("cpu", dtype=torch.bfloat16)) for family in FAMILIES), ("llada", _OldAutocast)],
    ids=[*FAMILIES, "llada-old"],
)
@pytest.mark.parametrize("objective", ["ce", "distill", "distill_reverse", "distill_hidden"])
def test_every_weight_gets_its_gradient_under_autocast(make_model, family: str, objective: str, precision) -> None:
    every_expert = {"num_experts_per_tok": 4} if family == "llada_moe" else {}
    model = make_model(family, **every_expert).train()
    config = _settings(inner_loss_type=objective)
    batch = _batch(config)
    memory = ParametricMemory(model, config)
    plan = inner_plan(batch)
    with memory.attached():
        with precision():
            prefixes = memory.prefixes(plan)
        with memory.writing(plan, prefixes, memory.initial(plan, 0)), precision():
            logits = model(input_ids=batch["noised_ids"], logit_positions=batch["loss_positions"]).logits
        logits.float().square().sum().backward()
    missing = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not missing


# --- rows, order and state ---


def _logits_of_row_0(make_model, family: str, scope: str, seed: int) -> torch.Tensor:
    config = _settings(scope=scope)
    rows = _rows()
    rows[1] = {**_rows(seed=seed)[1], "example_id": 1}  # masks depend on the example's number alone
    model = make_model(family).double()
    batch = _batch(config, rows)
    memory = ParametricMemory(model, config)
    with memory.attached(), torch.no_grad():
        logits = _forward(model, memory, batch)
        assert memory.report is not None and float(memory.report.change.min()) > 0
    return logits[batch["loss_positions"] < batch["input_ids"].shape[1]]


def test_a_row_with_a_memory_of_its_own_does_not_hear_of_the_others(make_model) -> None:
    # The dense family: where experts gather tokens of all rows, products change their shape and float64 its rounding.
    assert torch.equal(*(_logits_of_row_0(make_model, "llada", "row", seed) for seed in (1, 2)))
    first, second = (_logits_of_row_0(make_model, "llada_moe", "row", seed) for seed in (1, 2))
    # The memory itself is float32.
    assert torch.allclose(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_share_a_memory_hear_of_each_other(make_model, family: str) -> None:
    first, second = (_logits_of_row_0(make_model, family, "batch", seed) for seed in (1, 2))
    assert float((first - second).abs().max()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["batch", "row"])
def test_one_prompt_gives_one_memory_whatever_came_before(make_model, family: str, scope: str) -> None:
    model = make_model(family)
    prompts = [row["input_ids"] for row in _rows(lengths=(14, 9, 11))]
    memory = ParametricMemory(model, _settings(scope=scope))

    def write(prompt: list[int]) -> torch.Tensor:
        torch.rand(len(prompt))  # somebody draws
        plan = memory.plan_prompts([prompt], MASK)
        memory.write(plan, memory.initial(plan))
        assert memory.fast.value is not None
        return memory.fast.value.clone()

    with memory.attached():
        first = [write(prompt) for prompt in prompts]
    with memory.attached():
        again = [write(prompt) for prompt in reversed(prompts)][::-1]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_in_place_adds_no_parameter_buffer_or_key(make_model, family: str) -> None:
    model = make_model(family).train()
    untouched = copy.deepcopy(model)
    memory = ParametricMemory(model, _settings())
    with memory.attached():
        _forward(model, memory, _batch(_settings()))
        assert memory.fast.value is not None and not memory.fast.value.requires_grad
        assert list(model.state_dict()) == list(untouched.state_dict())
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in untouched.named_parameters()]
        assert [name for name, _ in model.named_buffers()] == [name for name, _ in untouched.named_buffers()]
        assert [name for name, _ in model.named_modules()] == [name for name, _ in untouched.named_modules()]
        assert all(torch.equal(value, untouched.state_dict()[name]) for name, value in model.state_dict().items())


class _GradientNorm(transformers.TrainerCallback):
    """The norm over `parameters` of what the optimizer is about to use."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.norms = parameters, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        norms = [parameter.grad.norm() for parameter in self.parameters if parameter.grad is not None]
        self.norms.append(float(torch.stack(norms).norm()))


def test_the_logged_gradient_norm_is_that_of_the_model_alone(checkpoint, tmp_path) -> None:
    trainer = _trainer(checkpoint, tmp_path, max_grad_norm=1e9, mem_inner_lr=1.0)
    # Taken anew: the list of a model that nothing was ever attached to.
    config, spec = load_config(checkpoint)
    assert spec is not None
    names = {name for name, _ in spec.model_class(config).named_parameters()}
    own = _GradientNorm([parameter for name, parameter in trainer.lm.named_parameters() if name in names])
    trainer.add_callback(own)
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    # The same float32 norms, added up in one or in two stages.
    assert len(logged) == 2 and logged == pytest.approx(own.norms, rel=1e-5)


# --- errors ---


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_an_error_inside_a_layer_is_raised_and_nothing_is_tried_again(make_model, monkeypatch, error: type) -> None:
    # Others take a TypeError for a layer with another signature and call it a second time.
    model = make_model("llada_moe")
    config = _settings()
    memory = ParametricMemory(model, config)
    calls = []

    def explode(self, hidden, recorder=None):
        if memory.fast.value is None:
            return original(self, hidden, recorder)
        calls.append(1)
        raise error("inside a layer")

    original = SparseMoE.forward
    monkeypatch.setattr(SparseMoE, "forward", explode)
    with memory.attached(), pytest.raises(error, match="inside a layer"):
        _forward(model, memory, _batch(config))
    assert len(calls) == 1


@pytest.mark.parametrize("scope", ["batch", "row"])
def test_a_loss_that_is_not_finite_is_counted_in_the_log_and_training_goes_on(
    checkpoint, tmp_path, monkeypatch, scope: str
) -> None:
    calls = []

    def spoil_the_first(*arguments) -> torch.Tensor:
        calls.append(1)
        loss = cross_entropy(*arguments)
        return loss * float("nan") if len(calls) == 1 else loss

    monkeypatch.setitem(inner_loop.OBJECTIVES, "ce", Objective(spoil_the_first, uses_teacher=False))
    trainer = _trainer(checkpoint, tmp_path, mem_scope=scope)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(calls) == 4
    assert first["mem_nonfinite_rows"] == 4 and first["mem_inner_skipped_1"] == 1 and "mem_inner_loss_1" not in first
    assert first["mem_inner_skipped_2"] == 0 and first["mem_change"] > 0  # the next step goes on from the next state
    assert "mem_nonfinite_rows" not in second and second["mem_inner_skipped_1"] < 1
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.lm.parameters())


@pytest.mark.parametrize("scope", ["batch", "row"])
@pytest.mark.parametrize("target", ["response", "prompt", "disjoint"])
@pytest.mark.parametrize("objective", ["ce", "distill", "distill_hidden"])
def test_a_batch_without_labels_is_trained_through(
    checkpoint, tmp_path, scope: str, target: str, objective: str
) -> None:
    settings = {"mem_scope": scope, "mem_inner_target": target, "mem_inner_loss_type": objective}
    trainer = _trainer(checkpoint, tmp_path, **settings, labelled=False)
    before = {name: value.clone() for name, value in trainer.lm.state_dict().items()}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss_without_memory"] for entry in logs] == [0.0, 0.0] and logs[-1]["empty_batches"] == 2
    assert all(torch.equal(value, before[name]) for name, value in trainer.lm.state_dict().items())


# --- cost ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", ["ce", "distill"])
def test_the_lower_layers_see_each_state_once(make_model, family: str, objective: str) -> None:
    model = make_model(family).train()
    config = _settings(num_inner_steps=3, num_inner_epochs=2, inner_loss_type=objective)
    batch = _batch(config)
    plan = inner_plan(batch)
    assert plan.anchor is not None and len(plan.states) == 3 + (objective == "distill")  # and the clean input
    rows: dict[int, list[int]] = {0: [], 2: []}
    layers = [model.backbone.layers[index] for index in rows]

    def note(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        rows[2 * layers.index(module)].append(len(args[0]))

    with _hooked(layers, note):
        _written(model, config, batch)
    assert rows[0] == [3 * (len(plan.states) - 1), 3]  # all but the anchor at once, and the outer forward
    passes = 2 if objective == "distill" else 1  # student and teacher
    assert rows[2] == [3] * (2 * 3 * passes + 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", ["ce", "distill", "distill_hidden"])
def test_the_inner_loop_asks_the_head_for_loss_positions_only(
    make_model, monkeypatch, family: str, objective: str
) -> None:
    model = make_model(family)
    config = _settings(inner_loss_type=objective)
    batch = _batch(config)
    memory = ParametricMemory(model, config)
    asked = []
    head = type(model).head

    def note(self, hidden: torch.Tensor) -> torch.Tensor:
        if memory.fast.value is not None and memory.fast.value.requires_grad:
            asked.append(tuple(hidden.shape[:-1]))
        return head(self, hidden)

    monkeypatch.setattr(type(model), "head", note)
    with memory.attached():
        _forward(model, memory, batch)
    counts = [len(step.loss_positions) for step in inner_plan(batch).steps]
    heads = {"ce": 1, "distill": 2, "distill_hidden": 0}[objective]
    assert asked == [(count,) for count in counts for _ in range(heads)]
    assert max(counts) < batch["input_ids"].numel()


class _Waits(TorchDispatchMode):
    """Notes operations that read a number, or whose result's size is in the values."""

    def __init__(self, seen: list) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        by_count = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if by_mask or by_count or name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    """Notes reads from Python, which on the CPU dispatch nothing."""

    def __init__(self, seen: list) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["batch", "row"])
@pytest.mark.parametrize("target", ["response", "prompt", "disjoint"])
@pytest.mark.parametrize("objective", ["ce", "distill"])
def test_a_write_reads_from_the_device_once_per_moe_layer(
    make_model, family: str, scope: str, target: str, objective: str
) -> None:
    model = make_model(family)
    config = _settings(scope=scope, inner_target=target, inner_loss_type=objective, prompt_mask_ratio=0.9)
    rows = [{**row, "labels": [-100] * 8 + row["input_ids"][8:]} for row in _rows()]
    batch = _batch(config, rows)
    memory = ParametricMemory(model, config)
    blocks = [part for part in model.modules() if isinstance(part, SparseMoE)]
    runs, reads = [], []
    with memory.attached(), _hooked(blocks, lambda *_: runs.append(1)), _Reads(reads), _Waits(reads):
        _forward(model, memory, batch)
    assert len(reads) == len(runs) and set(reads) <= {torch.Tensor.tolist}
    assert len(runs) == 0 if family == "llada" else len(runs) >= 5
