"""Two processes under DDP (gloo, CPU): a loss that is not finite on one rank stops both in the same step."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dllm.models.tiny import make_tiny_checkpoint

pytestmark = pytest.mark.distributed
WORKER = pathlib.Path(__file__).with_name("guard_worker.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> tuple[pathlib.Path, list[dict]]:
    """(folder of the run, what each rank saw)."""
    folder = tmp_path_factory.mktemp("guard")
    checkpoint = make_tiny_checkpoint(folder / "tiny", "llada", d_model=32, n_layers=2)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(checkpoint), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    return folder / "run", ranks


def test_both_ranks_stop_before_the_same_optimizer_step(seen) -> None:
    folder, ranks = seen
    assert [rank["num_calls"] for rank in ranks] == [4, 4]  # two steps of two micro-batches
    assert all("not finite in step 2 (1 batch(es) over all ranks)" in rank["message"] for rank in ranks)
    assert "saved by the rank that had it" in ranks[0]["message"] and "nonfinite-2-rank1" in ranks[1]["message"]
    # The gradients that the ranks have exchanged are not finite on either of them, the weights still are.
    assert all(rank["finite"] for rank in ranks)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]


def test_the_rank_that_had_it_keeps_the_batch(seen) -> None:
    folder, _ = seen
    assert [path.name for path in folder.glob("nonfinite-*")] == ["nonfinite-2-rank1"]
    report = json.loads((folder / "nonfinite-2-rank1" / "report.json").read_text())
    assert report["rank"] == 1 and report["step"] == 2 and report["micro_batch"] == 1
    assert report["losses"][0] != "nan" and report["losses"][1] == "nan"


def test_tokens_are_those_of_all_ranks(seen) -> None:
    _, ranks = seen
    (first,), (second,) = (rank["tokens"] for rank in ranks)
    # Four rows of 10 to 21 tokens, the same sum on both; one rank's two rows are fewer than any four.
    assert first == second and 4 * 10 + 6 <= first <= 4 * 21 - 6
