"""The process group of a ``torchrun`` job, from the environment variables that it sets."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from apt.devices import default_device
from apt.distributed.ranks import Ranks
from apt.errors import AptError

# A solve may take long. If a rank dies, torchrun ends the job.
_TIMEOUT = timedelta(hours=6)
_RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """The ranks that ``torchrun`` has started; a single rank without ``torchrun``.

    CPU tensors are exchanged by gloo, CUDA tensors by NCCL. Each rank uses the CUDA device with its
    local rank as the index.

    Args:
        device: the device option of the run. With ``cpu`` there may be more ranks than
            accelerators.

    Raises:
        AptError: the environment variables of ``torchrun`` have invalid values.
    """
    size = whole_number("WORLD_SIZE", 1, least=1)
    if size == 1:
        yield Ranks()
        return
    _check_rendezvous(size)
    dist.init_process_group(_backend(device), timeout=_TIMEOUT)
    try:
        yield Ranks(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _backend(device: str) -> str:
    """The backend for each kind of device. It also selects the accelerator of this rank."""
    if device == "cpu" or (kind := default_device()) == "cpu":
        return "cpu:gloo"
    torch.get_device_module(kind).set_device(_local_device())
    return f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"


def _check_rendezvous(size: int) -> None:
    """Raise if the environment lacks the variables by which ranks connect to each other."""
    missing = [name for name in _RENDEZVOUS if not os.environ.get(name)]
    if missing:
        message = f"WORLD_SIZE is {size}, but {missing[0]} is not set"
        raise AptError(message, "start several processes with torchrun, or unset WORLD_SIZE")
    whole_number("MASTER_PORT", 0)
    if (rank := whole_number("RANK", 0)) >= size:
        raise AptError(f"RANK is {rank}, but WORLD_SIZE is {size}", "ranks count from 0")


def _local_device() -> int:
    local_rank, devices = whole_number("LOCAL_RANK", 0), torch.accelerator.device_count()
    if local_rank >= devices:
        message = f"this machine has {devices} GPUs, too few for local rank {local_rank}"
        hint = f"start at most {devices} processes on a machine, or use the device cpu"
        raise AptError(message, hint, ("device",))
    return local_rank


def whole_number(variable: str, default: int, least: int = 0) -> int:
    """The whole number of an environment variable; raises `AptError` for another value."""
    text = os.environ.get(variable, str(default))
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise AptError(
            f"the environment variable {variable} is '{text}', not a whole number from {least} up",
            "torchrun sets it; outside of torchrun, unset it",
        )
    return int(text)
