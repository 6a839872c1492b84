"""Packing: the plan, the layout, and that packed rows train as their documents do alone."""

import copy
import random
from typing import Any

import datasets
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.data import Dataset, IterableDataset

from dllm.core.attention import document_block_mask, document_mask
from dllm.core.packing import lay_out, packed_inputs, packed_positions
from dllm.core.schedulers import LinearAlphaScheduler
from dllm.data.collators import NoisingCollator, PaddingCollator
from dllm.data.packing import Packer, is_packed, join_documents, pack_dataset, plan_packs, split_documents
from dllm.data.streaming import RowStream
from dllm.utils.parsing import InputError
from memdlm.memory.collator import MemoryCollator, inner_plan
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric import ParametricMemory

MASK, PAD = 39, 1
LENGTHS = (7, 3, 5, 4, 2)


def _documents(lengths=LENGTHS, prompt: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for index, length in enumerate(lengths):
        ids = torch.randint(2, 39, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "example_id": 10 + index})
    return made


def _packed(documents: list[dict]) -> list[dict]:
    """Two rows: documents 0 to 2, and 3 to 4 (which leaves room)."""
    return [
        {**join_documents(documents[:3]), "example_id": 0},
        {**join_documents(documents[3:]), "example_id": 1},
    ]


def _collator(**settings) -> NoisingCollator:
    pad = PaddingCollator(PAD, train_on_padding=False, hide_padding=True)
    return NoisingCollator(pad, scheduler=LinearAlphaScheduler(), mask_token_id=MASK, **settings)


def test_plan_loses_nothing_and_fills_well() -> None:
    lengths = [random.Random(index).randint(1, 60) for index in range(500)]
    packs = plan_packs(lengths, 64)
    assert sorted(index for pack in packs for index in pack) == list(range(500))
    sizes = [sum(lengths[index] for index in pack) for pack in packs]
    assert max(sizes) <= 64 and sum(size <= 32 for size in sizes) <= 1
    assert sum(sizes) / (64 * len(sizes)) > 0.95
    assert packs == sorted(packs) == plan_packs(lengths, 64)
    assert plan_packs([5, 3, 5, 2], 8) == [[0, 1], [2, 3]] and plan_packs([], 8) == []


def test_packed_rows_of_a_data_set_and_of_a_stream_hold_the_documents(caplog) -> None:
    documents = _documents([7, 3, 5, 4, 2] * 3)
    with caplog.at_level("INFO", logger="dllm"):
        packed = pack_dataset(datasets.Dataset.from_list(documents), 8)
    assert is_packed(packed) and not is_packed(documents) and "packing: 15 documents" in caplog.text
    found = split_documents(list(packed))
    assert sorted(found, key=lambda row: row["example_id"]) == documents
    streamed = list(Packer(8, window=15)(iter(copy.deepcopy(documents))))
    assert split_documents(streamed) == found and is_packed(streamed)
    assert max(len(row["input_ids"]) for row in streamed) <= 8


class _Listed(Dataset):
    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


class _Streamed(IterableDataset):
    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def _as_hub_stream(rows: list[dict]) -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(lambda: iter(rows))  # knows no columns


@pytest.mark.parametrize("form", [list, _Listed, _Streamed, _as_hub_stream])
def test_packed_rows_are_known_in_every_form(form) -> None:
    documents = _documents()
    for rows, expected in ((_packed(documents), True), (documents, False)):
        made = form(rows)
        assert is_packed(made) == is_packed({"a": made}) == expected
        if form is not _Listed:
            assert is_packed(RowStream(made)) == expected
    assert not is_packed(form([])) and not is_packed(None)


def test_a_batch_of_packed_and_other_rows_is_refused() -> None:
    documents = _documents()
    for rows in ([documents[0], *_packed(documents)], [*_packed(documents), documents[0]]):
        with pytest.raises(InputError, match="2 of the 3 rows of a batch are packed"):
            _collator()(rows)


def test_layout_against_a_naive_one() -> None:
    layout = lay_out([LENGTHS[:3], LENGTHS[3:]])
    ids = torch.arange(5 * 7).view(5, 7)
    made = packed_inputs("sdpa", layout, [ids, ids + 100])
    rows = [[*range(7), 7, 8, 9, *range(14, 19)], [*range(21, 25), 28, 29]]
    assert made["input_ids"].shape == (4, 15) and made["input_ids"][0].tolist() == rows[0]
    assert made["input_ids"][1][:6].tolist() == rows[1]
    assert torch.equal(made["input_ids"][2:, :6], made["input_ids"][:2, :6] + 100)
    assert made["position_ids"][0].tolist() == [*range(7), *range(3), *range(5)]
    owner = [[0] * 7 + [1] * 3 + [2] * 5, [0] * 4 + [1] * 2 + [2] * 9]
    for row in range(2):
        for query in range(15):
            sees = made["attention_mask"][row, 0, query].tolist()
            assert sees == [owner[row][query] == owner[row][key] for key in range(15)]
    flat = torch.tensor([0, 8, 18, 22, 29])  # of documents 0, 1, 2, 3, 4
    assert packed_positions(layout, flat).tolist() == [0, 8, 14, 15 + 1, 15 + 5]
    with pytest.raises(InputError, match="flash_attention_2 does not take"):
        packed_inputs("flash_attention_2", layout, [ids])


