"""Memories that are kept: the store that reuses them, and the file."""

import json
import stat

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dllm.models.auto import load_model
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.parsing import InputError
from memdlm.memory import MemoryConfig, MemoryStore, ParametricMemory, read_header
from memdlm.memory.store import METADATA_KEY, load_memory

FAMILIES = ["llada", "llada_moe"]
CONTEXT = list(range(8, 28))
OTHER = list(range(30, 10, -1))
THIRD = [9, 9, 12, 30, 31, 8, 14, 15, 20, 21]


def _memory(model, **settings) -> ParametricMemory:
    adapter = {} if "inner_adapter_type" in settings else {"inner_rank": 4, "inner_alpha": 8.0}
    settings = {"inner_layer_fraction": 0.6, "prompt_mask_ratio": 0.4, **adapter, **settings}
    return ParametricMemory(model, MemoryConfig.for_decoding(**settings))


def _count_passes(memory: ParametricMemory, monkeypatch) -> list[int]:
    """A list that gets the number of prompts of every pass of the inner loop."""
    passes, write = [], memory.write

    def counted(plan, initial):
        passes.append(plan.num_rows)
        return write(plan, initial)

    monkeypatch.setattr(memory, "write", counted)
    return passes


# The store


def test_a_context_is_written_once_for_its_answer_choices_and_further_questions(make_model, monkeypatch) -> None:
    memory = _memory(make_model("llada"))
    passes = _count_passes(memory, monkeypatch)
    store = MemoryStore(memory)
    with memory.attached():
        choices = store.get([CONTEXT] * 4 + [OTHER])
        assert passes == [1, 1] and (store.num_written, store.num_reused) == (2, 3)
        (again,) = store.get([torch.tensor(CONTEXT)])  # a further question
        assert passes == [1, 1] and (store.num_written, store.num_reused) == (2, 4)
        fresh = memory.write_prompts([CONTEXT, OTHER])
        assert torch.equal(again.phi, fresh[0].phi) and again is choices[0] is choices[3]
        assert torch.equal(choices[4].phi, fresh[1].phi)
        memory.place(choices)
        assert memory.fast.value is not None and len(memory.fast.value) == 5
        store.get([CONTEXT])
        assert not memory.fast.is_set  # whether anything was written or not
    assert store.seconds > 0 and store.failures == []


def test_the_least_recently_used_memory_goes_first(make_model, monkeypatch) -> None:
    memory = _memory(make_model("llada"))
    passes = _count_passes(memory, monkeypatch)
    store = MemoryStore(memory, capacity=2)
    with memory.attached():
        store.get([CONTEXT])
        store.get([OTHER])
        store.get([CONTEXT])
        store.get([THIRD])  # OTHER goes
        assert len(passes) == 3
        store.get([CONTEXT, THIRD])
        assert len(passes) == 3
        assert len(store.get([OTHER, THIRD, CONTEXT])) == 3  # more than there is room for
        assert len(passes) == 4 and len(store._kept) == 2


def test_a_store_writes_several_prompts_in_a_pass_and_keeps_single_ones(make_model, monkeypatch) -> None:
    memory = _memory(make_model("llada").double())
    passes = _count_passes(memory, monkeypatch)
    store = MemoryStore(memory, batch_size=2)
    with memory.attached():
        written = store.get([CONTEXT, OTHER, THIRD, OTHER])
        assert sorted(passes) == [1, 2]
        singles = memory.write_prompts([CONTEXT, OTHER, THIRD])
    for one, single in zip(written, singles, strict=False):
        assert torch.allclose(one.phi, single.phi, rtol=1e-6, atol=1e-8)  # the last digit of float32
        assert one.phi.untyped_storage().nbytes() == one.phi.nbytes  # not a row of the whole pass


def test_failures_are_counted_once_and_listed(make_model) -> None:
    memory = _memory(make_model("llada"))
    store = MemoryStore(memory)
    with memory.attached():
        first = store.get([[], CONTEXT, []])
        second = store.get([[]])
    assert first[0].failure == second[0].failure == "the prompt is empty" and first[1].failure is None
    assert [reason for _, reason in store.failures] == ["the prompt is empty"]
    assert "(0 tokens)" in store.failures[0][0]
    with pytest.raises(InputError, match="at least 1"):
        MemoryStore(memory, capacity=0)


