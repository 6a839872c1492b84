"""Documents of the long-context tasks: lengths, what is hidden in them, where, and what they depend on."""

import json
import math
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest

from dllm.data.longcontext import babilong, babilong_dataset, ruler, ruler_dataset
from dllm.data.longcontext.babi import load_babi
from dllm.data.longcontext.babilong import TASKS as BABILONG
from dllm.data.longcontext.prompts import largest_fitting, place
from dllm.data.longcontext.stories import PEOPLE, PLACES, THINGS
from dllm.data.longcontext.words import compound_words, made_up_prose, needle_keys
from dllm.models import get_spec
from dllm.models.auto import load_tokenizer
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils.parsing import InputError

QAS = [f"memdlm_babilong_{qa}" for qa in BABILONG]
NIAH = ["memdlm_ruler_niah_single", "memdlm_ruler_niah_multivalue", "memdlm_ruler_niah_multikey"]
LISTS = ["memdlm_ruler_cwe", "memdlm_ruler_fwe"]
RULER = [*NIAH, "memdlm_ruler_vt", *LISTS]
LONGER = ("memdlm_ruler_cwe", "memdlm_babilong_qa2", "memdlm_babilong_qa3", "memdlm_babilong_qa5")
RESERVE = {**dict.fromkeys(QAS, 16), **dict.fromkeys(NIAH, 128)}
RESERVE |= {"memdlm_ruler_vt": 30, "memdlm_ruler_cwe": 120, "memdlm_ruler_fwe": 50}


