"""Mixtures: sources, layouts, filters, repeated prompts, benchmark problems."""

import re

import datasets
import pytest

from dllm.data import default_sft_map_fn
from dllm.data.mixture import MIXTURE_PRESETS, Mixer, MixtureSettings, Source, SourceOptions, parse_source
from dllm.data.overlap import FEWEST_WORDS, NGRAM_WORDS, LeakFilter, Seen, words
from dllm.utils import InputError

CODE = {"input": "Add {n} and one.", "output": "def f():\n    return {n} + 1", "average_test_score": "1.0"}


def _code(number: int, **changes) -> dict:
    row = {name: value.replace("{n}", str(number)) for name, value in CODE.items()}
    return {**row, "tests_execution_status": '["pass", "pass"]', **changes}


def _maths(number: int) -> dict:
    return {"problem": f"What is {number} + {number}?", "generated_solution": f"It is {2 * number}."}


def _mix(*sources: str, preset: str | None = None, **settings) -> tuple[list[dict], list[dict]]:
    mixer = Mixer(MixtureSettings(**settings), MIXTURE_PRESETS[preset].options if preset else None)
    return mixer.mix([parse_source(spec) for spec in sources]), mixer.report


def _prompts(rows: list[dict]) -> list[str]:
    return [row["messages"][-2]["content"] for row in rows]