def test_a_prompt_that_fails_again_after_it_was_dropped_is_listed_once(make_model) -> None:
    memory = _memory(make_model("llada"))
    store = MemoryStore(memory, capacity=1)
    with memory.attached():
        for prompt in ([], CONTEXT, [], CONTEXT):
            store.get([prompt])
    assert store.num_written == 4 and len(store.failures) == 1


def test_contexts_that_differ_in_the_last_of_many_tokens_are_two_memories(make_model) -> None:
    memory = _memory(make_model("llada"))
    store = MemoryStore(memory)
    context = [8 + index % 30 for index in range(99)]
    with memory.attached():
        first, second = store.get([[*context, 8], [*context, 9]])
        assert store.num_written == 2 and not torch.equal(first.phi, second.phi)
        assert store.get([[*context, 9]])[0] is second and store.get([[*context, 8]])[0] is first


def test_a_batch_size_that_cannot_be_is_refused_when_the_store_is_made(make_model) -> None:
    model = make_model("llada")
    with pytest.raises(InputError, match="batch_size is 0"):
        MemoryStore(_memory(model), batch_size=0)
    with pytest.raises(InputError, match="mem_scope row, or batch_size 1"):
        MemoryStore(_memory(model, scope="batch"), batch_size=2)


# The file


def _saved(memory: ParametricMemory, path, **options):
    with memory.attached():
        (written,) = memory.adapt([CONTEXT])
        memory.save(path, **options)
    return written


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter_type", ["lora", "full"])
def test_a_saved_memory_comes_back_bitwise(make_model, tmp_path, family: str, adapter_type: str) -> None:
    path = tmp_path / "new" / "mem.safetensors"
    settings = {"inner_adapter_type": adapter_type, "inner_target_modules": "q_proj,up_proj"}
    memory = _memory(make_model(family), **settings)
    written = _saved(memory, path)
    ids = torch.tensor([OTHER])
    with memory.attached():
        memory.place([written])
        expected = memory.lm(input_ids=ids).logits
    model = make_model(family)  # another session
    memory = _memory(model, **settings, inner_lr=0.5, num_inner_steps=5)  # how it was written does not matter
    base = model(input_ids=ids).logits
    with memory.attached():
        loaded = memory.load(path)
        assert torch.equal(loaded.phi, written.phi) and loaded.phi.dtype == torch.float32
        assert torch.equal(loaded.losses, written.losses) and loaded.num_tokens == len(CONTEXT)
        assert torch.equal(model(input_ids=ids).logits, expected) and not torch.equal(expected, base)
        memory.load(path, shared=True)
        assert model(input_ids=ids.repeat(3, 1)).logits.shape[0] == 3
        memory.save(tmp_path / "again.safetensors")
    assert torch.equal(model(input_ids=ids).logits, base)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing half-written beside it
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_the_header_says_what_the_memory_is(make_model, tmp_path) -> None:
    path = tmp_path / "mem.safetensors"
    model = make_model("llada")
    model.name_or_path = "some/model"
    memory = _memory(model, inner_lr=0.25)
    written = _saved(memory, path)
    header = read_header(path)
    assert header.base_model == "some/model" and header.num_tokens == len(CONTEXT) and header.format_version == 1
    assert header.losses == written.losses.tolist() and header.settings() == memory.config
    assert header.adapter is None and header.adapter_sha256 is None
    with safe_open(path, framework="pt") as stored:
        assert set(stored.keys()) == set(memory.fast.named(torch.zeros(memory.fast.numel)))
        assert json.loads(stored.metadata()[METADATA_KEY])["memory_config"]["inner_lr"] == 0.25
    assert torch.equal(
        load_file(path)["transformer.blocks.2.ff_out.B"],
        memory.fast.named(written.phi)["transformer.blocks.2.ff_out.B"],
    )


