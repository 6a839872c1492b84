"""Who am I among the processes of this run."""

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist


def _from_environment(name: str, default: int) -> int:
    # torchrun and accelerate set these before the process group exists.
    return int(os.environ.get(name, default))


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Index of this process among all, 0 for the main one (and for a run of one process)."""
    return dist.get_rank() if _initialized() else _from_environment("RANK", 0)


def local_rank() -> int:
    """Index of this process among those of its node."""
    return _from_environment("LOCAL_RANK", 0)


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if _initialized() else _from_environment("WORLD_SIZE", 1)


def is_main_process() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


@contextlib.contextmanager
def main_process_first(per_node: bool = False) -> Iterator[None]:
    """The block runs on the main process first; the others wait and then run it (and find what it cached).

    Args:
        per_node: the first process of every node goes first; for caches on disks that nodes do not share.

    Raises:
        RuntimeError: several processes, but no process group yet to wait with.
    """
    if world_size() == 1:
        yield
        return
    if not _initialized():
        raise RuntimeError("main_process_first needs the process group: build the TrainingArguments before it")
    first = local_rank() == 0 if per_node else is_main_process()
    if not first:
        dist.barrier()
    try:
        yield
    finally:
        # Also after an exception: the others must not wait for a process that has given up.
        if first:
            dist.barrier()
