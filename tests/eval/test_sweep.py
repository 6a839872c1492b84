"""The sweep over context length and needle depth: what is run, what is kept, what is drawn."""

import io
import json
import math
import statistics
import sys

import pytest
from rich.console import Console

from dllm.core.samplers import BlockSampler
from dllm.models.tiny import make_tiny_checkpoint
from dllm.utils import InputError
from memdlm.eval import sweep as sweeping
from memdlm.eval import sweep_report
from memdlm.eval.harness import MemoryMDLMHarness
from memdlm.eval.sweep import SweepOptions, sweep
from memdlm.eval.sweep_report import Cell

NEEDLE, FACTS, WORDS = "memdlm_ruler_niah_single", "memdlm_babilong_qa1", "memdlm_ruler_cwe"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("sweep") / "tiny"
    return str(make_tiny_checkpoint(folder, "llada_moe", num_hidden_layers=2, num_experts=4))


@pytest.fixture(autouse=True)
def _no_environment_report(monkeypatch):
    # Seconds per evaluation: lm-eval asks pip for the list of packages.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def options(checkpoint, tmp_path):
    """A function (**changes) -> options of a small sweep."""

    def make(**changes) -> SweepOptions:
        settings = {
            "model_name_or_path": checkpoint,
            "tasks": NEEDLE,
            "lengths": "512",
            "depths": "0,0.5,1",
            "num_samples": 5,
            "max_new_tokens": 4,
            "output_dir": str(tmp_path / "sweep"),
            "device": "cpu",
        }
        return SweepOptions(**{**settings, **changes})

    return make


class Scripted(MemoryMDLMHarness):
    """Answers without a model: rightly where the needle was asked to be in the first half, and always with memory."""

    asked: list[tuple[str, int, int]] = []
    stop_at: int | None = None  # length at which the user loses patience

    def generate_until(self, requests):
        answers = []
        for request in requests:
            doc = request.doc
            if doc["length"] == self.stop_at:
                raise KeyboardInterrupt
            self.asked.append((doc["task"], doc["length"], doc["index"]))
            is_right = doc["depth"] is None or doc["depth"] < 0.75 or self.memory is not None
            right = doc["target"] if "target" in doc else " ".join(doc["outputs"])
            answers.append(right if is_right else "no idea")
        return answers


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setitem(sweeping.HARNESSES, "bidirectional", Scripted)
    Scripted.asked, Scripted.stop_at = [], None
    return Scripted


def _quiet() -> Console:
    return Console(file=io.StringIO())


def test_scores_stand_under_the_depth_and_length_that_were_asked_for(options, scripted) -> None:
    cells = sweep(options(tasks=f"{NEEDLE},{FACTS},{WORDS}", lengths="600,512"), _quiet())
    assert [(cell.setting, cell.task, cell.length) for cell in cells] == [
        (setting, task, length)
        for setting in ("plain", "memory")
        for task in (NEEDLE, FACTS, WORDS)
        for length in (512, 600)
    ]
    for cell in cells:
        right = [1.0 if cell.setting == "memory" else 0.0]
        if cell.task == WORDS:
            assert cell.scores == {None: [1.0] * 5}
        else:
            # five documents go through three depths in turn
            assert cell.scores == {0.0: [1.0] * 2, 0.5: [1.0] * 2, 1.0: right}
    assert len(scripted.asked) == 5 * len(cells)


def test_the_limit_cuts_every_cell(options, scripted) -> None:
    cells = sweep(options(limit=2, lengths="512,600"), _quiet())
    assert [len(cell.all_scores) for cell in cells] == [2] * 4


