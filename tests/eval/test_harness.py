"""The harness on lm-eval: what it answers, in which order, and what it refuses. A float64 model where batches are
compared: in float32 products of other sizes round in another way."""

import dataclasses
import json
import pathlib
import re

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from dllm.core.eval import BaseEvalConfig, MDLMEvalConfig, MDLMEvalHarness
from dllm.core.eval.config import parse_model_args
from dllm.core.eval.generation import read_gen_kwargs
from dllm.core.eval.likelihood import Item, Scorer, log_likelihoods
from dllm.core.eval.text import answer_text, encode_pair, rolling_windows
from dllm.core.samplers import MDLMSampler, MDLMSamplerConfig
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.parsing import InputError
from memdlm.eval.harness import MemoryEvalConfig

TEXTS = ["def f(x):", "The old man and", "x", "import json, sys, pathlib as p\n\n", "a b c d e f g h", ""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    # Larger weights than usual: near-uniform predictions would hide mistakes.
    return str(make_tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", "llada", n_layers=2, init_std=0.3))


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint).double()


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


@pytest.fixture
def make_harness(model, tokenizer):
    def make(**arguments) -> MDLMEvalHarness:
        return MDLMEvalHarness(model=model, tokenizer=tokenizer, **arguments)

    return make


def instance(kind: str, *arguments, doc_id: int = 0) -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=("task", doc_id, 1))


def generations(texts, **gen_kwargs) -> list[Instance]:
    return [instance("generate_until", text, dict(gen_kwargs), doc_id=i) for i, text in enumerate(texts)]


# Decoding.


def test_answers_come_in_the_order_of_the_requests_and_batches_equal_singles(make_harness, model, tokenizer):
    requests = generations(TEXTS, max_gen_toks=6, until=["\n"])
    requests[2].arguments = (TEXTS[2], {"max_gen_toks": 3})  # settings of its own
    answers = make_harness(batch_size=4).generate_until(requests)
    assert answers == make_harness(batch_size=1).generate_until(requests)
    assert len(set(answers)) > 3
    sampler = MDLMSampler(model, tokenizer)
    for index, text in enumerate(TEXTS):
        prompt = tokenizer.encode(text) or [tokenizer.bos_token_id]
        length = 3 if index == 2 else 6
        ids = sampler.sample([prompt], MDLMSamplerConfig(max_new_tokens=length)).answers[0].tolist()
        ids = ids[: next((i for i, token in enumerate(ids) if token in sampler.end_token_ids), length)]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert answers[index] == (text if index == 2 else text.split("\n")[0])


def _forwards(harness, requests) -> list[tuple[int, int]]:
    """Shapes of the ids of every forward."""
    shapes = []
    hook = harness.lm.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    harness.generate_until(requests)
    hook.remove()
    return shapes


def test_steps_take_effect(make_harness):
    requests = generations(["one two"] * 1 + ["three four"], max_gen_toks=8)
    for steps in (2, 4, 8, 100):
        harness = make_harness(batch_size=2, steps=float(steps), early_stop=False)
        assert len(_forwards(harness, requests)) == min(steps, 8)
        assert harness.get_model_info()["mean_nfe"] == min(steps, 8)
    assert len(_forwards(make_harness(batch_size=2, steps=3, cfg=1.0, early_stop=False), requests)) == 6


def test_settings_reach_the_sampler(make_harness, monkeypatch):
    seen = []
    original = MDLMSampler.sample
    monkeypatch.setattr(MDLMSampler, "sample", lambda self, p, c: (seen.append(c), original(self, p, c))[1])
    given = {"steps": 4, "block_size": 4, "temperature": 0.5, "remasking": "margin", "cfg": 0.5, "seed": 3}
    make_harness(**given).generate_until(generations(["a"], max_gen_toks=8))
    make_harness().generate_until(generations(["a"], max_gen_toks=8, **given))
    fields = {("cfg_scale" if name == "cfg" else name): value for name, value in given.items()}
    assert seen == [MDLMSamplerConfig(max_new_tokens=8, early_stop=True, **fields)] * 2
    make_harness(preset="fast_dllm", block_size=8).generate_until(generations(["a"], max_gen_toks=16))
    assert (seen[-1].threshold, seen[-1].cache, seen[-1].block_size, seen[-1].max_new_tokens) == (0.9, "dual", 8, 16)
    make_harness(max_uncertainty=0.2).generate_until(generations(["a"], max_gen_toks=8))
    assert seen[-1].max_uncertainty == 0.2
    make_harness(max_new_tokens=5, temperature=0.25).generate_until(
        generations(["a"], max_gen_toks=16, do_sample=False)
    )
    assert (seen[-1].max_new_tokens, seen[-1].temperature) == (5, 0.25)
    make_harness(max_new_tokens=5, early_stop=False).generate_until(generations(["a"], temperature=0.7))
    assert (seen[-1].temperature, seen[-1].early_stop) == (0.7, False)


