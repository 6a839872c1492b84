"""python -m memdlm.eval.coding: answers, verdicts, going on, what is refused."""

import dataclasses
import json
import pathlib
import sys

import pytest
import torch
from rich.console import Console

from dllm.coding import evalplus
from dllm.coding.extract import build_program
from dllm.coding.problems import load_problems
from dllm.coding.results import Result, ResultFile, share, summarise, table
from dllm.models.auto import load_model, load_tokenizer
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils import InputError, one_line_errors, parse_args
from memdlm.decoding import Decoder, LoadFlags, MemoryFlags, SamplerFlags, find_sampler, sampler_config
from memdlm.eval.coding import CodeOptions, evaluate, main
from memdlm.relay import RelayChannel, RelayConfig
from memdlm.sample import prompt_ids

NAMES = ("double", "half", "same")
SOLUTIONS = {"Own/double": "    return 2 * x\n", "Own/half": "    return x\n", "Own/same": "    return x\n"}
TESTS = {"double": "assert f(3) == 6", "half": "assert f(4) == 2", "same": "assert f(5) == 5"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("code") / "tiny"
    sizes = {"num_hidden_layers": 2, "num_experts": 4, "hidden_size": 32, "expert_intermediate_size": 16}
    return str(make_tiny_checkpoint(folder, "llada_moe", **sizes, max_position_embeddings=256))


@pytest.fixture
def data(tmp_path) -> str:
    rows = [
        {
            "task_id": f"Own/{name}",
            "prompt": f"def {name}(x):\n    '''{name.title()} of x{' with many words' * index}.'''\n",
            "entry_point": name,
            "test": f"def check(f):\n    {TESTS[name]}",
        }
        for index, name in enumerate(NAMES)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.fixture
def run(model, data, tmp_path, monkeypatch):
    """run(*flags) -> (summary, result file as a dict); --data may be left out by data=None."""
    for variable in evalplus.OVERRIDES.values():
        monkeypatch.delenv(variable, raising=False)

    def evaluated(*flags: str, data: str | None = data):
        words = ["--model_name_or_path", model, "--device", "cpu", "--task", "humaneval", "--max_new_tokens", "12"]
        words += ["--output", str(tmp_path / "out" / "results.json"), *(["--data", data] if data else []), *flags]
        parsed = parse_args(CodeOptions, LoadFlags, SamplerFlags, MemoryFlags, args=words)
        summary = evaluate(*parsed, Console(quiet=True))
        return summary, json.loads((tmp_path / "out" / "results.json").read_text())

    return evaluated


def _solve(tmp_path) -> None:
    """Puts programs of known quality into the result file: two of three are right."""
    path = tmp_path / "out" / "results.json"
    kept = json.loads(path.read_text())
    for entry in kept["results"]:
        name = entry["task_id"].split("/")[1]
        entry["program"] = f"def {name}(x):\n{SOLUTIONS[entry['task_id']]}"
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize("prompt", ["chat", "raw"])
def test_answers_are_those_of_the_decoder(run, model, data, prompt: str) -> None:
    summary, kept = run("--prompt", prompt, "--batch_size", "2", "--threshold", "0.5")
    (load,) = parse_args(LoadFlags, args=["--model_name_or_path", model, "--device", "cpu"])
    (sampler,) = parse_args(SamplerFlags, args=["--max_new_tokens", "12", "--threshold", "0.5"])
    kind = find_sampler(load, sampler)
    decoder = Decoder.from_flags(load, parse_args(MemoryFlags, args=[])[0], kind)
    config = sampler_config(sampler, kind, early_stop=True)
    entries = {entry["task_id"]: entry for entry in kept["results"]}
    for problem in load_problems("humaneval", data):
        text = problem.chat_prompt() if prompt == "chat" else problem.raw_prompt()
        output = decoder.answer([prompt_ids(decoder, text, prompt == "chat")], config).output
        entry, answer = entries[problem.task_id], decoder.text(output.answers[0].tolist())
        assert (entry["answer"], entry["nfe"], entry["num_tokens"]) == (
            answer,
            int(output.nfe[0]),
            int(output.num_committed[0]),
        )
        assert entry["program"] == build_program(problem, answer, prompt) and entry["passed"] is None
    assert summary["pass@1"] is None and kept["summary"] == summary and kept["execution"] is None
    assert summary["mean_nfe"] == pytest.approx(sum(entry["nfe"] for entry in entries.values()) / 3)


def test_programs_are_run_only_where_it_is_allowed(run, tmp_path, confining_kernel) -> None:
    run()
    _solve(tmp_path)
    summary, kept = run()
    assert summary["num_run"] == 0 and all(entry["passed"] is None for entry in kept["results"])
    summary, kept = run("--allow_code_execution", "True", "--timeout", "5")
    verdicts = {entry["task_id"]: (entry["passed"], entry["reason"]) for entry in kept["results"]}
    assert verdicts == {
        "Own/double": (True, None),
        "Own/half": (False, "AssertionError: assert f(4) == 2"),
        "Own/same": (True, None),
    }
    assert summary["pass@1"] == pytest.approx(200 / 3) and summary["stderr"] == pytest.approx(100 / 3)
    assert kept["execution"]["seconds"] == 5.0


def test_finished_work_is_not_done_again(run, tmp_path, monkeypatch, confining_kernel) -> None:
    _, first = run("--limit", "2", "--allow_code_execution", "True")
    assert {entry["task_id"] for entry in first["results"]} == {"Own/double", "Own/half"}
    _, full = run("--allow_code_execution", "True", "--batch_size", "3")
    assert {entry["task_id"] for entry in full["results"]} == set(SOLUTIONS)
    for entry in first["results"]:
        assert entry in full["results"]

    def refuse(*_, **__):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(Decoder, "from_flags", refuse)
    again, _ = run("--allow_code_execution", "True")
    assert again == full["summary"]
    # Other limits judge anew, with the same answers.
    _solve(tmp_path)
    judged, _ = run("--allow_code_execution", "True", "--timeout", "7")
    assert judged["pass@1"] == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--max_new_tokens", "13"), "sampler_max_new_tokens"),
        (("--prompt", "raw"), "prompt"),
        (("--dtype", "bfloat16"), "dtype"),
        (("--mem_enabled", "True"), "memory"),
    ],
)
def test_another_configuration_is_refused(run, flags, name: str) -> None:
    run()
    with pytest.raises(InputError, match=f"was made with another {name} .*give another --output, or delete it"):
        run(*flags)


