"""The adapters `relay` and `relay_llada`: answers, likelihoods, memory beside it, what is reported, the launcher."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from dllm.core.samplers import BlockSamplerConfig, MDLMSamplerConfig
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.parsing import InputError
from memdlm import MemoryConfig
from memdlm.decoding import Decoder
from memdlm.eval.harness import (
    MemoryBlockHarness,
    MemoryMDLMHarness,
    RelayBlockEvalConfig,
    RelayBlockHarness,
    RelayMDLMHarness,
)
from memdlm.relay import RelayChannel, RelayConfig, RelayScorer
from memdlm.relay.sampler import RelaySampler

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = {
    "llada_moe": {"num_hidden_layers": 3, "num_experts": 4, "hidden_size": 32},
    "fast_dllm_v2": {"num_hidden_layers": 3, "hidden_size": 32, "bd_size": 8},
}
HARNESSES = {
    "llada_moe": (RelayMDLMHarness, MemoryMDLMHarness),
    "fast_dllm_v2": (RelayBlockHarness, MemoryBlockHarness),
}
SETTINGS = {"llada_moe": {"threshold": 0.3}, "fast_dllm_v2": {"threshold": 0.3, "sub_block_size": 4}}
MEMORY = {"mem_enabled": True, "mem_inner_rank": 4, "mem_inner_layer_fraction": 0.5, "mem_inner_lr": 3.0}
MEMORY["mem_prompt_mask_ratio"] = 0.6  # so that of each prompt here some position is drawn, short as they are
TEXTS = ["def f(x): return x + 1", "The old man and the sea", "import json, sys, pathlib"]
FAMILIES = pytest.mark.parametrize("family", SIZES)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Family -> (folder of a checkpoint, folder of the same one with an open relay)."""
    made = {}
    generator = torch.Generator().manual_seed(7)
    for family, sizes in SIZES.items():
        plain, relayed = (tmp_path_factory.mktemp(family) / kind for kind in ("plain", "relay"))
        make_tiny_checkpoint(plain, family, **sizes, initializer_range=0.2)
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
def make_harness(checkpoints):
    """A function (family, relayed, kind, **arguments) -> harness over a float64 model; kind 1 is the one without."""

    def make(family: str, relayed: bool = True, kind: int = 0, **arguments):
        folder = checkpoints[family][relayed]
        model, tokenizer = load_model(folder).double(), load_tokenizer(folder)
        return HARNESSES[family][kind](model=model, tokenizer=tokenizer, **{**SETTINGS[family], **arguments})

    return make


def _generations(length: int = 7) -> list[Instance]:
    settings = {"max_gen_toks": length, "until": []}
    made = enumerate(TEXTS)
    return [Instance("generate_until", {}, (text, settings), 0, metadata=("task", i, 1)) for i, text in made]


def _choices() -> list[Instance]:
    pairs = ((TEXTS[0], " a b"), (TEXTS[1], " and then to the old harbour"), (TEXTS[1], " x"))
    return [Instance("loglikelihood", {}, pair, 0, metadata=("task", i, 1)) for i, pair in enumerate(pairs)]


@FAMILIES
@pytest.mark.parametrize("memory", [False, True])
def test_answers_are_those_of_a_decoder(make_harness, family: str, memory: bool) -> None:
    arguments = MEMORY if memory else {}
    harness = make_harness(family, batch_size=3, **arguments)
    answers = harness.generate_until(_generations())
    assert answers == make_harness(family, **arguments).generate_until(_generations())
    settings = {name.removeprefix("mem_"): value for name, value in MEMORY.items()}
    decoder = Decoder(harness.model, harness.tokenizer, MemoryConfig.for_decoding(**settings))
    kind = MDLMSamplerConfig if family == "llada_moe" else BlockSamplerConfig
    config = kind(max_new_tokens=7, early_stop=True, **SETTINGS[family])
    nfe = 0
    for text, answer in zip(TEXTS, answers, strict=True):
        output = decoder.answer([harness.tokenizer.encode(text)], config, with_memory=memory).output
        nfe += int(output.nfe[0])
        assert decoder.text(output.answers[0].tolist()) == answer
    assert harness.get_model_info()["mean_nfe"] == pytest.approx(nfe / len(TEXTS))
    # What can be switched off does something, and off it is the other harness.
    off = make_harness(family, relay=False, **arguments).generate_until(_generations())
    assert off == make_harness(family, kind=1, **arguments).generate_until(_generations())
    zeroed = make_harness(family, relay_zeroed=True, **arguments).generate_until(_generations())
    assert len({tuple(each) for each in (answers, off, zeroed)}) == 3


