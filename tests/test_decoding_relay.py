"""Decoders of checkpoints with a relay: by default with it; off, zeroed, and together with a memory."""

import pytest
import torch

from dllm.core.samplers import BlockSampler, BlockSamplerConfig, MDLMSampler, MDLMSamplerConfig
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils import InputError, parse_args
from memdlm import MemoryConfig, ParametricMemory
from memdlm.decoding import Decoder, LoadFlags, MemoryFlags
from memdlm.relay import RelayBlockSampler, RelayChannel, RelayConfig, RelayMDLMSampler

SIZES = {
    "llada_moe": {"num_hidden_layers": 3, "num_experts": 4, "hidden_size": 32},
    "fast_dllm_v2": {"num_hidden_layers": 3, "hidden_size": 32, "bd_size": 8},
}
SAMPLERS = {"llada_moe": (MDLMSampler, RelayMDLMSampler), "fast_dllm_v2": (BlockSampler, RelayBlockSampler)}
CONFIGS = {
    "llada_moe": MDLMSamplerConfig(max_new_tokens=7, threshold=0.3),
    "fast_dllm_v2": BlockSamplerConfig(max_new_tokens=7, threshold=0.3, sub_block_size=4),
}
MEMORY = {"prompt_mask_ratio": 0.6, "inner_lr": 5.0, "inner_layer_fraction": 0.5, "inner_rank": 4}
TEXTS = ("def add(a, b): return a + b", "import json", "for name in sorted(names): print(name)")
FAMILIES = pytest.mark.parametrize("family", SIZES)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Family -> (folder of a checkpoint, folder of the same one with an open relay)."""
    made = {}
    generator = torch.Generator().manual_seed(7)
    for family, sizes in SIZES.items():
        plain, relayed = (tmp_path_factory.mktemp(family) / kind for kind in ("plain", "relay"))
        # Large weights: almost uniform predictions would hide what is carried.
        make_tiny_checkpoint(plain, family, **sizes, initializer_range=0.2, max_position_embeddings=128)
        model = load_model(str(plain))
        channel = RelayChannel.attach(model, RelayConfig())
        with torch.no_grad():
            for parameter in channel.norm.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(relayed)
        load_tokenizer(str(plain)).save_pretrained(relayed)
        made[family] = str(plain), str(relayed)
    return made


@pytest.fixture
def make_decoder(checkpoints):
    """A function (family, relayed, **options) -> a decoder in float64 that can write memories."""

    def make(family: str, relayed: bool = True, memory: dict | None = None, zero_gate: bool = False, **options):
        folder = checkpoints[family][relayed]
        model = load_model(folder).double()
        if zero_gate:
            for parameter in model.backbone.relay_layer_norm.parameters():
                torch.nn.init.zeros_(parameter)
        config = MemoryConfig.for_decoding(**(MEMORY if memory is None else memory))
        return Decoder(model, load_tokenizer(folder), config, **options)

    return make


def _prompts(decoder: Decoder) -> list[list[int]]:
    return [decoder.tokenizer(text)["input_ids"] for text in TEXTS]


def _said(decoder: Decoder, family: str, with_memory: bool = False) -> torch.Tensor:
    return decoder.answer(_prompts(decoder), CONFIGS[family], with_memory=with_memory).output.sequences


def _from_flags(folder: str, *words: str) -> Decoder:
    words = ("--model_name_or_path", folder, "--device", "cpu", *words)
    return Decoder.from_flags(*parse_args(LoadFlags, MemoryFlags, args=words))


@FAMILIES
def test_the_checkpoint_decides_unless_flags_do(checkpoints, family: str, caplog) -> None:
    plain_class, relay_class = SAMPLERS[family]
    plain, relayed = checkpoints[family]
    assert type(_from_flags(plain).sampler) is plain_class
    for words in ((), ("--relay", "True"), ("--relay_zeroed", "True")):
        sampler = _from_flags(relayed, *words).sampler
        assert isinstance(sampler, relay_class) and sampler.zeroed == ("--relay_zeroed" in words)
    assert not [record for record in caplog.records if "which is off" in record.getMessage()]
    assert type(_from_flags(relayed, "--relay", "False").sampler) is plain_class
    (record,) = [record for record in caplog.records if "which is off" in record.getMessage()]
    assert "was trained with a relay" in record.getMessage()
    assert type(_from_flags(plain, "--relay", "False").sampler) is plain_class
    for words in (("--relay", "True"), ("--relay_zeroed", "True")):
        with pytest.raises(InputError, match=r"has no relay \(model\.relay_layer_norm\.weight is not among"):
            _from_flags(plain, *words)


@FAMILIES
def test_each_alone_is_its_own_path(make_decoder, family: str) -> None:
    plain_class, relay_class = SAMPLERS[family]
    both = make_decoder(family)
    model, prompts, config = both.sampler.model, _prompts(both), CONFIGS[family]
    # Memory off: the sampler with a relay.
    carried = relay_class(model, both.tokenizer).sample(prompts, config).sequences
    assert torch.equal(_said(both, family), carried)
    # Relay off: the memory, around the plain sampler.
    off = make_decoder(family, relay=False)
    memory = ParametricMemory(off.sampler.model, MemoryConfig.for_decoding(**MEMORY))
    with memory.attached():
        memory.adapt(prompts)
        remembered = plain_class(off.sampler.model, off.tokenizer).sample(prompts, config).sequences
    assert torch.equal(_said(off, family, with_memory=True), remembered)
    # None of the two is idle beside the other, and both off is the base model.
    together = _said(both, family, with_memory=True)
    base = _said(make_decoder(family, relayed=False), family)
    assert torch.equal(_said(off, family), base)
    found = [together, carried, remembered, base]
    assert all(not torch.equal(one, other) for i, one in enumerate(found) for other in found[:i])
    control = _said(make_decoder(family, relay_zeroed=True), family)
    assert not torch.equal(control, carried) and not torch.equal(control, base)


@FAMILIES
def test_a_memory_is_written_with_what_a_first_forward_gets(make_decoder, family: str) -> None:
    decoder = make_decoder(family)
    prompts = _prompts(decoder)
    written = decoder.answer(prompts, CONFIGS[family], with_memory=True).written
    apart = ParametricMemory(decoder.sampler.model, MemoryConfig.for_decoding(**MEMORY))
    with apart.attached(), RelayChannel(decoder.sampler.model).first_forwards():
        wanted = apart.write_prompts(prompts)
    with apart.attached():
        without = apart.write_prompts(prompts)
    for one, other, plain in zip(written, wanted, without, strict=True):
        assert one.failure is None and torch.equal(one.phi, other.phi)
        assert not torch.allclose(one.phi, plain.phi)


@FAMILIES
def test_zero_gate_and_nothing_written_is_the_base_model_bitwise(make_decoder, family: str) -> None:
    """A row at a time: rows with memories of their own pass the experts in other groups, which round in another way."""

    def decoded(decoder: Decoder, with_memory: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        logits: list[torch.Tensor] = []
        hook = decoder.sampler.lm.register_forward_hook(lambda module, args, output: logits.append(output.logits))
        output = decoder.answer(_prompts(decoder)[:1], CONFIGS[family], with_memory=with_memory).output
        hook.remove()
        return logits, output.sequences

    logits, sequences = decoded(make_decoder(family, relayed=False), False)
    found, same = decoded(make_decoder(family, memory={**MEMORY, "inner_lr": 0.0}, zero_gate=True), True)
    assert torch.equal(sequences, same) and len(found) == len(logits) > 1
    assert all(torch.equal(one, other) for one, other in zip(logits, found, strict=True))


@FAMILIES
def test_a_batch_is_its_singles_with_both_on(make_decoder, family: str) -> None:
    decoder = make_decoder(family)
    prompts, config = _prompts(decoder), CONFIGS[family]
    together = decoder.answer(prompts, config, with_memory=True)
    for index, prompt in enumerate(prompts):
        alone = decoder.answer([prompt], config, with_memory=True)
        assert together.output.answers[index].tolist() == alone.output.answers[0].tolist()
        assert together.output.nfe[index] == alone.output.nfe[0]
        assert torch.equal(together.written[index].phi, alone.written[0].phi)


def test_forwards_are_named_by_what_they_are_for(make_decoder) -> None:
    decoder = make_decoder("fast_dllm_v2")
    decoded = decoder.answer(_prompts(decoder)[:1], CONFIGS["fast_dllm_v2"])
    nfe, others = int(decoded.output.nfe[0]), int(decoded.output.cache_forwards[0])
    assert others > 0
    rate = f"{7 / nfe:.2f}"
    assert decoded.summary(0) == f"{nfe} denoising forwards, {rate} tokens per forward, {others} more for the cache"
