"""Streams, packed streams and length groups: two processes under DDP (gloo, CPU) against one, also resumed."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dllm.models.tiny import make_tiny_checkpoint

pytestmark = pytest.mark.distributed
WORKER = pathlib.Path(__file__).with_name("streaming_worker.py")
SETTINGS = {
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 0.05,
    "optim": "sgd",
    "warmup_steps": 0,
    "logging_steps": 1,
    "loss_norm_type": "batch",  # a mean over rows is the mean of two processes' means
}
MEMORY = {"mem_enabled": True, "mem_inner_rank": 4, "mem_inner_layer_fraction": 0.5, "mem_inner_grad_clip": 0.0}


def _scenarios(text_file: pathlib.Path, size: int) -> dict:
    data = {"dataset_args": f"{text_file}[train]", "max_length": 48}
    stream = {**data, "streaming": True, "shuffle_buffer_size": 8}
    settings = {**SETTINGS, "per_device_train_batch_size": size}
    # Into the second epoch, which has 13 steps; a last batch that is not full is another one for two processes.
    groups = {**settings, "train_sampling_strategy": "group_by_length", "dataloader_drop_last": True}
    groups |= {"max_steps": 17, "save_steps": 15}
    return {
        "stream": {"data": {**stream, "random_length_ratio": 0.5}, "settings": settings},
        "stream with memory": {"data": stream, "settings": {**settings, **MEMORY}},
        "workers": {"data": stream, "settings": {**settings, "dataloader_num_workers": 2}},
        "packed": {"data": {**stream, "packing": True}, "settings": settings},
        "length groups": {"data": {**data, "random_length_ratio": 0.5}, "settings": groups},
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> tuple[dict, list[dict]]:
    """What one process with rows of four saw, and what two with rows of two."""
    folder = tmp_path_factory.mktemp("streams")
    checkpoint = make_tiny_checkpoint(folder / "tiny", "llada", d_model=32, n_layers=2, mlp_hidden_size=48)
    texts = [" ".join(str(n * n) for n in range(start, start + 5 + start % 17)) for start in range(60)]
    text_file = folder / "texts.jsonl"
    text_file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def run(processes: int) -> list[dict]:
        output = folder / str(processes)
        output.mkdir()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        words = [str(WORKER), str(checkpoint), str(output), json.dumps(_scenarios(text_file, 4 // processes))]
        command = [sys.executable, *(launcher if processes > 1 else []), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert finished.returncode == 0, finished.stderr[-3000:]
        return [json.loads((output / f"{rank}.json").read_text()) for rank in range(processes)]

    (single,) = run(1)
    return single, run(2)


@pytest.mark.parametrize("name", ["stream", "stream with memory", "workers", "packed", "length groups"])
def test_two_processes_share_the_rows_of_one(seen, name: str) -> None:
    single, ranks = seen[0][name]["whole"], [rank[name]["whole"] for rank in seen[1]]
    assert [rank["world_size"] for rank in ranks] == [2, 2] and single["world_size"] == 1
    shared = [list(itertools.chain(*step)) for step in zip(*(rank["ids"] for rank in ranks), strict=True)]
    assert shared == single["ids"]
    assert len(set(itertools.chain(*shared[:4]))) == len(list(itertools.chain(*shared[:4])))
    if name != "packed":  # whose rows have unequal numbers of documents
        # float32; the mean of two halves instead of one batch.
        assert ranks[0]["losses"] == pytest.approx(single["losses"], rel=2e-4)


@pytest.mark.parametrize("name", ["stream", "stream with memory", "workers", "packed", "length groups"])
def test_a_resumed_run_has_the_rows_and_losses_of_the_uninterrupted_one(seen, name: str) -> None:
    for process in (seen[0], *seen[1]):
        whole, resumed = process[name]["whole"], process[name]["resumed"]
        stop = len(whole["ids"]) - len(resumed["ids"])
        assert stop > 0 and resumed["ids"] == whole["ids"][stop:]
        assert resumed["losses"] == whole["losses"]
