"""Where an evaluation runs: the device, and the processes of `accelerate launch` or torchrun."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from dllm.core.eval.progress import say
from dllm.utils.distributed import local_rank, world_size
from dllm.utils.parsing import InputError


def choose_device(name: str | None) -> torch.device:
    """The device called `name` (None: cuda); of several processes each has the GPU of its own local rank.

    Without CUDA, or where accelerate was told to use the CPU, it is the CPU, and one line says so.

    Raises:
        InputError: no such device.
    """
    wanted = "cuda" if name is None else str(name)
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise InputError(f"--device {wanted} is no device: give cuda, cuda:0, mps or cpu") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        say("no CUDA device here: evaluating on the CPU (--device cpu says so at once)")
        return torch.device("cpu")
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        say("accelerate was told to use the CPU: evaluating there")
        return torch.device("cpu")
    index = local_rank() if world_size() > 1 or device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise InputError(f"--device {wanted}: there is no GPU {index} here, only {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """The device with the model of its GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def join_processes(device: torch.device) -> None:
    """Makes the process group, where several processes were started and none has made it yet."""
    if world_size() > 1 and not dist.is_initialized():
        PartialState(cpu=device.type == "cpu")


def leave_processes() -> None:
    """Leaves the process group; without it processes abort at random when they end."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for all processes."""
    dist.barrier()


def gather_tensors(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of all ranks behind each other, [ranks * n] (a scalar counts as n = 1)."""
    own = tensor.reshape(1) if tensor.dim() == 0 else tensor
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts)


def gather_objects(thing: Any, destination: int) -> list[Any] | None:
    """The things of all ranks on rank `destination`, None on the others."""
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == destination else None
    dist.gather_object(thing, found, dst=destination)
    return found