def test_a_memory_of_another_model_is_refused(make_model, tmp_path) -> None:
    path = tmp_path / "mem.safetensors"
    model = make_model("llada")
    model.name_or_path = "first/model"
    _saved(_memory(model), path)

    def refusal(model, **settings) -> str:
        model.name_or_path = "second/model"
        memory = _memory(model, **settings)
        with memory.attached(), pytest.raises(InputError) as error:
            memory.load(path)
        assert "\n" not in str(error.value) and not memory.fast.is_set
        return str(error.value)

    message = refusal(make_model("llada", rope_theta=1234.0))
    assert "first/model" in message and "second/model" in message and "configuration" in message
    assert "not for second/model" in refusal(make_model("llada_moe"))
    tuned = make_model("llada")
    tuned.model.transformer.blocks[0].q_proj.weight.data.mul_(1.1)
    assert "whose weights are not those of second/model" in refusal(tuned)
    tuned = make_model("llada")
    tuned.model.transformer.ln_f.weight.data.add_(0.1)
    assert "whose weights are not those of second/model" in refusal(tuned)
    with_adapter = get_peft_model(make_model("llada"), LoraConfig(r=2, target_modules=["q_proj"]))
    memory = _memory(with_adapter)
    with memory.attached(), pytest.raises(InputError, match=r"without an adapter, the adapter on .* is \("):
        memory.load(path)


def test_a_memory_fits_the_model_in_another_dtype_and_under_another_name(make_model, tmp_path) -> None:
    path = tmp_path / "mem.safetensors"
    written = _saved(_memory(make_model("llada")), path)
    moved = make_model("llada").to(torch.bfloat16)
    moved.name_or_path, moved.config.mask_token_id = "moved/elsewhere", None
    memory = _memory(moved)
    with memory.attached():
        assert torch.equal(memory.load(path).phi, written.phi)