def test_another_file_or_model_is_refused(run, data, model) -> None:
    run()
    path = pathlib.Path(data)
    path.write_text(path.read_text().replace("Half", "A half"))
    with pytest.raises(InputError, match="was made with another data_sha256"):
        run()
    path.write_text(path.read_text().replace("A half", "Half"))
    weights = pathlib.Path(model, "model.safetensors")
    weights.touch()
    with pytest.raises(InputError, match="was made with another checkpoints"):
        run()


def test_memory_takes_part(run) -> None:
    strong = ("--mem_prompt_mask_ratio", "0.6", "--mem_inner_lr", "5", "--mem_inner_layer_fraction", "1.0")
    _, kept = run("--mem_enabled", "True", *strong)
    assert kept["config"]["memory"]["inner_lr"] == 5 and len(kept["results"]) == 3
    with pytest.raises(InputError, match="--mem_inner_lr has no effect without --mem_enabled True"):
        run("--mem_inner_lr", "5")


def test_a_relay_takes_part_unless_it_is_switched_off(run, model, tmp_path) -> None:
    loaded = load_model(model)
    norm = RelayChannel.attach(loaded, RelayConfig(gate="default")).norm
    with torch.no_grad():
        norm.weight.mul_(20)
    folder = str(tmp_path / "relay")
    loaded.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    answers = {}
    for relay in ("True", "False"):
        _, kept = run("--model_name_or_path", folder, "--relay", relay)
        answers[relay] = [entry["answer"] for entry in kept["results"]]
        with pytest.raises(InputError, match="was made with another relay"):
            run("--model_name_or_path", folder)
        (tmp_path / "out" / "results.json").unlink()
    assert answers["True"] != answers["False"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--limit", "0"), "--limit must be at least 1, got 0"),
        (("--batch_size", "0"), "--batch_size must be at least 1, got 0"),
        (("--timeout", "0"), "must be above 0 seconds"),
        (("--memory_mb", "5"), "memory_mb of a program must be at least 128, got 5"),
        (("--all_rows", "True"), "--all_rows has an effect on mbpp with --data alone"),
        (("--max_new_tokens", "500"), "and 500 new ones are more than the model's 256"),
        (("--task", "mbpp"), "has no field 'text': this is no file of mbpp"),
        (("--output", "FILE"), "is no result file"),
    ],
)
def test_bad_flags_are_one_line(model, data, tmp_path, monkeypatch, capsys, flags, message: str) -> None:
    (tmp_path / "FILE").write_text("no JSON")
    words = ["--model_name_or_path", model, "--task", "humaneval", "--data", data, "--output", str(tmp_path / "x.json")]
    words += ["--device", "cpu", *(str(tmp_path / word) if word == "FILE" else word for word in flags)]
    monkeypatch.setattr(sys, "argv", ["code", *words])
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_data_must_be_named_once(run, data, tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        run(data=None)
    assert "no data: give --data FILE of humaneval, or set HUMANEVAL_OVERRIDE_PATH" in capsys.readouterr().err
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", data)
    with pytest.raises(SystemExit):
        run()
    assert "name two data files: drop one of them" in capsys.readouterr().err
    monkeypatch.setattr(evalplus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run(data=None)
    assert "evalplus is not installed: pip install evalplus==0.3.1, or unset" in capsys.readouterr().err


# Writes what evalplus 0.3.1 writes, from what it is given: a program passes if it holds "2", and plus if also "x".
STAND_IN = """
import json, os, sys
assert "SECRET_TOKEN" not in os.environ
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
names = [json.loads(line)["task_id"] for line in open(os.environ["HUMANEVAL_OVERRIDE_PATH"])]
results = {}
for line in open(words["--samples"]):
    sample = json.loads(line)
    status = [("pass" if mark in sample["solution"] else "fail") for mark in ("2", "2 * x")]
    results[sample["task_id"]] = [{"base_status": status[0], "plus_status": status[1]}]
assert words["--dataset"] == "humaneval" and sorted(results) == sorted(names), "Missing problems in samples"
with open(words["--samples"].replace(".jsonl", "_eval_results.json"), "w") as file:
    json.dump({"eval": results}, file)
"""


def test_evalplus_judges_where_its_file_is_named(run, data, tmp_path, monkeypatch) -> None:
    package = tmp_path / "packages" / "evalplus"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "evaluate.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("SECRET_TOKEN", "x")
    rows = [{**json.loads(line), "plus_input": []} for line in pathlib.Path(data).read_text().splitlines()]
    pathlib.Path(data).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", data)
    run("--limit", "2", data=None)
    _solve(tmp_path)
    summary, kept = run("--limit", "2", "--allow_code_execution", "True", data=None)
    assert (summary["pass@1"], summary["plus_pass@1"], kept["execution"]) == (50.0, 50.0, {"runner": "evalplus"})
    assert "plus pass@1 %" in table("humaneval", summary)
    (package / "evaluate.py").write_text("raise SystemExit('out of luck')")
    with pytest.raises(InputError, match=r"evalplus failed \(out of luck\)"):
        evalplus.evaluate("humaneval", {"Own/double": "2"}, data, 1)
    with pytest.raises(InputError, match="has no field 'entry_point': MBPP_OVERRIDE_PATH is no evalplus file"):
        (tmp_path / "other.jsonl").write_text('{"task_id": 1, "prompt": "x"}\n')
        evalplus.load_plus_problems("mbpp", str(tmp_path / "other.jsonl"))


def test_a_summary_is_means_over_problems() -> None:
    def result(index: int, passed: bool | None) -> Result:
        return Result(str(index), "", "", 10 * index, index, 4 * index, 0.5, passed)

    results = [result(1, True), result(2, False), result(3, True), result(4, True)]
    summary = summarise(results)
    values = [1, 0, 1, 1]
    deviation = (sum((value - 0.75) ** 2 for value in values) / 3) ** 0.5
    assert summary["pass@1"] == 75 and summary["stderr"] == pytest.approx(100 * deviation / 2)
    assert (summary["mean_nfe"], summary["mean_cache_forwards"], summary["tokens_per_forward"]) == (25, 2.5, 0.4)
    assert summary["seconds"] == 2.0 and summary["plus_pass@1"] is None
    assert share([True]) == (100.0, 0.0)
    unfinished = summarise([*results, result(5, None)])
    assert unfinished["pass@1"] is None and unfinished["num_run"] == 4
    assert "not run" in table("humaneval", unfinished) and "75.0 +- 25.0" in table("humaneval", summary)


def test_the_result_file_is_whole_at_any_time(tmp_path, monkeypatch) -> None:
    file = ResultFile(tmp_path / "folder" / "results.json", {"a": (1, 2)})
    file.add([Result("t", "answer", "program", 1, 0, 1, 0.1)])
    again = ResultFile(tmp_path / "folder" / "results.json", {"a": [1, 2]})
    assert dataclasses.asdict(again.results["t"]) == dataclasses.asdict(file.results["t"])

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        file.add([Result("u", "answer", "program", 1, 0, 1, 0.1)])
    assert set(ResultFile(file.path, {"a": [1, 2]}).results) == {"t"}
    (tmp_path / "plain").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        ResultFile(tmp_path / "plain" / "results.json", {}).write()