def test_one_setting_with_two_values_is_refused(make_harness):
    make_harness(steps=4).generate_until(generations(["a"], max_gen_toks=4, steps=4))
    with pytest.raises(InputError, match="steps is 4 among the model arguments and 2"):
        make_harness(steps=4).generate_until(generations(["a"], max_gen_toks=4, steps=2))


def test_requests_are_left_as_they_are(make_harness):
    requests = generations(["a"], max_gen_toks=2, until="x", do_sample=False, temperature=0.0)
    before = json.dumps(requests[0].arguments)
    make_harness(temperature=0.5, steps=2).generate_until(requests)
    assert json.dumps(requests[0].arguments) == before


HINTS = {"steps": int | None, "remasking": str | None, "temperature": float | None}


@pytest.mark.parametrize(
    ("gen_kwargs", "until", "given"),
    [
        ({}, [], {}),
        ({"until": "\n", "max_gen_toks": 16.0}, ["\n"], {"max_new_tokens": 16}),
        ({"until": ["a", "b"], "max_new_tokens": 3, "max_gen_toks": 5}, ["a", "b"], {"max_new_tokens": 5}),
        ({"max_tokens": 7, "until": None}, [], {"max_new_tokens": 7}),
        ({"do_sample": False, "temperature": 0.7}, [], {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 1}, [], {"temperature": 1.0}),
        ({"temperature": 0.2, "num_beams": 1, "top_p": 1.0}, [], {"temperature": 0.2}),
        ({"steps": 8.0, "temperature": 0.0}, [], {"steps": 8, "temperature": 0.0}),
    ],
)
def test_generation_settings_of_tasks(gen_kwargs, until, given):
    assert read_gen_kwargs(gen_kwargs, HINTS) == (until, given)


@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [
        ({"top_p": 0.9}, "unknown generation setting top_p=0.9; known: until, max_gen_toks"),
        ({"stepps": 3}, "known: .*steps"),
        ({"do_sample": True}, "do_sample=True draws at a temperature"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=True draws at a temperature"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"until": 3}, "until must be"),
    ],
)
def test_generation_settings_that_are_refused(gen_kwargs, message):
    with pytest.raises(InputError, match=message):
        read_gen_kwargs(gen_kwargs, HINTS)


def test_an_answer_ends_at_the_first_stop(tokenizer):
    ids = tokenizer.encode("one two\n\nthree<|endoftext|> four")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert answer_text(tokenizer, ids, [end], []) == "one two\n\nthree"
    assert answer_text(tokenizer, ids, [end], ["", "three", "\n\n"]) == "one two"
    assert answer_text(tokenizer, ids, [], []) == "one two\n\nthree four"  # special tokens are no text
    assert answer_text(tokenizer, ids, [], ["<|endoftext|>"]) == "one two\n\nthree"
    assert answer_text(tokenizer, [end, *ids], [end], ["x"]) == ""


def test_a_sample_asked_for_again_is_another_one_and_equal_prompts_have_equal_answers(make_harness):
    first, second = generations(["def f(", "def f("], max_gen_toks=8, temperature=2.0)
    answers = make_harness(batch_size=3).generate_until([first, first, second, first])
    assert answers[0] == answers[2]
    assert len({answers[0], answers[1], answers[3]}) == 3
    greedy = generations(["def f("], max_gen_toks=8)[0]
    harness = make_harness()
    assert len(set(harness.generate_until([greedy, greedy]))) == 1
    assert harness.get_model_info()["num_requests"] == 2


# Likelihoods.


