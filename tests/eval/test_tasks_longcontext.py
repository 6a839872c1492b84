"""The task files under lm-eval: found and loaded, prompts as counted, scores of answers that are known."""

import fnmatch
import pathlib

import pytest

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import make_table  # noqa: E402

from dllm.data.longcontext import OFFLINE_TWINS, babilong, find_offline_twin, ruler  # noqa: E402
from dllm.data.longcontext.scoring import babilong_results, ruler_results  # noqa: E402
from dllm.models.auto import load_tokenizer  # noqa: E402
from dllm.models.tiny import make_tiny_checkpoint  # noqa: E402
from dllm.utils.parsing import InputError  # noqa: E402
from memdlm.eval import llada  # noqa: E402, F401 - its arguments (mem_*) are let through where it is loaded

TASKS = pathlib.Path(__file__).resolve().parents[2] / "lm-evaluation-harness" / "tasks"
BUILT_IN = pathlib.Path(lm_eval.__file__).parent / "tasks"
BABILONG = [f"memdlm_babilong_{qa}" for qa in babilong.TASKS]
RULER = [f"memdlm_ruler_{name}" for name in ruler.TASKS]
GROUPS = ["memdlm_babilong", "memdlm_ruler"]


class Known(LM):
    """Answers from the document itself, and keeps what it was asked."""

    tokenizer_name = "tiny"

    def __init__(self, answer, tokenizer=None):
        super().__init__()
        self.answer, self.tokenizer, self.asked = answer, tokenizer, []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += requests
        return [self.answer(request.doc) for request in requests]

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


def right(doc):
    return f" {doc['target']}." if "target" in doc else " " + ", ".join(doc["outputs"]).upper()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture
def manager(tiny, monkeypatch):
    """manager(**metadata) -> TaskManager that knows our tasks alone."""
    monkeypatch.setattr(babilong, "NUM_MADE_UP", 40)

    def make(**metadata):
        metadata = {"pretrained": tiny, "steps": 4, "mem_enabled": True, "num_samples": 3, **metadata}
        return TaskManager(include_path=[str(TASKS)], include_defaults=False, metadata=metadata)

    return make


def _run(lm, tasks, task_manager, **options):
    return lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=task_manager, bootstrap_iters=1000, **options)


def test_every_task_file_is_found_under_a_name_of_our_own(manager):
    found = manager()
    assert sorted(found.all_tasks) == sorted([*GROUPS, *BABILONG, *RULER])
    assert sorted(found.all_groups) == GROUPS
    built_in = [
        line.split(":", 1)[1].strip()
        for path in BUILT_IN.rglob("*.yaml")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith(("task:", "group:")) and not line.endswith(":")
    ]
    assert len(built_in) > 1000
    assert not set(found.all_tasks) & set(built_in)
    assert {"babilong_longctx", "ruler", "longbench"} <= set(built_in)


def test_the_answers_room_is_the_same_in_yaml_and_in_the_makers(manager):
    tasks = manager(lengths="2k", num_samples=1).load(GROUPS)["tasks"]
    room = {name: task.config.generation_kwargs["max_gen_toks"] for name, task in tasks.items()}
    made = {f"memdlm_ruler_{name}": reserve for name, (_, reserve) in ruler.TASKS.items()}
    assert room == {**dict.fromkeys(BABILONG, babilong.ANSWER_TOKENS), **made}
    assert all(task.config.target_delimiter == " " for name, task in tasks.items() if name != "memdlm_ruler_cwe")
    shots = {task.config.num_fewshot for name, task in tasks.items() if name in BABILONG}
    assert shots == {2}


@pytest.mark.parametrize("metadata", [{"lengths": "2k"}, {"lengths": ["1k", 2048, 1500], "depths": [0, 1]}])
def test_right_answers_score_one_and_empty_ones_zero(manager, metadata):
    lengths = [2048] if metadata["lengths"] == "2k" else [1024, 1500, 2048]
    for answer, score in ((right, 1.0), (lambda doc: "", 0.0)):
        results = _run(Known(answer), GROUPS, manager(**metadata))
        for name in [*BABILONG, *RULER]:
            found = results["results"][name]
            accs = {key for key in found if key.startswith("acc@") and key.endswith(",none") and "stderr" not in key}
            assert accs == {f"acc@{length},none" for length in lengths}
            assert all(found[key] == score for key in accs) and found["acc,none"] == score
            assert found["sample_len"] == 3 * len(lengths)
        assert [results["groups"][group]["acc,none"] for group in GROUPS] == [score] * 2
        assert results["groups"]["memdlm_babilong"]["acc_strict,none"] == score
    assert "|acc@2048" in make_table(results)


def test_scores_of_one_length_do_not_touch_those_of_another(manager):
    lm = Known(lambda doc: right(doc) if doc["length"] == 2048 else "")
    found = _run(lm, ["memdlm_ruler_vt", "memdlm_babilong_qa4"], manager(lengths="1k,2k"))["results"]
    for scores in found.values():
        assert (scores["acc@1024,none"], scores["acc@2048,none"], scores["acc,none"]) == (0.0, 1.0, 0.5)


