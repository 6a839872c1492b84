"""DDP, FSDP2 and ZeRO: two processes (gloo, CPU) under each engine against one process on the same global batch.

One launch per engine trains all scenarios of engine_scenarios.py.
"""

import pathlib
import sys
import types

import pytest
import torch

from dllm.core.trainers.engines import refuse_fsdp1
from dllm.utils.parsing import InputError

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from engine_scenarios import (  # the folder is no package
    AGAINST_DDP,
    ENGINES,
    REFUSED,
    ROOT,
    SCENARIOS,
    loss_difference,
    runner,
    saved,
)
from support_matrix import BEGIN, END

NAMES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero1": "DEEPSPEED-1", "zero2": "DEEPSPEED-2", "zero3": "DEEPSPEED-3"}
CASES = [(engine, name) for engine in ENGINES for name in SCENARIOS if (engine, name) not in REFUSED]
# float32; gradients are averaged over two halves instead of summed over one batch, and SGD with a large step carries
# the difference into the second and third loss.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def seen(folder):
    """A function engine -> what each process saw, by scenario."""
    return runner(folder)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_run_under_the_engine(seen, engine: str) -> None:
    for rank in seen(engine):
        made = [one for one in rank.values() if "refused" not in one]
        assert [(one["world_size"], one["engine"]) for one in made] == [(2, NAMES[engine])] * len(made)
        share = rank["full"]["held_share"]
        assert share == pytest.approx(0.5, abs=0.05) if engine in ("fsdp2", "zero3") else share == 1


@pytest.mark.distributed
@pytest.mark.parametrize("engine, name", CASES)
def test_training_is_that_of_one_process(seen, folder, engine: str, name: str) -> None:
    reference = "ddp" if name in AGAINST_DDP else None
    expected, (first, second) = seen(reference)[0][name], (rank[name] for rank in seen(engine))
    assert first["losses"] == second["losses"] and len(first["losses"]) == SCENARIOS[name]["settings"]["max_steps"]
    assert loss_difference(first, expected) < TOLERANCE
    assert first["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-3)
    assert first["metrics"] == pytest.approx(expected["metrics"], rel=TOLERANCE)
    ours, theirs = saved(folder, engine, name), saved(folder, reference, name)
    # Fast weights are no part of what is saved.
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].shape == value.shape and ours[key].dtype == value.dtype
        # adamw turns rounding of a gradient close to zero into a step of its learning rate.
        atol = 2e-3 if SCENARIOS[name].get("resumes") else 1e-4
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.distributed
@pytest.mark.parametrize("engine, name", [case for case in CASES if "memory" in case[1]])
def test_memories_are_shared_where_they_are_synchronised(seen, engine: str, name: str) -> None:
    first, second = (rank[name]["written"] for rank in seen(engine))
    assert len(first) == len(second) > 0 and len(set(first)) == len(first)
    if name in ("memory per row", "memory per rank"):
        assert all(one != two for one, two in zip(first, second, strict=True))
    else:
        assert first == second


@pytest.mark.distributed
@pytest.mark.parametrize("engine, name", [case for case in CASES if "resumes" in SCENARIOS[case[1]]])
def test_a_resumed_run_is_the_uninterrupted_one(seen, folder, engine: str, name: str) -> None:
    for rank in seen(engine):
        assert rank[name]["resumed"] == rank[name]["losses"][2:]
    whole, resumed = (saved(folder, engine, name, which) for which in ("final", "final_resumed"))
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


@pytest.mark.distributed
@pytest.mark.parametrize("engine, name", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(seen, engine: str, name: str) -> None:
    assert [rank[name]["refused"] for rank in seen(engine)] == [REFUSED[engine, name]] * 2


def test_the_first_version_of_fsdp_is_refused() -> None:
    with pytest.raises(InputError, match=r"memory and FSDP1 cannot be combined: use FSDP2 .*fsdp2.yaml"):
        refuse_fsdp1(types.SimpleNamespace(engine="fsdp"), "memory")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("file", ["README.md", "docs/engines.md"])
def test_the_support_matrix_has_a_row_for_every_scenario(file: str) -> None:
    """So that nothing is claimed that is not run; `python tests/distributed/support_matrix.py --write` makes it."""
    table = (ROOT / file).read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    assert [cell.strip() for cell in table[0].split("|")[2:-1]] == list(ENGINES.values())
    assert [line.split("|")[1].strip() for line in table[2:]] == list(SCENARIOS)