def test_likelihoods_equal_the_estimate_and_batches_equal_singles(make_harness, model, tokenizer):
    pairs = [("The quick", " brown fox"), ("The quick", " a"), ("x = ", "[1, 2, 3, 4, 5, 6]"), ("", "hello you")]
    requests = [instance("loglikelihood", *pair) for pair in pairs]
    found = make_harness(batch_size=4, mc_num=8, seed=2).loglikelihood(requests)
    alone = make_harness(batch_size=1, mc_num=8, seed=2).loglikelihood(requests[::-1])[::-1]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in alone], abs=1e-9)
    scorer = Scorer(model, tokenizer.mask_token_id, tokenizer.pad_token_id)
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        before = tokenizer.encode(context.rstrip()) or [tokenizer.bos_token_id]
        text = context + continuation
        target = tokenizer.encode(text)[len(before) if context else 0 :]
        expected = log_likelihoods(scorer, [Item(tuple(before), tuple(target))], 8, 2)[0]
        assert value == pytest.approx(expected, abs=1e-9) and is_greedy is False


def test_greedy_continuations_are_recognised(make_harness, model, tokenizer):
    prompt = "The quick"
    ids = MDLMSampler(model, tokenizer).sample([tokenizer.encode(prompt)], MDLMSamplerConfig(max_new_tokens=1)).answers
    (answer,) = tokenizer.batch_decode(ids)
    assert tokenizer.encode(prompt + answer) == [*tokenizer.encode(prompt), *ids[0].tolist()]
    request = instance("loglikelihood", prompt, answer)
    assert make_harness().loglikelihood([request])[0][1] is True
    assert make_harness(check_greedy=False).loglikelihood([request])[0][1] is False


def test_spaces_before_a_continuation_belong_to_it(tokenizer):
    assert encode_pair(tokenizer, "A word ", "again") == encode_pair(tokenizer, "A word", " again")
    before, target = encode_pair(tokenizer, "A word", " again")
    assert before + target == tokenizer.encode("A word again")
    bos = tokenizer.bos_token_id
    assert encode_pair(tokenizer, "", "again") == ([bos], tokenizer.encode("again"))
    assert encode_pair(tokenizer, "  ", "again") == ([bos], tokenizer.encode("  again"))
    assert encode_pair(tokenizer, "", tokenizer.bos_token + "again") == ([bos], tokenizer.encode("again"))


@pytest.mark.parametrize("max_length", [2, 3, 4, 7, 10, 50])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 9, 10, 23])
def test_rolling_windows_hold_every_token_once(length, max_length):
    tokens = list(range(100, 100 + length))
    windows = list(rolling_windows(tokens, 5, max_length))
    assert [token for _, block in windows for token in block] == tokens
    place = 0
    for context, block in windows:
        assert context and len(context) + len(block) <= max_length
        if place == 0:
            assert context == [5]
        else:  # what stands right before, as much of it as there is room for
            assert context == tokens[:place][-len(context) :]
            assert len(context) == min(place, max_length - len(block))
        place += len(block)
    if length and length < max_length:
        assert len(windows) == 1


def test_a_text_is_scored_block_by_block(make_harness, model, tokenizer):
    text = "for line in open(path): print(line)"
    harness = make_harness(batch_size=3, max_length=8, mc_num=4)
    (value,) = harness.loglikelihood_rolling([instance("loglikelihood_rolling", text)])
    scorer = Scorer(model, tokenizer.mask_token_id, tokenizer.pad_token_id)
    windows = rolling_windows(tokenizer.encode(text), tokenizer.bos_token_id, 8)
    items = [Item(tuple(context), tuple(block)) for context, block in windows]
    assert len(items) > 2
    assert value == pytest.approx(sum(log_likelihoods(scorer, items, 4, 0)), abs=1e-9)
    assert harness.loglikelihood_rolling([instance("loglikelihood_rolling", "")]) == [0.0]


# Lengths.