def test_a_limit_reaches_every_length_alike(manager):
    results = _run(Known(right), ["memdlm_babilong_qa1"], manager(lengths="0k,1k,2k", num_samples=5), limit=6)
    docs = [sample["doc"] for sample in results["samples"]["memdlm_babilong_qa1"]]
    assert [(doc["length"], doc["index"]) for doc in docs] == [(n, i) for i in range(2) for n in (0, 1024, 2048)]
    assert results["results"]["memdlm_babilong_qa1"]["acc@0,none"] == 1.0
    assert all({"task", "length", "num_tokens", "depth"} <= set(doc) for doc in docs)


@pytest.mark.parametrize("chat", [None, True, False], ids=["plain", "turns", "one message"])
def test_prompts_that_are_sent_are_within_the_length_and_counted_right(manager, tiny, chat):
    tokenizer = load_tokenizer(tiny)
    lm = Known(right, tokenizer)
    options = {} if chat is None else {"apply_chat_template": True, "fewshot_as_multiturn": chat}
    _run(lm, GROUPS, manager(lengths="1k,2k"), **options)
    assert len(lm.asked) == 3 * 2 * len([*BABILONG, *RULER])
    for request in lm.asked:
        prompt, settings = request.args
        size = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        assert size + settings["max_gen_toks"] <= request.doc["length"]
        assert request.doc["input"] in prompt
        if chat is None:
            assert size == request.doc["num_tokens"]
            assert prompt.endswith(request.doc["gen_prefix"] or request.doc["question"])


def test_documents_do_not_depend_on_which_tasks_are_selected(manager):
    alone = manager(lengths="1k").load(["memdlm_ruler_fwe"])["tasks"]["memdlm_ruler_fwe"]
    together = manager(lengths="1k").load(GROUPS)["tasks"]["memdlm_ruler_fwe"]
    assert alone.dataset["test"].to_list() == together.dataset["test"].to_list()


def test_wrong_metadata_stops_the_loading_with_one_line(manager):
    with pytest.raises(InputError, match="memdlm_babilong_qa1: unknown metadata length; known: lengths, num_samples"):
        manager(length="1k").load(["memdlm_babilong"])
    with pytest.raises(InputError, match=r"memdlm_ruler_niah_single: length 0 is too short .* the smallest that works"):
        manager(lengths="0k").load(["memdlm_ruler"])


DOC = {"target": "garden", "labels": ["garden", "office", "kitchen"], "question": "Where?", "length": 1024}


@pytest.mark.parametrize(
    ("answer", "question", "acc", "strict"),
    [
        (" the Garden\n", "Where?", 1, 1),
        ("garden or office", "Where?", 1, 0),
        ("garden. office", "Where?", 1, 1),
        ("office. garden", "Where?", 1, 0),
        ("office", "Where?", 0, 0),
        ("", "Where?", 0, 0),
        ("before the kitchen it was in the garden", "Where was it before the kitchen?", 1, 1),
    ],
)
def test_babilong_scores(answer, question, acc, strict):
    found = babilong_results({**DOC, "question": question}, [answer])
    assert found == {"acc": acc, "acc_strict": strict, "acc@1024": acc}


def test_ruler_scores_are_the_share_of_what_was_named():
    doc = {"outputs": ["Alpha", "beta", "123", "gamma"], "length": 512}
    assert ruler_results(doc, ["ALPHA\x0b and 123"]) == {"acc": 0.5, "acc@512": 0.5}
    assert ruler_results(doc, ["gamma beta 0123 alphabet"])["acc"] == 1.0


def test_the_table_of_twins_names_tasks_that_exist(manager):
    folders = [BUILT_IN / name for name in ("babilong", "ruler", "longbench", "longbench2", "humaneval", "mbpp")]
    known = TaskManager(include_path=folders, include_defaults=False).all_tasks
    ours = manager().all_tasks
    for pattern, twin in OFFLINE_TWINS.items():
        matched = fnmatch.filter(known, pattern)
        assert matched, pattern
        assert twin.task is None or twin.task in ours
    for name in known:
        if name.startswith(("babilong", "longbench")):
            assert find_offline_twin(name) is not None, name
    assert find_offline_twin("babilong_longctx").task == "memdlm_babilong"
    assert find_offline_twin("babilong_qa3").task == "memdlm_babilong_qa3"
    assert find_offline_twin("babilong_qa12").task is None
    assert find_offline_twin("niah_single_2").task == "memdlm_ruler_niah_single"
    # These make their documents without the network.
    for name in ("niah_single_1", "niah_multikey_2", "ruler_vt", "ruler_cwe", "ruler_fwe", "memdlm_ruler", "gsm8k"):
        assert find_offline_twin(name) is None