@pytest.fixture(autouse=True)
def _few_questions(monkeypatch):
    # A length that is too short is found out by trying every question.
    monkeypatch.setattr(babilong, "NUM_MADE_UP", 40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints with tokenizers of two kinds: most words are one token; every byte is one."""
    folder = tmp_path_factory.mktemp("tokenizers")
    single = 256 + len(get_spec("llada_moe").special_tokens)
    of_bytes = str(make_tiny_checkpoint(folder / "bytes", vocab_size=single))
    seen = [row for task in [*QAS, *RULER] for row in _made(task, of_bytes, "2k", 10)]
    chat = ["user assistant system"] * 10
    text = " ".join(part for row in seen for part in (row["instruction"], row["input"], row["gen_prefix"], *chat))
    return {"words": str(make_tiny_checkpoint(folder / "words", text=text, vocab_size=2000)), "bytes": of_bytes}


def _made(task, pretrained, lengths, num_samples, **metadata):
    make = babilong_dataset if task in QAS else ruler_dataset
    return list(make(task, pretrained=pretrained, lengths=lengths, num_samples=num_samples, **metadata)["test"])


def _texts(doc, tokenizer):
    """The prompt as it is sent: plain, in chat form with turns, and in chat form in one message."""
    task = BABILONG.get(doc["task"].rpartition("_")[2])
    between = "\n\n" if doc["task"] == "memdlm_ruler_cwe" else " "
    if task is None:
        chat = [{"role": "user", "content": doc["input"]}, {"role": "assistant", "content": doc["gen_prefix"]}]
        chat_text = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        return [doc["input"] + between + doc["gen_prefix"], chat_text]
    shots = [(f"{facts}\n{question}", answer) for facts, question, answer in task.shots]
    question = f"{doc['input']}\n{doc['question']}"
    solved = "".join(f"{text} {answer}\n\n" for text, answer in shots)
    turns = [{"role": "system", "content": task.instruction}]
    for text, answer in shots:
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    one = [turns[0], {"role": "user", "content": solved + question}]
    chats = [[*turns, {"role": "user", "content": question}], one]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    return [task.instruction + solved + question, *texts]


@pytest.mark.parametrize("kind", ["words", "bytes"])
@pytest.mark.parametrize("task", [*QAS, *RULER])
def test_no_prompt_is_longer_than_asked_and_too_short_a_length_names_the_smallest(folders, task, kind):
    tokenizer = load_tokenizer(folders[kind])
    lengths = [256, 512, 1024, 2048]
    reached = []
    for length in lengths:
        try:
            docs = _made(task, folders[kind], length, 3)
        except InputError as error:
            smallest = int(
                re.search(r"smallest that works is (\d+)|a length of at least (\d+)", str(error))[0].split()[-1]
            )
            assert length < smallest and str(error).startswith(task) and "\n" not in str(error)
            assert len(_made(task, folders[kind], smallest, 3)) == 3
            with pytest.raises(InputError, match=r"too short|only . of"):
                _made(task, folders[kind], smallest - 1, 3)
            continue
        reached.append(length)
        for doc in docs:
            sizes = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in _texts(doc, tokenizer)]
            assert doc["num_tokens"] == sizes[0]
            assert max(sizes) <= length - RESERVE[task]
            # As full as whole sentences, or words, and the room for the chat template allow.
            assert max(sizes) > length - RESERVE[task] - (60 if kind == "words" else 240)
    assert 2048 in reached
    if kind == "words":
        assert reached == (lengths[1:] if task in LONGER else lengths)


@pytest.mark.parametrize("kind", ["words", "bytes"])
@pytest.mark.parametrize("task", NIAH)
def test_needles_stand_whole_in_the_text_where_depth_says(folders, task, kind):
    depths = [0, 0.25, 0.5, 0.75, 1]
    docs = _made(task, folders[kind], 2048, 10, depths=depths)
    for index, doc in enumerate(docs):
        _, text, asked = doc["input"].split("\n")
        key = re.search(r"for ([a-z]+-[a-z]+)\?", asked)[1]
        needles = re.findall(r"A secret number for (\S+) is (\d+)\.", text)
        assert [number for name, number in needles if name == key] == doc["outputs"]
        assert len(needles) == len(set(needles)) == (1 if task == NIAH[0] else 4)
        assert len({name for name, _ in needles}) == (4 if task == NIAH[2] else 1)
        assert len(doc["outputs"]) == (4 if task == NIAH[1] else 1)
        first = f"A secret number for {key} is {doc['outputs'][0]}."
        assert doc["depth"] == pytest.approx(text.index(first) / (len(text) - len(first)))
        # Half a sentence, or a row of needles, away at most.
        wanted = depths[index % 5]
        assert abs(doc["depth"] - wanted) < (0.08 if task != NIAH[1] or wanted < 1 else 0.2)
    assert len({doc["outputs"][0] for doc in docs}) == 10


def test_without_depths_needles_are_spread_out(folders):
    depths = sorted(doc["depth"] for doc in _made(NIAH[0], folders["words"], 1024, 40))
    assert depths[4] < 0.25 and 0.3 < depths[20] < 0.7 and depths[-5] > 0.75


@pytest.mark.parametrize(("kind", "length"), [("words", 256), ("words", 1024), ("bytes", 512), ("bytes", 2048)])
def test_the_chain_of_assignments_leads_to_the_variables(folders, kind, length):
    for doc in _made("memdlm_ruler_vt", folders[kind], length, 6, depths=[0, 0.5]):
        *example, task_text = doc["input"].split("\n\nFollow the assignments")
        assert len(example) == doc["num_examples"]
        context, asked = task_text.rsplit("\n", 1)
        value = re.search(r"value (\d+)", asked)[1]
        having = [name for name, number in re.findall(r"VAR (\w+) = (\d+)\.", context) if number == value]
        links = re.findall(r"VAR (\w+) = VAR (\w+)\.", context)
        for _ in links:
            having += [name for name, source in links if source in having and name not in having]
        assert having == doc["outputs"] and len(set(having)) == 5
        assert doc["gen_prefix"].endswith(f"{value}:")


def test_the_solved_example_of_vt_is_there_where_there_is_room(folders):
    counts = [doc["num_examples"] for doc in _made("memdlm_ruler_vt", folders["words"], "256,1k,2k", 1)]
    assert counts == [0, 1, 1]
    (doc,) = _made("memdlm_ruler_vt", folders["words"], "2k", 1)
    example = doc["input"].split("\n\nFollow the assignments")[0]
    names = re.findall(r"VAR (\w+) =", example)
    assert example.endswith(": " + " ".join(names)) and len(names) == 5
    assert not set(names) & set(doc["outputs"])


@pytest.mark.parametrize(("kind", "length"), [("words", 512), ("words", 4096), ("bytes", 800), ("bytes", 2048)])
def test_the_common_words_are_the_most_common_ones(folders, kind, length):
    repeats = set()
    for doc in _made("memdlm_ruler_cwe", folders[kind], length, 3):
        entries = re.findall(r"(\d+)\. ([a-z]+)", doc["input"])
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        ranked = Counter(word for _, word in entries).most_common()
        assert {word for word, _ in ranked[:10]} == set(doc["outputs"]) and len(doc["outputs"]) == 10
        assert len({count for _, count in ranked[:10]}) == 1 and len({count for _, count in ranked[10:]}) == 1
        assert ranked[9][1] > ranked[10][1] and len(ranked) >= 20
        repeats.add((ranked[9][1], ranked[10][1]))
    assert (repeats == {(30, 3)}) == (kind == "words" and length == 4096)


@pytest.mark.parametrize(("kind", "length"), [("words", 256), ("words", 2048), ("bytes", 400), ("bytes", 2048)])
def test_the_frequent_words_are_ahead_of_every_other(folders, kind, length):
    for doc in _made("memdlm_ruler_fwe", folders[kind], length, 4):
        _, coded, _ = doc["input"].split("\n")
        ranked = Counter(coded.split()).most_common()
        assert ranked[0][0] == "..."
        assert {word for word, _ in ranked[1:4]} == set(doc["outputs"])
        assert len(ranked) == 4 or ranked[3][1] > ranked[4][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
        assert doc["depth"] is None


def test_at_every_size_of_the_coded_text_three_words_are_ahead():
    scene = SimpleNamespace(rng=random.Random)
    (sample,) = ruler.TASKS["fwe"][0](scene)(0, 2000)
    right = 0
    for size in range(1, 2001):
        third, fourth = (int(size * 6 / (math.pi * rank) ** 2) for rank in (4, 5))  # the dots are the first rank
        right += third > fourth
    assert sample.least == 0 and sample.most + 1 == right
    for amount in range(right):
        content = sample.build(amount)
        counts = Counter(content.prompt.text.split("\n")[1].split())
        counts.pop("...")
        *_, third = named = [counts.pop(word) for word in content.columns["outputs"]]
        assert len(named) == 3 and third == min(named) > max(counts.values(), default=0)


@pytest.fixture(scope="module")
def solve():
    """The reader of the stories' tests."""
    import importlib.util
    import pathlib

    path = pathlib.Path(__file__).with_name("test_longcontext_stories.py")
    spec = importlib.util.spec_from_file_location("stories_reader", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.possible_answers


FACT = re.compile(
    r"(?:Daniel|John|Mary|Sandra|Bill|Fred|Jeff) (?:[a-z]+ )+(?:[a-z]+|to [A-Z][a-z]+)(?: there)?\."
    r"|The (?:bathroom|bedroom|garden|hallway|kitchen|office) is (?:north|south|east|west) of the [a-z]+\."
)


@pytest.mark.parametrize("task", QAS)
@pytest.mark.parametrize("source", ["made up", "data_dir"])
def test_the_facts_stand_in_order_in_the_text_and_give_the_target(folders, solve, task, source, request):
    data, original = {}, {}
    if source == "data_dir":
        data["data_dir"] = str(request.getfixturevalue("shared_dir") / "data")
        questions = load_babi(data["data_dir"], task[-3:])
        original = {(question.facts, question.text): question.first_supporting for question in questions}
    for depths in (None, [0, 0.5, 1]):
        docs = _made(task, folders["words"], "0k,2k", 12, depths=depths, **data)
        alone = {doc["index"]: doc for doc in docs if doc["length"] == 0}
        for doc in docs:
            facts = FACT.findall(doc["input"])
            assert len(facts) == doc["num_facts"]
            assert solve(facts, doc["question"])[-1] == doc["target"]
            assert doc["target"] in doc["labels"]
            if doc["length"] == 0:
                assert doc["input"] == " ".join(facts)
            else:
                # The same question at every length: scores of two lengths differ by the background alone.
                assert facts == FACT.findall(alone[doc["index"]]["input"])
            first = _first_supporting(doc, facts)
            if original:
                assert first == original[tuple(facts), doc["question"]]
            else:
                # From that fact on the story gives the answer.
                assert solve(facts[first:], doc["question"])[-1] == doc["target"]


def _first_supporting(doc, facts):
    """Index of the fact that stands at the document's depth."""
    at = [match.start() for match in FACT.finditer(doc["input"])]
    others = [len(doc["input"]) - len(fact) for fact in facts]
    (index,) = [i for i in range(len(facts)) if others[i] and doc["depth"] == pytest.approx(at[i] / others[i])]
    return index


@pytest.mark.parametrize(
    ("task", "lengths"), [("memdlm_babilong_qa2", "800,0k,1k,2k"), ("memdlm_babilong_qa3", "1100,1300,2k,0k")]
)
@pytest.mark.parametrize("depths", [None, [0, 0.5, 1]])
def test_questions_too_long_for_one_length_are_asked_at_none(folders, task, lengths, depths):
    docs = _made(task, folders["bytes"], lengths, 6, depths=depths)
    asked = {}
    for doc in docs:
        asked.setdefault(doc["length"], {})[doc["index"]] = FACT.findall(doc["input"]), doc["question"], doc["target"]
    smallest, *others = (questions for length, questions in sorted(asked.items()) if length)
    assert list(smallest) == list(range(6)) and len(others) == 2
    assert all(questions == smallest for questions in (*others, asked[0]))
    # A run of its own over a longer length asks them too, if it is told which length they must fit.
    alone = _made(task, folders["bytes"], "2k", 6, depths=depths, questions_fit=min(filter(None, asked)))
    assert {doc["index"]: (FACT.findall(doc["input"]), doc["question"], doc["target"]) for doc in alone} == smallest
    # Some were passed over, and those that are left kept their order.
    every = _made(task, folders["bytes"], "0k", 40)
    every = [(FACT.findall(doc["input"]), doc["question"], doc["target"]) for doc in every]
    places = [every.index(question) for question in smallest.values()]
    assert places == sorted(set(places)) != list(range(6))


def test_asked_depths_are_met_as_far_as_the_other_facts_allow(folders):
    depths = [0, 0.25, 0.5, 0.75, 1]
    for task in ("memdlm_babilong_qa1", "memdlm_babilong_qa4"):
        for doc in _made(task, folders["words"], "2k", 15, depths=depths):
            assert abs(doc["depth"] - depths[doc["index"] % 5]) < 0.12


def test_the_background_names_nobody_of_the_story(folders, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "babi").mkdir()
    names = ["Anna", *PEOPLE]
    lines = [f"On day {n} the painter {name} sailed to the kitchen." for n in range(9) for name in names]
    (tmp_path / "text" / "a.txt").write_text(" ".join(lines))
    (tmp_path / "babi" / "qa1_x_test.txt").write_text(
        "1 Mary moved to the office.\n2 John went to the garden.\n3 Where is Mary?\toffice\t1\n"
    )
    (doc,) = _made("memdlm_babilong_qa1", folders["words"], "1k", 1, data_dir=str(tmp_path))
    assert "painter Anna" in doc["input"] and "painter Sandra" in doc["input"]
    assert doc["input"].count("Mary") == doc["input"].count("John") == 1
    with pytest.raises(InputError, match=r"every sentence of .* holds one of John, Mary"):
        (tmp_path / "other" / "text").mkdir(parents=True)
        (tmp_path / "other" / "text" / "a.txt").write_text("Then Mary sailed away. Then John sailed away.")
        (tmp_path / "babi").rename(tmp_path / "other" / "babi")
        _made("memdlm_babilong_qa1", folders["words"], "1k", 1, data_dir=str(tmp_path / "other"))


def test_a_text_folder_is_the_haystack_of_needles(folders, shared_dir):
    (doc,) = _made(NIAH[0], folders["words"], "1k", 1, data_dir=str(shared_dir / "data"))
    prose = " ".join(path.read_text() for path in sorted((shared_dir / "data" / "text").glob("*.txt")))
    prose = " ".join(prose.split())
    sentences = re.split(r"A secret number for \S+ is \d+\.", doc["input"].split("\n")[1])
    assert len(sentences) == 2
    assert all(piece.strip() in prose for half in sentences for piece in re.split(r"(?<=[.!?]) ", half) if piece)


def test_too_few_questions_in_a_folder_are_an_error(folders, tmp_path):
    (tmp_path / "babi").mkdir()
    text = "1 Mary moved to the office.\n2 Where is Mary?\toffice\t1\n"
    (tmp_path / "babi" / "qa1_x_test.txt").write_text(text)
    with pytest.raises(InputError, match="has 1 questions: give num_samples of at most that many, not 2"):
        _made("memdlm_babilong_qa1", folders["words"], "0k", 2, data_dir=str(tmp_path))
    assert len(_made("memdlm_babilong_qa1", folders["words"], "0k", 1, data_dir=str(tmp_path))) == 1
    with pytest.raises(InputError, match="no text/"):
        _made("memdlm_babilong_qa1", folders["words"], "1k", 1, data_dir=str(tmp_path))


@pytest.mark.parametrize("task", ["memdlm_babilong_qa2", "memdlm_ruler_niah_multikey", *RULER[3:]])
def test_documents_depend_on_their_settings_alone(folders, task):
    random.seed(1)
    first = _made(task, folders["words"], "1k,2k", 3)
    random.seed(2)
    assert json.dumps(_made(task, folders["words"], ["2k", 1024], 3)) == json.dumps(first)
    assert [(doc["length"], doc["index"]) for doc in first] == [(n, i) for i in range(3) for n in (1024, 2048)]
    more = _made(task, folders["words"], "2k", 5)
    assert more[:3] == [doc for doc in first if doc["length"] == 2048]
    assert len({doc["input"] for doc in more}) == 5
    other = _made(task, folders["words"], "2k", 3, data_seed=43)
    assert not {doc["input"] for doc in other} & {doc["input"] for doc in more}


def test_largest_fitting_is_the_largest():
    rng = random.Random(3)
    for _ in range(200):
        sizes = [rng.randint(1, 40) for _ in range(rng.randint(1, 80))]
        base, budget = rng.randint(0, 200), rng.randint(0, 1500)
        cost = [base + sum(sizes[:n]) for n in range(len(sizes) + 1)]
        fitting = [n for n, value in enumerate(cost) if value <= budget]
        calls = []
        found = largest_fitting(lambda n: calls.append(n) or cost[n], 0, len(sizes), budget)  # noqa: B023
        assert found == (max(fitting) if fitting else None)
        assert len(calls) <= 12


def test_place_keeps_the_order_and_reaches_every_slot():
    background, facts = ["aa.", "bb.", "cc."], ["1.", "2."]
    assert place(background, facts, [0.0, 0.99], 0) == ("1. aa. bb. cc. 2.", 0.0)
    assert place(background, facts, [0.3, 0.3], 1) == ("aa. 1. 2. bb. cc.", 7 / 15)
    assert place(background, facts, [0.5, 0.6], 1, 1.0)[0] == "aa. bb. 1. cc. 2."
    assert place(background, facts, [0.1, 0.6], 0, 1.0) == ("aa. bb. cc. 1. 2.", 12 / 15)
    assert place([], ["1."], [0.4]) == ("1.", 0.0)


def test_words_cannot_be_found_inside_one_another():
    words = set(compound_words())
    assert len(words) == len(compound_words()) > 10_000
    assert not any(
        word[start:end] in words
        for word in words
        for start in range(len(word))
        for end in range(start + 4, len(word) + 1)
        if end - start < len(word)
    )
    assert len(set(needle_keys())) == len(needle_keys()) > 4000


def test_made_up_prose_holds_no_word_of_the_stories():
    prose = made_up_prose()
    assert prose == made_up_prose() and len(set(prose)) > 3000
    assert not any(re.search(rf"\b(?:{'|'.join([*PLACES, *THINGS, *PEOPLE])})\b|\d", line) for line in prose)