def test_a_prompt_that_is_too_long_is_an_error_that_names_the_numbers(make_harness, tokenizer):
    text = "word " * 30
    length = len(tokenizer.encode(text))
    harness = make_harness(max_length=20)
    with pytest.raises(InputError) as caught:
        harness.generate_until(generations(["a", text], max_gen_toks=4))
    for part in ("task document 1", f"{length} tokens", "max_length=20", "truncation=left"):
        assert part in str(caught.value)
    with pytest.raises(InputError, match="truncation=left"):
        harness.loglikelihood([instance("loglikelihood", text, " a")])
    for truncation in ("error", "left"):
        with pytest.raises(InputError, match="no room for a prompt"):
            make_harness(max_length=4, truncation=truncation).generate_until(generations(["a"], max_gen_toks=4))


def test_truncation_keeps_the_end_and_is_counted(make_harness, model, tokenizer):
    text = "one two three four five six seven eight nine ten eleven twelve"
    ids = tokenizer.encode(text)
    harness = make_harness(max_length=12, truncation="left")
    answers = harness.generate_until(generations(["a", text], max_gen_toks=4))
    expected = MDLMSampler(model, tokenizer).sample([ids[-8:]], MDLMSamplerConfig(max_new_tokens=4)).answers[0]
    assert answers[1] == tokenizer.decode(expected)
    assert harness.get_model_info()["num_truncated"] == 1
    before, target = encode_pair(tokenizer, text, " more")
    (value, _), *_ = harness.loglikelihood([instance("loglikelihood", text, " more")])
    scorer = Scorer(model, tokenizer.mask_token_id, tokenizer.pad_token_id)
    item = Item(tuple(before[len(target) - 12 :]), tuple(target))
    assert value == pytest.approx(log_likelihoods(scorer, [item], 128, 0)[0], abs=1e-9)
    assert harness.get_model_info()["num_truncated"] == 2


# What lm-eval asks for besides.


def test_answers_reach_lm_evals_own_cache(make_harness, tmp_path, monkeypatch):
    requests = generations(["a", "b c"], max_gen_toks=3, until=["q"])
    likely = [instance("loglikelihood", "a", " b"), instance("loglikelihood", "a", " c")]
    cached = CachingLM(make_harness(batch_size=2), str(tmp_path / "cache.db"))
    first = cached.generate_until(requests), cached.loglikelihood(likely)
    again = CachingLM(make_harness(), str(tmp_path / "cache.db"))
    monkeypatch.setattr(MDLMSampler, "sample", None)
    monkeypatch.setattr(MDLMEvalHarness, "loglikelihood", None)
    assert (again.generate_until(requests), again.loglikelihood(likely)) == first


def test_chat_templates(make_harness, tokenizer, monkeypatch):
    harness = make_harness()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = harness.apply_chat_template(messages[:1])
    assert text == tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert harness.apply_chat_template(messages, add_generation_prompt=False).rstrip().endswith("Hello")
    assert harness.chat_template(True) == tokenizer.chat_template and harness.chat_template(False) is None
    assert "/" not in harness.tokenizer_name
    with pytest.raises(InputError, match="one chat template without a name"):
        harness.chat_template("other")
    monkeypatch.setattr(tokenizer, "chat_template", {"default": "d", "tool": "t"})
    assert (harness.chat_template(True), harness.chat_template("tool")) == ("d", "t")
    with pytest.raises(InputError, match="choose one of default, tool"):
        harness.chat_template("other")
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="no chat template"):
        harness.chat_template(True)