def test_finished_cells_are_not_run_again_unless_something_differs(options, scripted) -> None:
    first = sweep(options(), _quiet())
    assert len(scripted.asked) == 10
    assert sweep(options(batch_size=3, output_dir=options().output_dir), _quiet()) == first
    assert sweep(options(settings="memory"), _quiet()) == first[1:]
    assert len(scripted.asked) == 10
    changes = ({"max_new_tokens": 5}, {"num_samples": 4}, {"depths": "0,1"}, {"limit": 3}, {"steps": 2})
    for number, change in enumerate(changes, 1):
        before = len(scripted.asked)
        sweep(options(settings="plain", **change), _quiet())
        assert len(scripted.asked) > before, change
        assert len(json.loads((sweeping.pathlib.Path(options().output_dir) / "cells.json").read_text())) == 2 + number
    before = len(scripted.asked)
    sweep(options(extra_model_args="mem_inner_lr=0.2"), _quiet())  # of the memory alone
    assert {index for _, _, index in scripted.asked[before:]} == set(range(5)) and len(scripted.asked) == before + 5


def test_an_interrupted_sweep_goes_on_with_the_next_cell(options, scripted) -> None:
    scripted.stop_at = 600
    with pytest.raises(KeyboardInterrupt):
        sweep(options(lengths="512,600"), _quiet())
    assert len(scripted.asked) == 5
    scripted.stop_at = None
    cells = sweep(options(lengths="512,600"), _quiet())
    assert len(cells) == 4 and len(scripted.asked) == 20


def test_settings_reach_the_adapter(options) -> None:
    made = options(
        steps=2,
        block_size=4,
        max_length=900,
        extra_model_args='mem_inner_target_modules="up_proj,down_proj",mem_inner_lr=0.5,cfg=1.5',
    )
    plain, memory = made.model_args("plain"), made.model_args("memory")
    assert plain.pop("pretrained") == made.model_name_or_path
    assert plain == {"max_length": 900, "max_new_tokens": 4, "steps": 2, "block_size": 4, "cfg": 1.5}
    extra = {"mem_enabled": True, "mem_inner_target_modules": "up_proj,down_proj", "mem_inner_lr": 0.5}
    assert memory == {"pretrained": made.model_name_or_path, **plain, **extra}
    assert options(extra_model_args='{"cfg": 2}').model_args("plain")["cfg"] == 2


def test_a_real_sweep_counts_and_times(options) -> None:
    cells = sweep(options(num_samples=3, tasks=f"{NEEDLE},{FACTS}"), _quiet())
    assert len(cells) == 4
    for cell in cells:
        assert cell.mean_nfe == 4 and cell.seconds > 0 and cell.num_without_memory == 0
        assert {depth: len(scores) for depth, scores in cell.scores.items()} == {0.0: 1, 0.5: 1, 1.0: 1}