@pytest.mark.parametrize("length", [5, 128, 300])
def test_compact_mask_of_flex_attention_is_the_dense_one(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    segments = torch.randint(0, 5, (2, length), generator=generator).sort(dim=1).values
    mask = document_block_mask(segments)
    naive = create_block_mask(
        lambda b, h, q, k: segments[b, q] == segments[b, k], 2, None, length, length, device="cpu"
    )
    assert torch.equal(mask.to_dense(), naive.to_dense())
    assert torch.equal(mask.full_kv_num_blocks, naive.full_kv_num_blocks)
    x = torch.randn(2, 2, length, 8, generator=generator)
    with torch.no_grad():  # on a CPU flex attention has no backward
        got = flex_attention(x, x, x, block_mask=mask)
    wanted = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=document_mask(segments))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_masks_of_a_document_do_not_depend_on_packing() -> None:
    documents = _documents()
    packed, alone = _collator()(_packed(documents)), _collator()(documents)
    for name in ("is_masked", "noised_ids", "maskable", "t", "loss_positions", "loss_t", "num_maskable", "example_id"):
        assert torch.equal(packed[name], alone[name]), name
    assert "attention_mask" in alone and "attention_mask" not in packed
    # A collator that trains on padding has none to train on here.
    greedy = NoisingCollator(PaddingCollator(PAD), scheduler=LinearAlphaScheduler(), mask_token_id=MASK)
    assert torch.equal(greedy(_packed(documents))["maskable"], alone["maskable"])


@pytest.mark.parametrize("family", ["llada", "llada_moe", "fast_dllm_v2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_of_a_packed_row_are_those_of_its_documents_alone(make_model, family, implementation) -> None:
    model = make_model(family).double()
    model.set_attn_implementation(implementation)
    documents = _documents()
    shift = 1 if family == "fast_dllm_v2" else 0
    batch = _collator(logit_shift=shift)(_packed(documents))
    wanted = packed_positions(batch["packing"], batch["loss_positions"]) - shift
    with torch.no_grad():
        got = model(**packed_inputs(implementation, batch["packing"], [batch["noised_ids"]]), logit_positions=wanted)
        alone = []
        for index, document in enumerate(documents):
            ids = batch["noised_ids"][index : index + 1, : len(document["input_ids"])]
            places = batch["is_masked"][index].nonzero()[:, 0]
            alone.append(model(input_ids=ids).logits[0, places - shift])
    # float64: sums over other numbers of positions round in another way. A leak would show in the first digits.
    torch.testing.assert_close(got.logits, torch.cat(alone), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("target", ["response", "disjoint", "prompt"])
@pytest.mark.parametrize("loss", ["ce", "distill"])
def test_memory_of_packed_rows_is_that_of_their_documents(make_model, target: str, loss: str) -> None:
    documents = _documents((9, 6, 8, 7, 5), prompt=3)
    written, logits = [], []
    for rows in (_packed(documents), documents):
        model = make_model("llada").double()
        settings: Any = {"inner_target": target, "inner_loss_type": loss}
        config = MemoryConfig(enabled=True, inner_layer_fraction=0.7, **settings)
        memory = ParametricMemory(model, config, LinearAlphaScheduler())
        pad = PaddingCollator(PAD, train_on_padding=False, hide_padding=True)
        collator = MemoryCollator(pad, config=config, scheduler=LinearAlphaScheduler(), mask_token_id=MASK)
        batch = collator(rows)
        plan, positions = inner_plan(batch), batch["loss_positions"]
        if "packing" in batch:
            inputs = packed_inputs("sdpa", batch["packing"], [batch["noised_ids"]])
            positions = packed_positions(batch["packing"], positions)
        else:
            inputs = {"input_ids": batch["noised_ids"], "attention_mask": batch["attention_mask"]}
        initial = memory.initial(plan, 0)
        with memory.attached() as fast:
            with memory.writing(plan, memory.prefixes(plan), initial):
                logits.append(model(**inputs, logit_positions=positions).logits.detach())
            assert fast.value is not None
            written.append(fast.value.clone())
        assert float((written[-1] - initial).norm()) > 1e-3
    # Fast weights are float32, and gradients are summed in another order.
    torch.testing.assert_close(written[0], written[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_what_cannot_be_packed_is_refused() -> None:
    rows = _packed(_documents())
    with pytest.raises(InputError, match="packing and block diffusion"):
        _collator(block_size=4)(rows)
    pad = PaddingCollator(PAD)
    options = {"scheduler": LinearAlphaScheduler(), "mask_token_id": MASK}
    with pytest.raises(InputError, match="mem_scope=row and packing"):
        MemoryCollator(pad, config=MemoryConfig(enabled=True, scope="row"), **options)(rows)
    with pytest.raises(InputError, match="mem_pad_unmask_mode has no effect with packing"):
        MemoryCollator(pad, config=MemoryConfig(enabled=True, pad_unmask_mode="both"), **options)(rows)

    def left(rows):
        made = pad(rows)
        return {name: value.flip(1) for name, value in made.items()}

    with pytest.raises(InputError, match="padded on the right"):
        NoisingCollator(left, **options)(rows)
    with pytest.raises(InputError, match="hidden cannot be trained on"):
        PaddingCollator(PAD, hide_padding=True)