def test_the_cost_is_printed_before_the_first_request(make_harness, capsys, monkeypatch, tokenizer):
    texts = ["one two three", "four five"]
    num_prompt = sum(len(tokenizer.encode(text)) for text in texts)
    monkeypatch.setattr(MDLMSampler, "sample", lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        make_harness(steps=3, cfg=1.0).generate_until(generations(texts, max_gen_toks=8))
    printed = capsys.readouterr().err
    assert f"generate_until: 2 requests, {num_prompt} prompt tokens, 16 answer tokens, at most 12 forwards" in printed
    make_harness(mc_num=5).loglikelihood([instance("loglikelihood", "a", " b c d e f")])
    assert "loglikelihood: 1 requests, 1 prompt tokens, 5 answer tokens, at most 10 forwards" in capsys.readouterr().err


def test_the_report_of_a_run(make_harness, model):
    harness = make_harness(batch_size=2, steps=2, block_size=4)
    harness.generate_until(generations(["a", "b", "a"], max_gen_toks=4))
    info = json.loads(json.dumps(harness.get_model_info()))
    assert info["eval_config"] == dataclasses.asdict(harness.config)
    assert (info["num_requests"], info["num_resumed"], info["mean_nfe"]) == (3, 0, 2.0)
    assert (info["model_dtype"], info["model_device"], info["model_attention"]) == ("torch.float64", "cpu", "sdpa")
    assert info["model_num_parameters"] == sum(p.numel() for p in model.parameters())
    assert info["tokens_per_second"] > 0 and info["tokens_per_forward"] > 0


# Arguments.


@pytest.mark.parametrize("config_class", [BaseEvalConfig, MDLMEvalConfig, MemoryEvalConfig])
def test_every_argument_takes_what_lm_evals_parser_makes_of_it(config_class):
    """Each field set alone to another value than its default, as text of a command line."""
    from lm_eval._cli.utils import key_val_to_dict

    others = {
        "load_in_4bit": True, "trust_remote_code": True, "max_length": 64, "max_new_tokens": 3, "seed": 7,
        "mc_num": 9, "mc_batch_size": 2, "check_greedy": False, "truncation": "left", "dtype": "bfloat16",
        "attn_implementation": "eager", "steps": 4, "block_size": 8, "temperature": 0.5, "remasking": "margin",
        "threshold": 0.75, "cfg": 1.5, "cache": "dual", "early_stop": False, "preset": "llada",
        "max_uncertainty": 0.25,
        "mem_num_inner_steps": 3, "mem_num_inner_epochs": 2, "mem_masking_strategy": "progressive_memory",
        "mem_prompt_mask_ratio": 0.25, "mem_progressive_consistent_start_scale": 2.0,
        "mem_inner_loss_type": "distill", "mem_inner_loss_mask_mode": "newly_revealed", "mem_inner_lr": 0.5,
        "mem_inner_grad_clip": 0.5, "mem_inner_rank": 4, "mem_inner_alpha": 8.0, "mem_inner_layer_fraction": 0.5,
        "mem_inner_target_modules": "'gate_proj,up_proj'", "mem_inner_adapter_type": "full",
        "mem_sync_inner": True, "mem_inner_gradient_checkpointing": False, "mem_scope": "batch",
        "mem_inner_target": "prompt", "mem_clip_kind": "global", "mem_seed": 1, "mem_loss_weight_type": "scheduler",
        "mem_loss_norm_type": "sequence", "mem_batch_size": 4,
    }  # fmt: skip
    alone = {"mem_distill_temperature": ("distill", 2.0), "mem_distill_hidden_type": ("distill_hidden", "cosine")}
    # Nothing but their default is allowed, or they do nothing.
    fixed = {"mem_enabled", "mem_inner_dropout", "mem_pad_unmask_mode", "mem_mask_ratio_epsilon"}
    for field in dataclasses.fields(config_class):
        if field.name in fixed:
            continue
        text = "pretrained=7b"
        if field.name.startswith("mem_"):
            text += ",mem_enabled=True"
        if field.name in alone:
            loss, value = alone[field.name]
            text += f",mem_inner_loss_type={loss},{field.name}={value}"
        elif field.name != "pretrained":
            value = others.get(field.name, "some/name")
            text += f",{field.name}={value}"
        config = parse_model_args(config_class, key_val_to_dict(text))
        if field.name == "pretrained":
            assert config.pretrained == "7b"
            continue
        found = getattr(config, field.name)
        assert str(found) == str(value).strip("'") and found != field.default, field.name


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"steps": 16.0}, "steps", 16),
        ({"steps": "None"}, "steps", None),
        ({"steps": None}, "steps", None),
        ({"pretrained": 123}, "pretrained", "123"),
        ({"temperature": 1}, "temperature", 1.0),
        ({"early_stop": "False"}, "early_stop", False),
        ({"mem_enabled": True, "mem_inner_target_modules": ["gate_proj", "up_proj"]}, "mem_inner_target_modules",
         "gate_proj,up_proj"),
        ({"adapter_model_name_or_path": None}, "adapter_model_name_or_path", None),
    ],
)  # fmt: skip
def test_values_are_brought_to_the_type_of_their_field(given, field, value):
    found = getattr(parse_model_args(MemoryEvalConfig, {"pretrained": "m", **given}), field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stepz": 3}, r"unknown model argument stepz \(did you mean steps\?\); known: .*steps.*mem_enabled"),
        ({"batch_size": 3}, "no model argument but a flag: --batch_size 3"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"early_stop": "perhaps"}, "early_stop must be true or false"),
        ({"pretrained": None}, "pretrained has no value"),
        ({"remasking": "best"}, "remasking is 'best': choose one of low_confidence"),
        ({"preset": "best"}, "preset 'best' is unknown: choose one of"),
        ({"threshold": 1.5}, "threshold must be in"),
        ({"cfg": -1.0}, "cfg must be at least 0"),
        ({"dtype": "int8"}, "dtype is 'int8': choose one of auto"),
        ({"truncation": "right"}, "truncation is 'right'"),
        ({"mc_num": 0}, "mc_num must be at least 1"),
        ({"mem_inner_lr": 0.5}, "mem_inner_lr has no effect without mem_enabled=True"),
        ({"mem_batch_size": 2}, "mem_batch_size has no effect without mem_enabled=True"),
        ({"mem_enabled": True, "mem_inner_lr": -1}, "mem_inner_lr must be at least 0"),
        ({"mem_enabled": True, "mem_batch_size": 0}, "mem_batch_size must be at least 1"),
        ({"mem_enabled": True, "mem_scope": "batch", "mem_batch_size": 2}, "use mem_scope=row"),
        ({"mem_enabled": True, "mem_pad_unmask_mode": "inner"}, "mem_pad_unmask_mode"),
    ],
)
def test_arguments_that_are_refused(given, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_model_args(MemoryEvalConfig, {"pretrained": "m", **given})
    assert "\n" not in str(caught.value)


def test_no_model_named():
    with pytest.raises(InputError, match="pretrained="):
        parse_model_args(MDLMEvalConfig, {"steps": 3})


@pytest.mark.parametrize("arguments", [{"batch_size": "auto"}, {"batch_size": 0}, {"max_batch_size": 8}])
def test_batch_sizes_are_given_not_searched(make_harness, arguments):
    with pytest.raises(InputError, match="batch_size"):
        make_harness(**arguments)


def test_settings_that_exclude_each_other_are_told_before_anything_is_asked(make_harness):
    with pytest.raises(InputError, match="threshold compares probabilities"):
        make_harness(threshold=0.9, remasking="random")


def test_families_that_decode_block_by_block_are_refused(tmp_path):
    folder = make_tiny_checkpoint(tmp_path / "m", "llada2_moe")
    with pytest.raises(InputError, match="block_causal: this harness decodes families with bidirectional attention"):
        MDLMEvalHarness(pretrained=str(folder), device="cpu")


def test_settings_for_loading_have_no_effect_on_a_loaded_model(make_harness):
    with pytest.raises(InputError, match="dtype, answers_dir has no effect on a model that is loaded already"):
        make_harness(dtype="bfloat16", answers_dir="x")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_without_cuda_one_line_says_that_the_cpu_is_used(checkpoint, capsys):
    harness = MDLMEvalHarness.create_from_arg_obj(
        {"pretrained": checkpoint, "dtype": "bfloat16"}, {"batch_size": "2", "max_batch_size": None, "device": "cuda:0"}
    )
    assert harness.device == torch.device("cpu") and harness.batch_size == 2
    assert harness.lm.dtype == torch.bfloat16
    assert "no CUDA device here" in capsys.readouterr().err
    MDLMEvalHarness(pretrained=checkpoint, device="cpu")
    assert "CUDA" not in capsys.readouterr().err
    with pytest.raises(InputError, match="--device tpu0 is no device"):
        MDLMEvalHarness(pretrained=checkpoint, device="tpu0")


def test_flags_among_the_model_arguments_are_refused(checkpoint):
    with pytest.raises(InputError, match="device is no model argument but a flag"):
        MDLMEvalHarness.create_from_arg_obj({"pretrained": checkpoint, "device": "cpu"}, {"device": "cpu"})


def test_the_docs_name_every_argument():
    page = pathlib.Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
    words = set(re.findall(r"`(\w+)`", page.read_text()))
    assert {field.name for field in dataclasses.fields(MDLMEvalConfig)} <= words