def test_the_command_writes_the_table_and_the_picture(options, scripted, monkeypatch, capsys, tmp_path) -> None:
    made = options(lengths="512,600", tasks=f"{NEEDLE},{WORDS}")
    names = (
        "model_name_or_path",
        "tasks",
        "lengths",
        "depths",
        "num_samples",
        "max_new_tokens",
        "output_dir",
        "device",
    )
    words = [word for name in names for word in (f"--{name}", str(vars(made)[name]))]
    monkeypatch.setattr(sys, "argv", ["sweep", *words])
    sweeping.main()
    folder = tmp_path / "sweep"
    table = (folder / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| {NEEDLE} | 512 | 80.0 +- 20.0 (5) | 100.0 +- 0.0 (5) |" in table
    assert (folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((folder / "table.json").read_text())
    assert len(rows) == 8
    row = rows[0]
    assert (row["task"], row["length"], row["setting"]) == (NEEDLE, 512, "plain")
    assert (row["accuracy"], row["n"], row["standard_error"]) == (0.8, 5, pytest.approx(0.2))
    assert row["by_depth"][2] == {"depth": 1.0, "accuracy": 0.0, "n": 1}


def test_a_block_causal_family_is_decoded_block_by_block(options, tmp_path, monkeypatch) -> None:
    seen, sample = [], BlockSampler.sample
    monkeypatch.setattr(BlockSampler, "sample", lambda self, p, c: (seen.append(c), sample(self, p, c))[1])
    sizes = {"num_hidden_layers": 2, "num_experts": 4, "n_group": 2, "topk_group": 1}
    folder = str(make_tiny_checkpoint(tmp_path / "blocks", "llada2_moe", **sizes))
    made = options(model_name_or_path=folder, num_samples=2, block_size=8, extra_model_args="editing_threshold=0.5")
    plain, memory = sweep(made, _quiet())
    assert (plain.setting, memory.setting, memory.num_without_memory) == ("plain", "memory", 0)
    assert len(plain.all_scores) == len(memory.all_scores) == 2
    assert {(config.block_size, config.editing_threshold) for config in seen} == {(8, 0.5)}


def _cell(**changes) -> Cell:
    values = {
        "setting": "plain",
        "task": "t",
        "length": 512,
        "scores": {0.0: [1.0, 0.0], 1.0: [0.25]},
        "seconds": 2.0,
        "mean_nfe": 4.0,
        "num_without_memory": 0,
    }
    return Cell(**{**values, **changes})


def test_means_and_standard_errors() -> None:
    scores = [0.25, 1.0, 0.5, 0.0, 0.75]
    assert sweep_report.mean(scores) == statistics.fmean(scores)
    assert sweep_report.standard_error(scores) == pytest.approx(statistics.stdev(scores) / math.sqrt(5))
    assert sweep_report.standard_error([1.0]) is None
    assert Cell.from_json(json.loads(json.dumps(_cell(scores={None: [1.0]}).to_json()))) == _cell(scores={None: [1.0]})


def test_answers_without_their_memory_are_told_in_the_table() -> None:
    assert "3 answers were made without the memory" in sweep_report.markdown([_cell(num_without_memory=3)])
    assert "without the memory" not in sweep_report.markdown([_cell()])


def test_a_panel_shows_accuracy_and_number_by_depth_and_length() -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    panel = {512: _cell(), 2048: _cell(length=2048, scores={0.5: [1.0]})}
    image = sweep_report._draw_panel(axis, panel, [512, 2048])
    assert image.get_array().filled(-1).tolist() == [[0.5, -1], [-1, 1.0], [0.25, -1]]
    texts = {tuple(map(int, text.get_position())): text.get_text() for text in axis.texts}
    assert texts == {(0, 0): "0.50\nn=2", (1, 1): "1.00\nn=1", (0, 2): "0.25\nn=1"}
    assert [label.get_text() for label in axis.get_xticklabels()] == ["512", "2,048"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "0.5", "1"]
    assert image.get_clim() == (0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": "plain,none"}, "--settings 'none' is unknown: choose from plain, memory"),
        ({"tasks": ","}, "--tasks is empty"),
        ({"lengths": "1x"}, "'1x' is no length"),
        ({"depths": "0,2"}, "depths"),
        ({"depths": "top"}, "--depths 'top'"),
        ({"num_samples": 0}, "--num_samples must be at least 1"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"extra_model_args": "a,b"}, "the form is key=value,key=value"),
        ({"extra_model_args": "mem_inner_lr=1", "settings": "plain"}, "mem_inner_lr has no effect"),
    ],
)
def test_wrong_options_are_named(options, changes, message) -> None:
    with pytest.raises(InputError) as refused:
        options(**changes)
    assert message in str(refused.value)


def test_what_the_adapter_or_the_tasks_refuse_is_told_before_the_model_is_loaded(options, tmp_path) -> None:
    with pytest.raises(InputError, match="is no task of ours: choose from memdlm_babilong"):
        sweep(options(tasks="babilong_qa1"), _quiet())
    with pytest.raises(InputError, match="unknown model argument stepz"):
        sweep(options(extra_model_args="stepz=3"), _quiet())
    with pytest.raises(InputError, match="nowhere is no folder here"):
        sweep(options(model_name_or_path="nowhere"), _quiet())
    (tmp_path / "sweep").mkdir(exist_ok=True)
    (tmp_path / "sweep" / "cells.json").write_text('{"a')
    with pytest.raises(InputError, match="is damaged"):
        sweep(options(), _quiet())