def test_a_memory_of_a_quantised_model_fits_the_plain_one_and_the_other_way_round(tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    base = str(make_tiny_checkpoint(tmp_path / "base", "llada", init_std=0.1))
    plain = _memory(load_model(base))
    quantised = _memory(load_model(base, load_in_4bit=True, dtype="float32"))
    for index, (writer, reader) in enumerate([(plain, quantised), (quantised, plain)]):
        path = tmp_path / f"{index}.safetensors"
        written = _saved(writer, path)
        with reader.attached():
            assert torch.equal(reader.load(path).phi, written.phi)


def test_the_adapter_is_part_of_the_model(make_model, tmp_path) -> None:
    path = tmp_path / "mem.safetensors"

    def adapted(seed: int):
        torch.manual_seed(seed)
        return get_peft_model(
            make_model("llada"), LoraConfig(r=2, target_modules=["q_proj", "ff_proj"], init_lora_weights=False)
        ).eval()

    written = _saved(_memory(adapted(1)), path, adapter="some/adapter")
    same, other, none = (_memory(model) for model in (adapted(1), adapted(2), make_model("llada")))
    with same.attached():
        assert torch.equal(same.load(path).phi, written.phi)
    for memory, at_hand in ((other, r"is \(\w{8}\)"), (none, "is none")):
        with memory.attached(), pytest.raises(InputError, match=rf"with the adapter some/adapter .*{at_hand}"):
            memory.load(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"inner_rank": 2},
        {"inner_alpha": 16.0},
        {"inner_target_modules": "gate_proj,up_proj"},
        {"inner_layer_fraction": 0.3},
        {"inner_adapter_type": "full"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_memory_of_other_settings_is_refused_by_the_name_of_the_setting(make_model, tmp_path, settings) -> None:
    path = tmp_path / "mem.safetensors"
    _saved(_memory(make_model("llada")), path)
    ((name, value),) = settings.items()
    memory = _memory(make_model("llada"), **settings)
    with memory.attached(), pytest.raises(InputError, match=f"mem_{name}={value}: use the same settings"):
        memory.load(path)


def test_the_order_of_the_target_roles_does_not_matter(make_model, tmp_path) -> None:
    path = tmp_path / "mem.safetensors"
    written = _saved(_memory(make_model("llada")), path)
    memory = _memory(make_model("llada"), inner_target_modules="up_proj, down_proj,gate_proj")
    assert torch.equal(load_memory(memory, path).phi, written.phi)


def test_damaged_foreign_and_missing_files_are_refused(make_model, tmp_path) -> None:
    path = tmp_path / "mem.safetensors"
    memory = _memory(make_model("llada"))
    _saved(memory, path)
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as stored:
        header = json.loads(stored.metadata()[METADATA_KEY])
    tensors = load_file(path)

    def refusal(content: bytes | None = None, **changed) -> str:
        if content is not None:
            path.write_bytes(content)
        elif changed:
            values = {**tensors, **changed.pop("tensors", {})}
            save_file(
                {name: value for name, value in values.items() if value is not None},
                path,
                metadata={METADATA_KEY: json.dumps({**header, **changed})},
            )
        with memory.attached(), pytest.raises(InputError) as error:
            memory.load(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    assert "cut short" in refusal(whole[:-4]) and "cut short" in refusal(whole[:100]) and "cut short" in refusal(b"")
    assert "no memory file" in refusal(b"this is a letter")
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    assert "its values are not those that were saved" in refusal(bytes(flipped))
    first = next(iter(tensors))
    assert f"too much, {first}" in refusal(tensors={first: None})
    assert f"{first} is torch.float16" in refusal(tensors={first: tensors[first].half()})
    assert "it has format 2, this version reads 1" in refusal(format_version=2)
    assert "header" in refusal(unknown_field=1)
    assert "does not know" in refusal(memory_config={**header["memory_config"], "inner_momentum": 0.9}, num_tokens=3)
    wrong = {
        "losses": None,
        "config_sha256": None,
        "num_tokens": "x",
        "base_model": 3,
        "adapter": 1,
        "memory_config": [],
    }
    for name, value in [*wrong.items(), ("losses", ["a"]), ("losses", [True]), ("num_tokens", 2.5)]:
        assert f"its {name} is {value!r}" in refusal(**{name: value})
    for name, value in {"inner_target_modules": 3, "seed": "x", "inner_lr": None}.items():
        assert f"its {name} is {value!r}" in refusal(memory_config={**header["memory_config"], name: value})
    save_file(tensors, path, metadata={METADATA_KEY: "{"})
    assert "header" in refusal()
    save_file(tensors, path)
    assert "no memory file" in refusal()
    path.unlink()
    assert "no such file" in refusal()


def test_what_cannot_be_saved_is_refused_and_leaves_no_file(make_model, tmp_path, monkeypatch) -> None:
    path = tmp_path / "mem.safetensors"
    memory = _memory(make_model("llada"))
    with pytest.raises(InputError, match="0 are in place"):
        memory.save(path)
    with memory.attached():
        memory.adapt([CONTEXT, OTHER])
        with pytest.raises(InputError, match="2 are in place"):
            memory.save(path)
        memory.adapt([[]])
        with pytest.raises(InputError, match="no memory to save: the prompt is empty"):
            memory.save(path)
        memory.adapt([CONTEXT])
        memory.reset()
        with pytest.raises(InputError, match="0 are in place"):
            memory.save(path)
        memory.adapt([CONTEXT])
        plan = memory.plan_prompts([OTHER], 39)
        memory.write(plan, memory.initial(plan))  # no longer what adapt wrote
        with pytest.raises(InputError, match="0 are in place"):
            memory.save(path)
        memory.adapt([CONTEXT])
        letter = tmp_path / "letter.txt"
        letter.write_text("dear")
        with pytest.raises(InputError, match="no memory file that could be replaced"):
            memory.save(letter)
        assert letter.read_text() == "dear"
        with pytest.raises(InputError, match="cannot be written"):
            memory.save(letter / "mem.safetensors")
        memory.save(path)
        before = path.read_bytes()
        monkeypatch.setattr("memdlm.memory.store.os.replace", _no_space)
        with pytest.raises(InputError, match="cannot be written: no space left"):
            memory.save(path)
        assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["letter.txt", path.name]
    with pytest.raises(InputError, match="0 are in place"):
        memory.save(path)


def _no_space(*_):
    raise OSError("no space left")
