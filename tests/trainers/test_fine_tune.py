"""The flag that decides which other flags there are."""

import pytest

from dllm.core.trainers.fine_tune import find_choice

CHOICES = {"mdlm": 1, "bd3lm": 2}


@pytest.mark.parametrize(
    "arguments, expected",
    [([], 1), (["--other", "x", "--objective", "bd3lm"], 2), (["--objective=bd3lm"], 2), (["--obj", "bd3lm"], 1)],
)
def test_the_named_entry_is_found_among_other_flags(arguments: list[str], expected: int) -> None:
    assert find_choice(arguments, "objective", CHOICES, "mdlm") == expected


@pytest.mark.parametrize("name", ["ar", "MDLM", ""])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"--objective {name} is unknown; allowed: mdlm, bd3lm"):
        find_choice(["--objective", name], "objective", CHOICES, "mdlm")
