"""The Sudoku scripts: the study in a few steps, and what its models solve."""

import importlib.util
import pathlib
import sys

import pytest

from memdlm.studies.sudoku.puzzles import make_puzzles

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = (
    "--arms relay,rollout --seeds 1 --max_steps 2 --num_train 16 --num_test 4 --batch_size 4 --hidden_size 32 "
    "--num_layers 2 --num_heads 2 --feed_forward 32 --save_steps 2 --min_blanks 3 --max_blanks 6 --tau_sweep 0.3"
)


@pytest.fixture
def solve(monkeypatch, capsys):
    """A function (*flags) -> the lines that examples/sudoku/solve.py prints."""
    spec = importlib.util.spec_from_file_location("sudoku_solve", ROOT / "examples/sudoku/solve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sudoku_solve", module)  # a dataclass looks up its annotations there
    spec.loader.exec_module(module)

    def run(*flags: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["solve.py", *flags])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out.splitlines()

    return run


def test_the_study_and_its_models(run_script, solve, tmp_path):
    done = run_script("sudoku/run.sh", *FLAGS.split(), OUTPUT_DIR=str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| relay | state zeroed |" in done.stdout and (tmp_path / "out/accuracy_over_nfe.png").is_file()
    puzzles = make_puzzles(4, 5, (3, 5), seed=4)
    (tmp_path / "puzzles.txt").write_text("\n".join(puzzle.clues for puzzle in puzzles))
    for arm in ("relay", "rollout"):
        model = str(tmp_path / f"out/{arm}-seed1/final")
        lines = solve("--model_name_or_path", model, "--puzzles", str(tmp_path / "puzzles.txt"), "--limit", "3")
        assert len(lines) == 4 and lines[3].endswith("forwards per puzzle")
        for line, puzzle in zip(lines[:3], puzzles, strict=False):
            clues, answer, *rest = line.split()
            assert clues == puzzle.clues and rest[0] == ("right" if answer == puzzle.solution else "wrong")
            assert all(
                char in ("?", digit) or clue == "." for clue, digit, char in zip(clues, clues, answer, strict=True)
            )


def test_the_published_setting_asks_for_its_files(run_script):
    done = run_script("sudoku/run_paper.sh")
    assert done.returncode != 0 and "name a file of training puzzles" in done.stderr
