"""An interrupted evaluation goes on where it was; with other settings it begins anew."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from lm_eval.api.instance import Instance

from dllm.core.eval import Interrupted
from dllm.core.eval.answers import Answer, AnswerStore, request_key
from dllm.core.samplers import MDLMSampler
from dllm.models.stamp import checkpoint_stamp
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.parsing import InputError
from memdlm.eval.harness import MemoryMDLMHarness

TEXTS = ["one two three four", "five six seven", "eight nine", "ten"]
PAIRS = [("one two", " three"), ("one two", " four five"), ("six", " seven")]
# Asked in a process of its own, which is killed in the middle.
SCRIPT = """
import os, signal, sys
sys.argv, folder, answers = sys.argv[:1], sys.argv[1], sys.argv[2]
from dllm.core.samplers import MDLMSampler
original, calls = MDLMSampler.sample, []
def sample(self, *args):
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(0)
    return original(self, *args)
MDLMSampler.sample = sample
from lm_eval.api.instance import Instance
from memdlm.eval.harness import MemoryMDLMHarness
lm = MemoryMDLMHarness(pretrained=folder, answers_dir=answers, device="cpu", steps=2)
texts = ["one two three four", "five six seven", "eight nine", "ten"]
settings = {"max_gen_toks": 4, "until": []}
requests = [("task", i, 1) for i in range(len(texts))]
lm.generate_until([Instance("generate_until", {}, (texts[m[1]], settings), 0, metadata=m) for m in requests])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model") / "m", "llada", n_layers=2, init_std=0.3)


def requests(kind: str) -> list[Instance]:
    if kind == "generate_until":
        arguments = [(text, {"max_gen_toks": 4, "until": []}) for text in TEXTS]
    elif kind == "loglikelihood":
        arguments = PAIRS
    else:
        arguments = [(text,) for text in TEXTS]
    return [Instance(kind, {}, each, 0, metadata=("task", index, 1)) for index, each in enumerate(arguments)]


@pytest.fixture
def make(checkpoint, tmp_path):
    def make(**arguments) -> MemoryMDLMHarness:
        settings = {"pretrained": str(checkpoint), "answers_dir": str(tmp_path / "answers"), "device": "cpu"}
        return MemoryMDLMHarness(**{**settings, "steps": 2, "mc_num": 3, **arguments})

    return make


@pytest.fixture
def decoded(monkeypatch):
    """The prompts that were decoded, each as often as it was."""
    seen, original = [], MDLMSampler.sample
    monkeypatch.setattr(MDLMSampler, "sample", lambda self, p, c: (seen.extend(p), original(self, p, c))[1])
    return seen


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood", "loglikelihood_rolling"])
def test_what_was_answered_is_not_asked_again(make, decoded, monkeypatch, kind):
    asked = requests(kind)
    first = make()
    answers = getattr(first, kind)(asked)
    decoded.clear()
    monkeypatch.setattr("dllm.core.eval.scoring.log_likelihoods", None)  # nothing is scored either
    second = make()
    assert getattr(second, kind)(asked) == answers
    assert decoded == []
    before, after = first.get_model_info(), second.get_model_info()
    assert (before["num_resumed"], after["num_resumed"]) == (0, len(asked))
    assert before["mean_nfe"] == after["mean_nfe"] > 0
    assert after["tokens_per_second"] == 0.0 < before["tokens_per_second"]


def test_an_interrupt_keeps_what_was_answered_and_says_how_to_go_on(make, decoded, tmp_path, monkeypatch):
    whole = make(answers_dir=None).generate_until(requests("generate_until"))
    original = MDLMSampler.sample
    decoded.clear()

    def interrupted(self, prompts, config):
        if len(decoded) == 2:
            raise KeyboardInterrupt
        return original(self, prompts, config)

    monkeypatch.setattr(MDLMSampler, "sample", interrupted)
    with pytest.raises(Interrupted, match=r"2 of 4 generate_until .* kept in .*answers; the same command goes on"):
        make().generate_until(requests("generate_until"))
    monkeypatch.setattr(MDLMSampler, "sample", original)
    assert make().generate_until(requests("generate_until")) == whole
    assert len(decoded) == 4
    monkeypatch.setattr(MDLMSampler, "sample", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted, match="not kept: give answers_dir=FOLDER"):
        make(answers_dir=None).generate_until(requests("generate_until"))


