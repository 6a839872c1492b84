"""Memories written from prompts: a batch is its singles, nothing stays behind, what fails is the base model."""

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dllm.core.noising import apply_mask, draw_noise, make_generator
from dllm.core.samplers import MDLMSampler, MDLMSamplerConfig
from dllm.models.moe import RoutedExperts
from dllm.utils.parsing import InputError
from memdlm.memory import MemoryConfig, ParametricMemory, WrittenMemory
from memdlm.memory.plan import plan_prompts

FAMILIES = ["llada", "llada_moe"]
MASK = 39
OVERFLOWING = 7  # a token whose embedding is made too large


def _prompts(lengths=(23, 9, 30, 15)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(8, 38, (length,), generator=generator).tolist() for length in lengths]


def _memory(model, **settings) -> ParametricMemory:
    adapter = {} if "inner_adapter_type" in settings else {"inner_rank": 4, "inner_alpha": 8.0}
    settings = {"inner_layer_fraction": 0.6, "prompt_mask_ratio": 0.4, **adapter, **settings}
    return ParametricMemory(model, MemoryConfig.for_decoding(**settings))


def _write(memory: ParametricMemory, prompts, **options) -> list[WrittenMemory]:
    with memory.attached():
        return memory.write_prompts(prompts, **options)


VARIANTS = {
    "default": {},
    "attention": {"inner_target_modules": "q_proj,v_proj,down_proj"},
    "distill": {"inner_loss_type": "distill"},
    "full": {"inner_adapter_type": "full"},
    "global_clip": {"clip_kind": "global", "num_inner_steps": 3},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_of_prompts_writes_what_single_prompts_write(make_model, name: str, family: str) -> None:
    memory = _memory(make_model(family).double(), **VARIANTS[name])
    prompts = _prompts()
    together = _write(memory, prompts, batch_size=3)  # passes of three prompts and of one
    for one, prompt in zip(together, prompts, strict=True):
        (single,) = _write(memory, [prompt])
        assert one.num_tokens == single.num_tokens == len(prompt) and one.failure is None
        # Products of other sizes round in another way; phi is float32, so the last digit of that can differ.
        assert torch.allclose(one.phi, single.phi, rtol=1e-6, atol=1e-8)
        assert torch.allclose(one.losses, single.losses, rtol=1e-6)
        assert float(single.losses.min()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_one_prompt_gives_one_memory_bitwise_in_any_order_and_company(make_model, family: str) -> None:
    memory = _memory(make_model(family))
    prompts = _prompts()
    alone = [_write(memory, [prompt])[0].phi for prompt in prompts]
    torch.rand(7)  # the global generator has no part in it
    for order in ([2, 0, 3, 1], [1, 1, 2], [3]):
        for index, one in zip(order, _write(memory, [prompts[index] for index in order]), strict=True):
            assert torch.equal(one.phi, alone[index])
    assert not torch.equal(alone[0], _write(memory, [[*prompts[0], 8]])[0].phi)
    tensors = _write(memory, [torch.tensor(prompt) for prompt in prompts])
    assert all(torch.equal(one.phi, phi) for one, phi in zip(tensors, alone, strict=True))


@pytest.mark.gpu
def test_two_writes_on_a_gpu_are_one_memory_bitwise(make_model) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    memory = _memory(make_model("llada_moe").cuda(), inner_target_modules="q_proj,v_proj,down_proj")
    (prompt,) = _prompts((400,))
    first, second = _write(memory, [prompt])[0], _write(memory, [prompt])[0]
    assert torch.equal(first.phi, second.phi) and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_is_what_a_write_of_its_plan_leaves(make_model, family: str) -> None:
    memory = _memory(make_model(family))
    prompt = _prompts()[0]
    (written,) = _write(memory, [prompt])
    with memory.attached():
        plan = memory.plan_prompts([prompt], MASK)
        report = memory.write(plan, memory.initial(plan))
        value = memory.fast.value
    assert value is not None and torch.equal(value[0], written.phi)
    assert torch.equal(report.losses[:, 0], written.losses)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_adapting_and_decoding_a_batch_is_its_singles_token_for_token(make_model, family: str, batch_size: int) -> None:
    model = make_model(family).double()
    sampler = MDLMSampler(model, _tokenizer())
    config = MDLMSamplerConfig(max_new_tokens=8, block_size=4, steps=4)
    memory = _memory(model, inner_lr=3.0, inner_grad_clip=0.0)  # strong enough to change tokens
    prompts = _prompts()
    with memory.attached():
        memory.adapt(prompts, batch_size=batch_size)
        together = sampler.sample(prompts, config).answers
        singles = []
        for prompt in prompts:
            memory.adapt([prompt])
            singles.append(sampler.sample([prompt], config).answers)
    assert together is not None and torch.equal(together, torch.cat(singles))
    without = sampler.sample(prompts, config).answers
    assert not torch.equal(together, without)


def _tokenizer():
    """What a sampler asks of a tokenizer."""
    special = {"mask_token": "<m>", "pad_token": "<p>", "eos_token": "<e>"}
    ids = {"<m>": MASK, "<p>": 0, "<e>": 1}
    return types.SimpleNamespace(
        special_tokens_map=special,
        convert_tokens_to_ids=lambda token: ids.get(token),
        unk_token_id=None,
        get_vocab=lambda: ids,
    )


def test_a_mask_token_in_the_prompt_is_never_asked_for() -> None:
    config = MemoryConfig.for_decoding(prompt_mask_ratio=0.5)
    prompt = [8, MASK, 9, 10, MASK, 11, 12, 13, MASK, 14]
    plan = plan_prompts([prompt], config, MASK)
    asked = torch.cat([step.loss_positions for step in plan.steps])
    assert len(asked) and not {1, 4, 8} & set(asked.tolist())
    # The draws of the others are those of their places.
    noise = draw_noise([make_generator(plan.row_seeds[0], "prompt")], len(prompt))[0]
    anchor = (noise < 0.5) & (torch.tensor(prompt) != MASK)
    assert torch.equal(plan.states[-1][0], apply_mask(torch.tensor(prompt), anchor, MASK))


class _HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: values read back, and results whose size only the device knows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.seen.append(str(function))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_inner_loop_reads_nothing_back(make_model, batch_size: int) -> None:
    # Dense: routed experts read the sizes of their chunks, as in any forward.
    memory = _memory(make_model("llada"))
    with memory.attached():
        plan = memory.plan_prompts(_prompts()[:batch_size], MASK)
        initial = memory.initial(plan)
        with _HostReads() as reads:
            report = memory.write(plan, initial)
        assert reads.seen == [] and bool((report.change > 0).all())
        with _HostReads() as reads:
            float(report.change[0])
        assert len(reads.seen) == 1  # it would have been seen


# Failures


def _short_prompt(memory: ParametricMemory) -> list[int]:
    """A prompt of which no token is drawn."""
    for token in range(8, 38):
        plan = plan_prompts([[token]], memory.config, MASK)
        if not any(len(step.loss_positions) for step in plan.steps):
            return [token]
    raise AssertionError("every one-token prompt is drawn")


def test_prompts_that_fail_say_why_and_leave_the_others_alone(make_model) -> None:
    model = make_model("llada_moe")
    model.get_input_embeddings().weight.data[OVERFLOWING] = torch.nan
    memory = _memory(model)
    good, other = _prompts((23, 9))
    prompts = [good, [], [*other, OVERFLOWING], _short_prompt(memory), other]
    expected = [_write(memory, [prompt])[0].phi for prompt in (good, other)]
    for batch_size in (1, 5):
        written = _write(memory, prompts, batch_size=batch_size)
        assert [one.failure is None for one in written] == [True, False, False, False, True]
        assert [one.num_tokens for one in written] == [23, 0, 10, 1, 9]
        reasons = [str(one.failure) for one in written[1:4]]
        assert "empty" in reasons[0] and reasons[1] == "its inner loss is not finite" and "was drawn" in reasons[2]
        assert not any(bool(one.phi.any()) for one in written[1:4]) and all("\n" not in reason for reason in reasons)
        close = {"rtol": 0.0, "atol": 0.0} if batch_size == 1 else {"rtol": 1e-3, "atol": 1e-5}  # float32 products
        for one, phi in zip((written[0], written[4]), expected, strict=True):
            assert torch.allclose(one.phi, phi, **close) and bool(one.phi.any())


def test_a_gradient_that_is_not_finite_is_a_failure(make_model, monkeypatch) -> None:
    memory = _memory(make_model("llada"))
    write = memory.write

    def spoiled(plan, initial):
        return write(plan, initial, reduce_gradient=lambda gradient: gradient * torch.inf)

    monkeypatch.setattr(memory, "write", spoiled)
    (written,) = _write(memory, _prompts((9,)))
    assert written.failure == "the gradient of its inner loss is not finite" and not bool(written.phi.any())


OUT_OF_MEMORY = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: 12"),
}


@pytest.mark.parametrize("device", OUT_OF_MEMORY)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_out_of_memory_of_one_prompt_is_its_own_failure(make_model, monkeypatch, batch_size: int, device: str) -> None:
    memory = _memory(make_model("llada"))
    prompts = _prompts((9, 30, 12))
    expected = [one.phi for one in _write(memory, prompts)]
    write = memory.write

    def limited(plan, initial):
        if plan.length > 12:
            raise OUT_OF_MEMORY[device]
        return write(plan, initial)

    monkeypatch.setattr(memory, "write", limited)
    written = _write(memory, prompts, batch_size=batch_size)
    assert [one.failure is None for one in written] == [True, False, True]
    assert "out of memory over its 30 tokens" in str(written[1].failure)
    # The pass of three is given up and each prompt gets one of its own.
    assert torch.equal(written[0].phi, expected[0]) and torch.equal(written[2].phi, expected[2])


def test_a_row_whose_memory_failed_is_the_base_model_bitwise(make_model) -> None:
    model = make_model("llada")
    memory = _memory(model, inner_target_modules="q_proj,gate_proj,up_proj,down_proj")
    short = _short_prompt(memory)
    good = _prompts((12,))[0]
    ids = torch.tensor([good, good, good])
    base = model(input_ids=ids).logits
    with memory.attached():
        written = memory.adapt([good, short, good])
        logits = model(input_ids=ids).logits
    assert written[1].failure is not None
    assert torch.equal(logits[1], base[1])
    assert not torch.equal(logits[0], base[0]) and torch.equal(logits[0], logits[2])


def test_a_row_of_experts_whose_memory_failed_is_the_base_model(make_model) -> None:
    model = make_model("llada_moe").double()
    memory = _memory(model)
    good = _prompts((12,))[0]
    ids = torch.tensor([good, good])
    base = model(input_ids=ids).logits
    with memory.attached():
        memory.adapt([_short_prompt(memory), good])
        logits = model(input_ids=ids).logits
        # Chunks of experts are laid out by row and padded, which rounds in another way: float64.
        assert torch.allclose(logits[0], base[0], rtol=1e-10, atol=1e-12)
        assert not torch.allclose(logits[1], base[1], rtol=1e-3)
        memory.adapt([_short_prompt(memory), []])  # nothing to put in place at all
        assert torch.equal(model(input_ids=ids).logits, base)


# What stays behind


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_leaks_to_the_next_prompt(make_model, monkeypatch, family: str) -> None:
    model = make_model(family)
    memory = _memory(model)
    first, second = _prompts((20, 14))
    ids = torch.tensor([second])
    base = model(input_ids=ids).logits
    expected = _write(memory, [second])[0].phi
    with memory.attached():
        memory.adapt([first])
        assert not torch.equal(model(input_ids=ids).logits, base)
        (written,) = memory.write_prompts([second])  # with another memory in place
        assert torch.equal(written.phi, expected)
        assert not memory.fast.is_set and torch.equal(model(input_ids=ids).logits, base)

        memory.adapt([first])
        memory.write_prompts([[]])  # no pass at all
        assert not memory.fast.is_set and torch.equal(model(input_ids=ids).logits, base)

        memory.adapt([first])
        monkeypatch.setattr(memory, "initial", _explode)
        with pytest.raises(RuntimeError, match="on purpose"):
            memory.adapt([second])
        assert not memory.fast.is_set and torch.equal(model(input_ids=ids).logits, base)
        assert not any(block.by_row for block in model.modules() if isinstance(block, RoutedExperts))
        monkeypatch.undo()
        (written,) = memory.adapt([second])
        assert torch.equal(written.phi, expected)
        with pytest.raises(InputError, match="tokenizer that belongs"):
            memory.adapt([[8, 40]])
    assert torch.equal(model(input_ids=ids).logits, base) and not memory.fast.is_set
    assert not any(part._forward_hooks for part in model.modules())


def _explode(*_):
    raise RuntimeError("on purpose")


# Putting in place


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_memory_serves_any_batch_as_a_memory_per_row_does(make_model, family: str) -> None:
    model = make_model(family).double()
    memory = _memory(model)
    prompt = _prompts((12,))[0]
    ids = torch.tensor([prompt, prompt[::-1]])
    with memory.attached():
        (written,) = memory.write_prompts([prompt])
        memory.place([written, written])
        by_row = model(input_ids=ids).logits
        memory.place([written], shared=True)
        assert not any(block.by_row for block in model.modules() if isinstance(block, RoutedExperts))
        # The same products in other shapes: float64.
        assert torch.allclose(model(input_ids=ids).logits, by_row, rtol=1e-9, atol=1e-11)
        assert model(input_ids=ids[:1]).logits.shape[0] == 1
        memory.place([written])
        with pytest.raises(ValueError, match="a memory of 1 rows"):
            model(input_ids=ids)


def test_what_cannot_be_placed_or_written_is_refused(make_model) -> None:
    model = make_model("llada")
    memory, batch = _memory(model), _memory(model, scope="batch")
    prompts = _prompts((9, 12))
    with pytest.raises(RuntimeError, match="inside `with"):
        memory.write_prompts(prompts)
    written = _write(memory, prompts)
    with pytest.raises(RuntimeError, match="inside `with"):
        memory.place(written)
    with memory.attached():
        with pytest.raises(InputError, match="got 0 memories"):
            memory.place([])
        with pytest.raises(InputError, match="shared by all rows"):
            memory.place(written, shared=True)
        with pytest.raises(InputError, match="batch_size is 0"):
            memory.adapt(prompts, batch_size=0)
        assert memory.write_prompts([]) == []
    other = _memory(model, inner_rank=8)
    with other.attached(), pytest.raises(InputError, match="does not fit the"):
        other.place(written)
    with batch.attached():
        with pytest.raises(InputError, match="use mem_scope row"):
            batch.adapt(prompts)
        with pytest.raises(InputError, match="of scope batch"):
            batch.place(written)
        with pytest.raises(InputError, match="mem_scope row, or batch_size 1"):
            batch.write_prompts(prompts, batch_size=2)
        (one,) = batch.adapt(prompts[:1])
        assert one.failure is None and model(input_ids=torch.tensor([prompts[0]] * 3)).logits.isfinite().all()


def test_the_mask_token_comes_from_the_configuration_or_the_caller(make_model) -> None:
    model = make_model("llada_moe")
    prompts = _prompts((12,))
    expected = _write(_memory(model), prompts)[0].phi
    model.config.mask_token_id = None
    with pytest.raises(InputError, match="no mask_token_id: pass"):
        _write(_memory(model), prompts)
    config = _memory(model).config
    assert torch.equal(_write(ParametricMemory(model, config, mask_token_id=MASK), prompts)[0].phi, expected)


def test_settings_for_decoding() -> None:
    config = MemoryConfig.for_decoding(inner_lr=0.3)
    assert config == MemoryConfig(enabled=True, scope="row", sync_inner=False, inner_lr=0.3)
    assert MemoryConfig.for_decoding(scope="batch", enabled=False).scope == "batch"
    assert MemoryConfig.for_decoding(inner_target="prompt").inner_target == "prompt"
    with pytest.raises(InputError, match=r"unknown memory setting inner_leraning_rate; allowed: .*inner_lr"):
        MemoryConfig.for_decoding(inner_leraning_rate=1.0)
    with pytest.raises(InputError, match="mem_inner_target=disjoint has no effect"):
        MemoryConfig.for_decoding(inner_target="disjoint")
    with pytest.raises(InputError, match="mem_pad_unmask_mode=both has no effect"):
        MemoryConfig.for_decoding(pad_unmask_mode="both")