@FAMILIES
def test_likelihoods_take_two_forwards_per_state(make_harness, family: str) -> None:
    harness = make_harness(family, batch_size=2, mc_num=6)
    found = harness.loglikelihood(_choices())
    scorer = harness.make_scorer()
    assert isinstance(scorer, RelayScorer) and scorer.block_size == (None if family == "llada_moe" else 8)
    for how in ({"relay": False}, {"relay_zeroed": True}):
        other = make_harness(family, mc_num=6, check_greedy=False, **how)
        values = other.loglikelihood(_choices())
        assert all(abs(one - two) > 1e-4 for (one, _), (two, _) in zip(values, found, strict=True))
        twice = make_harness(family, mc_num=6, check_greedy=False)
        twice.loglikelihood(_choices())
        assert twice.get_model_info()["mean_nfe"] == 2 * other.get_model_info()["mean_nfe"]
    alone = [make_harness(family, mc_num=6).loglikelihood([one])[0] for one in _choices()]
    assert [value for value, _ in alone] == pytest.approx([value for value, _ in found], abs=1e-9)
    with_memory = make_harness(family, mc_num=6, **MEMORY).loglikelihood(_choices())
    assert all(abs(one - two) > 1e-6 for (one, _), (two, _) in zip(with_memory, found, strict=True))


@FAMILIES
def test_what_is_kept_is_known_by_the_relay(make_harness, family: str) -> None:
    parts = {
        name: json.dumps(make_harness(family, **how).fingerprint_parts(), sort_keys=True)
        for name, how in (
            ("on", {}),
            ("asked", {"relay": True}),
            ("off", {"relay": False}),
            ("0", {"relay_zeroed": True}),
        )
    }
    assert parts["on"] == parts["asked"] and len(set(parts.values())) == 3
    harness = make_harness(family)
    keys = {"layer": -1, "positions": "mask", "first_state": "zeros", "shift_within": "block", "gate": "zero"}
    assert harness.fingerprint_parts()["relay"] == {**keys, "zeroed": False} == harness.get_model_info()["relay"]
    assert make_harness(family, relay=False).get_model_info()["relay"] is None


@FAMILIES
def test_a_checkpoint_without_a_relay(make_harness, family: str) -> None:
    harness = make_harness(family, relayed=False)
    assert not isinstance(harness.sampler, RelaySampler) and harness.make_scorer().forwards_per_row == 1
    assert harness.generate_until(_generations()) == make_harness(family, False, kind=1).generate_until(_generations())
    for how in ({"relay": True}, {"relay_zeroed": True}):
        with pytest.raises(InputError, match=r"has no relay \(model\.relay_layer_norm\.weight is not among"):
            make_harness(family, relayed=False, **how)


def test_arguments_stand_side_by_side() -> None:
    config = RelayBlockEvalConfig(pretrained="m", relay=True, preset="relay", **MEMORY)
    sampler = config.sampler_config({"temperature": 0.0})
    assert (sampler.block_size, sampler.sub_block_size, sampler.threshold) == (32, 8, 0.85)
    assert config.memory().inner_lr == 3.0
    with pytest.raises(InputError, match="relay_zeroed has no effect with relay=False"):
        RelayBlockEvalConfig(pretrained="m", relay=False, relay_zeroed=True)
    with pytest.raises(InputError, match="mem_inner_lr has no effect without mem_enabled=True"):
        RelayBlockEvalConfig(pretrained="m", mem_inner_lr=1.0)


def test_both_names_are_registered() -> None:
    from memdlm.eval import relay

    assert get_model("relay") is relay.RelayAdapter and get_model("relay_llada") is relay.RelayLLaDAAdapter


def test_launched_by_path(checkpoints, tmp_path) -> None:
    command = [sys.executable, str(ROOT / "memdlm" / "eval" / "relay.py"), "--tasks", "memdlm_babilong_qa1"]
    arguments = f"pretrained={checkpoints['fast_dllm_v2'][1]},block_size=8,threshold=0.85,max_new_tokens=8"
    command += ["--metadata", '{"lengths": "0k"}', "--limit", "2", "--device", "cpu", "--model_args", arguments]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_path", "out"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "relay (" in done.stdout and "memdlm_babilong_qa1" in done.stdout
    (results,) = (tmp_path / "out").rglob("results*.json")
    config = json.loads(results.read_text())["config"]
    assert (config["model"], config["relay"]["zeroed"], config["eval_config"]["relay"]) == ("relay", False, None)
    assert config["mean_nfe"] > 0 and config["mean_cache_forwards"] > 0
