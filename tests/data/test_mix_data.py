"""The command that mixes data: files, reports, what is refused."""

import json
import pathlib

import pytest

from dllm.data import load_sft_dataset
from dllm.tools.mix_data import MixArguments, benchmark_prompts, main, mix_data
from dllm.utils import InputError


@pytest.fixture
def source(write_jsonl) -> str:
    return write_jsonl("rows.jsonl", [{"question": f"Say {number}.", "answer": str(number)} for number in range(20)])


def _report(output) -> dict:
    return json.loads(pathlib.Path(f"{output}.report.json").read_text())


def test_a_file_is_read_by_training(source, tmp_path) -> None:
    output = mix_data(MixArguments(output=str(tmp_path / "new" / "mix.jsonl"), source=[f"{source}:12"], seed=3))
    rows = load_sft_dataset(str(output))
    assert {split: len(found) for split, found in rows.items()} == {"train": 12}
    assert rows["train"][0]["messages"][0]["content"].startswith("Say ")
    report = _report(output)
    assert report["rows"] == 12 and report["seed"] == 3 and report["sources"][0]["taken"] == 12
    assert sorted(path.name for path in output.parent.iterdir()) == ["mix.jsonl", "mix.jsonl.report.json"]


def test_a_folder_has_test_rows_where_they_are_asked_for(source, tmp_path) -> None:
    output = mix_data(MixArguments(output=str(tmp_path / "mix"), source=[f"{source}:12"], num_test=5))
    rows = load_sft_dataset(str(output))
    assert {split: len(found) for split, found in rows.items()} == {"train": 7, "test": 5}
    assert not set(map(str, rows["train"])) & set(map(str, rows["test"]))
    assert _report(output)["rows"] == 12


def test_benchmarks_are_read_by_their_columns(write_jsonl, tmp_path) -> None:
    first = write_jsonl("a.jsonl", [{"task_id": 1, "prompt": "p", "mixed": [1, "x"]}, {"text": "t", "mixed": "y"}])
    (tmp_path / "b.json").write_text(json.dumps([{"problem": "q"}]))
    assert list(benchmark_prompts([first, str(tmp_path / "b.json")])) == ["p", "t", "q"]
    with pytest.raises(InputError, match=r"row 1: none of the columns prompt, text.*columns found: a"):
        list(benchmark_prompts([write_jsonl("c.jsonl", [{"a": "x"}])]))


def test_the_preset_brings_its_settings_and_flags_win(write_jsonl, tmp_path, tiny_folder) -> None:
    row = {"input": "Add.", "output": "def f(): ...", "average_test_score": 1.0, "tests_execution_status": ["pass"]}
    source = write_jsonl("code.jsonl", [row, {**row, "input": "Sub.", "tests_execution_status": ["fail"]}])
    common = {"source": [f"{source}:2"], "preset": "c40m60", "model_name_or_path": str(tiny_folder)}
    plain = mix_data(MixArguments(output=str(tmp_path / "plain.jsonl"), **common))
    report = _report(plain)
    assert (report["seed"], report["max_tokens"], report["rows"]) == (42, 2048, 1)
    (line,) = plain.read_text().splitlines()
    assert json.loads(line)["messages"][0] == {"role": "system", "content": "You are a helpful assistant."}
    given = mix_data(MixArguments(output=str(tmp_path / "given.jsonl"), **common, seed=7, max_tokens=999, system="Hm."))
    assert (_report(given)["seed"], _report(given)["max_tokens"]) == (7, 999)
    assert json.loads(given.read_text())["messages"][0]["content"] == "Hm."


def test_an_interrupted_run_leaves_nothing(source, tmp_path, monkeypatch) -> None:
    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dllm.tools.mix_data._write_lines", stop)
    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        mix_data(MixArguments(output=str(tmp_path / "mix"), source=[f"{source}:3"]))
    assert {path for path in tmp_path.iterdir() if path.name != "cache"} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to mix: give --source FILE:NUMBER"),
        (("--preset", "c50"), "--preset 'c50' is unknown; choose one of c40m60"),
        (("--preset", "c40m60"), "max_tokens counts the tokens of a model: give --model_name_or_path too"),
        (("--source", "SOURCE:5", "--num_test", "2"), "--num_test needs a folder"),
        (("--source", "SOURCE:5", "--max_tokens", "0"), "max_tokens must be at least 1, got 0"),
        (("--source", "SOURCE:5", "--model_name_or_path", "x"), "has no effect without --max_tokens"),
        (("--source", "SOURCE:5", "--benchmarks", "none.jsonl"), "data file 'none.jsonl' does not exist"),
        (("--source", "SOURCE:5", "--sauce", "x"), "unknown flag --sauce; the closest known one is --source"),
    ],
)
def test_bad_flags_are_one_line(source, tmp_path, monkeypatch, capsys, words, message: str) -> None:
    flags = [word.replace("SOURCE", source) for word in words]
    monkeypatch.setattr("sys.argv", ["mix_data", "--output", str(tmp_path / "mix.jsonl"), *flags])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error.splitlines()[-1]
    assert not (tmp_path / "mix.jsonl").exists()


def test_what_is_there_is_not_overwritten(source, tmp_path) -> None:
    arguments = MixArguments(output=str(tmp_path / "mix"), source=[f"{source}:5"])
    mix_data(arguments)
    with pytest.raises(InputError, match="is there already: delete it, or give another --output"):
        mix_data(arguments)
    with pytest.raises(InputError, match="--num_test 5 leaves nothing of 5 rows"):
        mix_data(MixArguments(output=str(tmp_path / "other"), source=[f"{source}:5"], num_test=5))


def test_real_rows_without_the_benchmarks_problems(shared_dir, tmp_path, write_jsonl) -> None:
    data = shared_dir / "data"
    benchmarks = [str(data / "code" / name) for name in ("HumanEval.jsonl.gz", "mbpp.jsonl")]
    copies = [{"question": f"Hello! {text}", "answer": "pass"} for text in list(benchmark_prompts(benchmarks))[:300]]
    gsm8k, alpaca = data / "gsm8k" / "train_2000.jsonl", data / "alpaca_libre.jsonl"
    sources = [f"{gsm8k}:60", f"{alpaca}?max_response_chars=500:40", f"{write_jsonl('copies.jsonl', copies)}:300"]
    arguments = MixArguments(output=str(tmp_path / "mix.jsonl"), source=sources[:2], benchmarks=benchmarks)
    output = mix_data(arguments)
    rows = load_sft_dataset(str(output))["train"]
    assert len(rows) == 100 and _report(output)["benchmark_prompts"] == 164 + 974
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    answers = [line["messages"][1]["content"] for line in lines if line["source"] == str(alpaca)]
    assert len(answers) == 40 and max(map(len, answers)) <= 500
    leaking = MixArguments(output=str(tmp_path / "leaking.jsonl"), source=sources[2:], benchmarks=benchmarks)
    with pytest.raises(InputError, match=r"none of its 300 rows is left \(benchmark 300\)"):
        mix_data(leaking)