def test_a_killed_process_has_kept_its_answers(make, decoded, checkpoint, tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(checkpoint), str(tmp_path / "answers")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len((tmp_path / "answers" / "answers-0.jsonl").read_text().splitlines()) == 2
    answers = make().generate_until(requests("generate_until"))
    assert len(decoded) == 2
    assert answers == make(answers_dir=None).generate_until(requests("generate_until"))


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_line_that_was_cut_off_is_asked_again(make, decoded, tmp_path, capsys, cut):
    answers = make().generate_until(requests("generate_until"))
    path = tmp_path / "answers" / "answers-0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    decoded.clear()
    capsys.readouterr()
    harness = make()
    damaged = cut > 1  # without its line break alone a line is whole
    assert capsys.readouterr().err.count("1 damaged line(s) ignored") == damaged
    assert harness.generate_until(requests("generate_until")) == answers
    assert len(decoded) == damaged
    # The next run finds every answer.
    decoded.clear()
    assert make().generate_until(requests("generate_until")) == answers and decoded == []


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": 4}, {"steps": None}, {"block_size": 2}, {"temperature": 0.5}, {"seed": 1}, {"cfg": 0.5},
        {"max_new_tokens": 3}, {"dtype": "bfloat16"}, {"max_length": 64}, {"truncation": "left"},
        {"attn_implementation": "eager"}, {"remasking": "margin"}, {"threshold": 0.9}, {"cache": "dual"},
        {"mem_enabled": True}, {"early_stop": False},
    ],
)  # fmt: skip
def test_other_settings_are_asked_anew(make, decoded, changed):
    make().generate_until(requests("generate_until"))
    decoded.clear()
    make(**changed).generate_until(requests("generate_until"))
    assert len(decoded) == 4


@pytest.mark.parametrize(
    ("changed", "anew"),
    [({"mc_num": 4}, 3), ({"seed": 1}, 3), ({"check_greedy": False}, 3), ({"cfg": 0.5}, 3),
     ({"batch_size": 4}, 0), ({"mc_batch_size": 2}, 0)],
)  # fmt: skip
def test_what_changes_a_likelihood_and_what_does_not(make, monkeypatch, changed, anew):
    make().loglikelihood(requests("loglikelihood"))
    harness = make(**changed)
    harness.loglikelihood(requests("loglikelihood"))
    assert harness.get_model_info()["num_requests"] - harness.get_model_info()["num_resumed"] == anew


@pytest.mark.parametrize("change", ["fewer", "more"])
def test_answers_of_another_version_are_asked_anew(make, decoded, tmp_path, capsys, change: str):
    folder = tmp_path / "answers"
    make(answers_dir=str(folder)).generate_until(requests("generate_until"))
    path = folder / "answers-0.jsonl"
    first, *rest = path.read_text().splitlines()
    entry = json.loads(first)
    if change == "fewer":
        del entry["cache_forwards"]
    else:
        entry["num_wonders"] = 3
    path.write_text("\n".join([json.dumps(entry), *rest]) + "\n")
    decoded.clear()
    capsys.readouterr()
    make(answers_dir=str(folder)).generate_until(requests("generate_until"))
    told = capsys.readouterr().err
    assert "1 line(s) made by another version ignored; asked again" in told and "damaged" not in told
    assert len(decoded) == 1


def test_memory_settings_count_and_prompts_per_pass_do_not(make, decoded):
    settings = {"mem_enabled": True, "mem_inner_rank": 2, "mem_inner_layer_fraction": 0.5}
    make(**settings).generate_until(requests("generate_until"))
    for changed, count in (({"mem_inner_lr": 0.5}, 4), ({"mem_seed": 1}, 4), ({"mem_batch_size": 2}, 0)):
        decoded.clear()
        make(**settings, **changed).generate_until(requests("generate_until"))
        assert len(decoded) == count, changed


def test_another_checkpoint_in_the_same_folder_is_asked_anew(make, decoded, checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    make(pretrained=str(folder)).generate_until(requests("generate_until"))
    before = checkpoint_stamp(str(folder))
    other = make_tiny_checkpoint(tmp_path / "other", "llada", n_layers=2, init_std=0.3, seed=5)
    time.sleep(0.01)
    shutil.copyfile(pathlib.Path(other) / "model.safetensors", folder / "model.safetensors")
    after = checkpoint_stamp(str(folder))
    assert after != before
    template = folder / "chat_template.jinja"
    template.write_text((template.read_text() if template.exists() else "") + " ")
    assert checkpoint_stamp(str(folder)) != after
    decoded.clear()
    make(pretrained=str(folder)).generate_until(requests("generate_until"))
    assert len(decoded) == 4
    (folder / "results.json").write_text("{}")  # no part of a checkpoint
    decoded.clear()
    make(pretrained=str(folder)).generate_until(requests("generate_until"))
    assert decoded == []


def test_the_files_of_all_ranks_are_read(tmp_path):
    for rank in range(2):
        store = AnswerStore(str(tmp_path), rank)
        store.add(f"key{rank}", Answer(["a\nb", rank], 3, 4))
    store = AnswerStore(str(tmp_path), 5)
    assert store.get("key1") == Answer(["a\nb", 1], 3, 4) and store.get("key0") is not None and store.get("no") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"answers-{rank}.jsonl" for rank in (0, 1, 5)]
    lines = (tmp_path / "answers-0.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["value"] == ["a\nb", 0]


def test_keys_depend_on_every_part():
    keys = {
        request_key("", "a", ["b"]),
        request_key("", "a", ["c"]),
        request_key("f", "a", ["b"]),
        request_key("", "ab"),
    }
    assert len(keys) == 4 and request_key("", {"b": 1, "a": 2}) == request_key("", {"a": 2, "b": 1})


def test_a_folder_that_cannot_be_made(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"answers_dir .* cannot be made"):
        make(answers_dir=str(tmp_path / "file" / "answers"))