def test_a_source_is_a_name_options_and_a_number() -> None:
    assert parse_source("data/a.jsonl:24_000") == Source("data/a.jsonl", 24000)
    assert parse_source("builtin:docstrings:5").name == "builtin:docstrings"
    found = parse_source("org/name?config=x&split=train_1M&min_score=0.5&all_pass=True&contains=def :7")
    wanted = SourceOptions(split="train_1M", min_score=0.5, all_pass=True, contains="def ")
    assert found == Source("org/name", 7, wanted, {"config": "x"})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a.jsonl", "the form is FILE:NUMBER"),
        ("a.jsonl:0", "the number above 0"),
        ("a.jsonl:-5", "the form is FILE:NUMBER"),
        ("a.jsonl?colour=red:5", "'colour=red' is no key=value; the keys are split, prompt"),
        ("a.jsonl?split:5", "'split' is no key=value"),
        ("a.jsonl?min_score=high:5", "min_score=high is no number"),
        ("a.jsonl?all_pass=1:5", "all_pass is True or False"),
        ("a.jsonl?max_prompt_chars=0:5", "max_prompt_chars must be at least 1, got 0"),
        ("a.jsonl?prompt=q:5", "give both, or neither"),
    ],
)
def test_other_sources_are_one_line(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        parse_source(spec)
    assert "\n" not in str(caught.value)


def test_known_layouts_are_mapped_and_mixed_in_the_numbers_asked_for(write_jsonl) -> None:
    files = {
        "code": write_jsonl("code.jsonl", [_code(number) for number in range(9)]),
        "maths": write_jsonl("maths.jsonl", [_maths(number) for number in range(9)]),
        "gsm": write_jsonl("gsm.jsonl", [{"question": f"q{i}", "answer": f"a{i}"} for i in range(9)]),
        "alpaca": write_jsonl(
            "alpaca.jsonl", [{"instruction": f"i{i}", "input": "x", "output": "o"} for i in range(9)]
        ),
        "own": write_jsonl("own.jsonl", [{"ask": f"ask {i}", "say": f"say {i}"} for i in range(9)]),
    }
    sources = [f"{files['code']}:4", f"{files['maths']}:3", f"{files['gsm']}:2", f"{files['alpaca']}:1"]
    rows, report = _mix(*sources, f"{files['own']}?prompt=ask&response=say:5", system="Be brief.")
    assert [entry["taken"] for entry in report] == [4, 3, 2, 1, 5] and len(rows) == 15
    by_source = {name: [row["messages"] for row in rows if row["source"] == path] for name, path in files.items()}
    assert [len(found) for found in by_source.values()] == [4, 3, 2, 1, 5]
    assert all(
        messages[0] == {"role": "system", "content": "Be brief."} for row in by_source.values() for messages in row
    )
    (alpaca,) = by_source["alpaca"]
    assert re.fullmatch(r"i\d\n\nx", alpaca[1]["content"])
    for number in range(9):
        question, answer = _maths(number).values()
        assert all(row[2]["content"] == answer for row in by_source["maths"] if row[1]["content"] == question)
    assert all(re.fullmatch(r"def f\(\):\n    return \d \+ 1", row[2]["content"]) for row in by_source["code"])
    sources_in_order = [row["source"] for row in rows]
    assert sources_in_order != sorted(sources_in_order, key=list(files.values()).index)


def test_the_seed_decides_which_rows_and_in_which_order(write_jsonl) -> None:
    path = write_jsonl("maths.jsonl", [_maths(number) for number in range(40)])
    first, again, other = (_prompts(_mix(f"{path}:12", seed=seed)[0]) for seed in (1, 1, 2))
    assert first == again and set(first) != set(other)
    streamed = _prompts(_mix(f"{path}:12", seed=1, shuffle_buffer=40)[0])
    assert len(set(streamed)) == 12 and streamed == _prompts(_mix(f"{path}:12", seed=1, shuffle_buffer=40)[0])
    within = _prompts(_mix(f"{path}:12", seed=1, shuffle_buffer=1)[0])
    assert set(within) == {_maths(number)["problem"] for number in range(12)}


def test_each_filter_drops_its_rows_and_is_counted(write_jsonl) -> None:
    rows = [
        _code(0),
        _code(1, average_test_score="0.9"),
        _code(2, average_test_score=None),
        _code(3, tests_execution_status='["pass", "fail"]'),
        _code(4, tests_execution_status="[]"),
        _code(5, output="lambda x: x"),
        _code(6, input=""),
        _code(7, input="x" * 40),
        _code(8, output="def f(): return '" + "x" * 60 + "'"),
        _code(0, input="  ADD 0\n and ONE."),
        _code(9, average_test_score=None, input="add 10 and one."),
        _code(10),
    ]
    path = write_jsonl("code.jsonl", rows)
    filters = "min_score=1&all_pass=True&contains=def &max_prompt_chars=39&max_response_chars=60"
    taken, (report,) = _mix(f"{path}?{filters}:100")
    assert len(taken) == 2 and report["read"] == 12
    wanted = {"score": 3, "tests": 2, "contains": 1, "empty": 1, "prompt_chars": 1, "response_chars": 1}
    assert report["dropped"] == {**wanted, "repeated_prompt": 1}
    # Whatever is dropped for another reason does not keep a good row with the same prompt out.
    assert "Add 10 and one." in _prompts(taken)


def test_the_preset_filters_each_layout(write_jsonl) -> None:
    code = [_code(0), _code(1, average_test_score="0.5"), _code(2, output="class A: pass")]
    maths = [_maths(0), {**_maths(1), "problem": "x" * 4001}, {**_maths(2), "generated_solution": "x" * 6001}]
    paths = [write_jsonl("code.jsonl", code), write_jsonl("maths.jsonl", maths)]
    rows, report = _mix(*(f"{path}:3" for path in paths), preset="c40m60")
    assert [entry["dropped"] for entry in report] == [
        {"contains": 1, "score": 1},
        {"prompt_chars": 1, "response_chars": 1},
    ]
    loosened, _ = _mix(f"{paths[0]}?min_score=0.5:3", preset="c40m60")
    assert (len(rows), len(loosened)) == (2, 2)
    assert [parse_source(spec).count for spec in MIXTURE_PRESETS["c40m60"].sources] == [24000, 36000]


def test_a_prompt_comes_once_over_all_sources(write_jsonl) -> None:
    first = write_jsonl("first.jsonl", [{"question": "What is 1 + 1?", "answer": "2"}])
    second = write_jsonl("second.jsonl", [_maths(1), _maths(2)])
    rows, report = _mix(f"{first}:1", f"{second}:2")
    assert sorted(_prompts(rows)) == ["What is 1 + 1?", "What is 2 + 2?"]
    assert report[1]["dropped"] == {"repeated_prompt": 1}


def test_long_conversations_are_dropped_by_their_tokens(write_jsonl, tokenizer) -> None:
    rows = [{"question": f"q{number}", "answer": "the sea " * number} for number in range(1, 9)]
    path = write_jsonl("rows.jsonl", rows)
    lengths = [len(default_sft_map_fn(row, tokenizer=tokenizer)["input_ids"]) for row in rows]
    most = sorted(lengths)[4]
    taken, (report,) = _mix(f"{path}:8", max_tokens=most, tokenizer=tokenizer)
    assert len(taken) == sum(length <= most for length in lengths) == 8 - report["dropped"]["tokens"]
    with pytest.raises(InputError, match="give --model_name_or_path too"):
        MixtureSettings(max_tokens=5)


def test_a_source_that_cannot_be_used_is_one_line(write_jsonl, tmp_path) -> None:
    maths = write_jsonl("maths.jsonl", [_maths(1)])
    datasets.DatasetDict({"train_1M": datasets.Dataset.from_list([_maths(3)])}).save_to_disk(str(tmp_path / "saved"))
    for spec, message in (
        (f"{maths}?split=more:1", "has no split 'more'; it has: train"),
        (f"{tmp_path / 'saved'}:1", "has no split 'train'; it has: train_1M: give \\?split=NAME"),
        (f"{maths}?prompt=a&response=b:1", "there is no column 'a'; columns found: problem"),
        (f"{maths}?min_score=1:1", "min_score needs the column to look at: add &score=COLUMN"),
        (f"{maths}?score=problem:1", "score has no effect without min_score"),
        (f"{maths}?contains=zebra:1", "none of its 1 rows is left \\(contains 1\\): loosen a filter"),
        (f"{maths}?config=x:1", "option 'config' is unknown"),
        (f"{write_jsonl('odd.jsonl', [{'a': 1}])}:1", "holds no messages; .*name the columns"),
        (f"{tmp_path / 'none.jsonl'}:1", "does not exist"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            _mix(spec)
        assert "\n" not in str(caught.value)
    rows, _ = _mix(f"{tmp_path / 'saved'}?split=train_1M:1")
    assert _prompts(rows) == ["What is 3 + 3?"]


def test_too_few_rows_are_told(write_jsonl, caplog, monkeypatch) -> None:
    monkeypatch.setattr("dllm.data.mixture.logger.propagate", True)
    path = write_jsonl("maths.jsonl", [_maths(1), _maths(2)])
    with caplog.at_level("WARNING"):
        rows, report = _mix(f"{path}:5")
    assert len(rows) == 2 and (report[0]["asked"], report[0]["taken"]) == (5, 2)
    assert "5 rows asked for, 2 left" in caplog.text


def test_words_ignore_case_punctuation_and_layout() -> None:
    assert words("Add: two_numbers,\n\tplease! (2 * 3)") == ["add", "two", "numbers", "please", "2", "3"]


def test_prompts_are_the_same_but_for_case_and_white_space() -> None:
    seen = Seen()
    assert seen.add("Add two numbers.") and not seen.add("  add\tTWO\n numbers.") and seen.add("Add three numbers.")
    for prompt in (
        "x^2 + 5x = 6",
        "x^2 - 5x = 6",
        "x\u00b2 - 5x = 6",
        "3 * 4",
        "3 / 4",
        "3.4",
        "34",
        "3 < 4",
        "3 > 4",
        "\ud800",
    ):
        assert seen.add(prompt) and not seen.add(f" {prompt}\n"), prompt


def test_a_score_of_0_is_a_filter_too(write_jsonl) -> None:
    rows = [{"question": f"q{score}", "answer": "a", "score": score} for score in (-1, 0, 1, float("nan"))]
    path = write_jsonl("scores.jsonl", rows)
    taken, (report,) = _mix(f"{path}?min_score=0&score=score:4")
    assert sorted(_prompts(taken)) == ["q0", "q1"] and report["dropped"] == {"score": 2}
    with pytest.raises(InputError, match="min_score needs the column to look at"):
        _mix(f"{path}?min_score=0:4")
    with pytest.raises(InputError, match="min_score must be a number, got nan"):
        parse_source("a.jsonl?min_score=nan:4")
    assert len(_mix(f"{path}?all_pass=False:4")[0]) == 4
    with pytest.raises(InputError, match="results has no effect without all_pass"):
        _mix(f"{path}?all_pass=False&results=score:4")


def test_a_preset_says_where_it_filters_nothing(write_jsonl, caplog, monkeypatch) -> None:
    monkeypatch.setattr("dllm.data.mixture.logger.propagate", True)
    known, other = (
        write_jsonl("known.jsonl", [_maths(1)]),
        write_jsonl("other.jsonl", [{"prompt": "p", "completion": "c"}]),
    )
    with caplog.at_level("WARNING"):
        _, (first, second) = _mix(f"{known}:1", f"{other}:1", preset="c40m60")
    assert (first["layout"], second["layout"]) == ("open_math_instruct_2", None)
    assert "other.jsonl: NONE of the preset's filters is applied, its columns (prompt, completion) are" in caplog.text
    assert "known.jsonl" not in caplog.text


def _leaks_naively(benchmarks: list[str], prompt: str, answer: str) -> bool:
    begins = re.compile("^write a (python )?function to ")
    versions = [begins.sub("", " ".join(words(text))).split() for text in benchmarks]
    for benchmark in (*map(words, benchmarks), *versions):
        if len(benchmark) < FEWEST_WORDS:
            if benchmark in (words(prompt), begins.sub("", " ".join(words(prompt))).split()):
                return True
            continue
        length = min(len(benchmark), NGRAM_WORDS)
        runs = [benchmark[i : i + length] for i in range(len(benchmark) - length + 1)]
        for text in (words(prompt), words(answer)):
            if any(text[i : i + length] in runs for i in range(len(text) - length + 1)):
                return True
    return False


def test_leaks_are_long_runs_of_a_benchmarks_words() -> None:
    long = " ".join(f"w{index}" for index in range(20))
    benchmarks = [
        long,
        "write a function that doubles every number",
        "sort a list",
        "Write a function to swap two numbers.",
    ]
    benchmarks.append("Write a python function to find the largest of all given odd numbers")
    leaks = LeakFilter(benchmarks).leaks
    run = " ".join(f"W{index}," for index in range(4, 4 + NGRAM_WORDS))
    cases = {
        (f"Please: {run} thanks", "x"): True,
        ("x", f"def f():\n    '''{run}'''"): True,
        (f"Please: {run.replace('W9,', '')} thanks", "x"): False,
        ("Write a function that doubles EVERY number!", "x"): True,
        ("Write a function that doubles every other number", "x"): False,
        ("Sort a list.", "x"): True,
        ("How do I sort a list of names?", "sort a list"): False,
        ("Write a function to sort a list.", "x"): True,
        ("Write a Python function to swap two numbers", "x"): True,
        ("Swap two numbers", "x"): True,
        ("Swap two numbers, please", "x"): False,
        ("Write a function to find the largest of all given odd numbers", "x"): True,
        ("Now find the largest of all given odd numbers!", "x"): True,
        ("Write a python function to find the largest of all given even numbers", "x"): False,
    }
    for (prompt, answer), leaking in cases.items():
        assert leaks(prompt, answer) is leaking is _leaks_naively(benchmarks, prompt, answer), prompt
    assert not LeakFilter([]).leaks("anything", "at all")
