"""A Sudoku study that is over in seconds."""

import pytest

from memdlm.studies.sudoku.settings import StudyOptions

SMALL = {
    "num_train": 40,
    "num_test": 9,
    "min_blanks": 3,
    "max_blanks": 6,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward": 48,
    "batch_size": 8,
    "warmup_steps": 0,
    "save_steps": 3,
    "max_steps": 6,
    "tau_sweep": "0.1,0.4",
    "tau": 0.4,
    "eval_batch_size": 4,
    "seeds": "1",
    "device": "cpu",
}


@pytest.fixture(scope="session")
def small_options():
    """A function (output=..., **changes) -> options of a small study."""
    return lambda **changes: StudyOptions(**{**SMALL, **changes})


@pytest.fixture
def make_options(small_options, tmp_path):
    """The same, with its output in a folder of this test unless told otherwise."""
    return lambda **changes: small_options(**{"output": str(tmp_path / "study"), **changes})
