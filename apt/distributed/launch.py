"""The process group of a ``torchrun`` job, by the environment that it sets."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from apt.distributed.ranks import Ranks
from apt.errors import AptError

# A solve may take long, and torchrun ends the job where a rank has died.
_PATIENCE = timedelta(hours=6)
_RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that ``torchrun`` has started, or a single one where it did not start this process.

    Tensors on processors go through gloo, those on CUDA devices through NCCL, and each rank takes
    the device of its place on its machine.

    Raises:
        AptError: the variables that ``torchrun`` sets hold something else.
    """
    size = whole_number("WORLD_SIZE", 1, least=1)
    if size == 1:
        yield Ranks()
        return
    _check_rendezvous(size)
    backend = "cpu:gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_own_device())
        backend += ",cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Ranks(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _check_rendezvous(size: int) -> None:
    """Raise where the ranks cannot find each other by the environment."""
    missing = [name for name in _RENDEZVOUS if not os.environ.get(name)]
    if missing:
        raise AptError(
            f"WORLD_SIZE is {size}, but {missing[0]} is not set",
            "start several processes with torchrun, or unset WORLD_SIZE",
        )
    whole_number("MASTER_PORT", 0)
    if (rank := whole_number("RANK", 0)) >= size:
        raise AptError(f"RANK is {rank}, but WORLD_SIZE is {size}", "ranks count from 0")


def _own_device() -> int:
    place, devices = whole_number("LOCAL_RANK", 0), torch.cuda.device_count()
    if place >= devices:
        raise AptError(
            f"there are {devices} CUDA devices here for rank {place} of this machine",
            f"start at most {devices} processes on a machine",
        )
    return place


def whole_number(variable: str, default: int, least: int = 0) -> int:
    """The value of an environment variable that holds a whole number.

    Raises:
        AptError: it holds something else.
    """
    text = os.environ.get(variable, str(default))
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise AptError(
            f"the environment variable {variable} is '{text}', not a whole number from {least} up",
            "torchrun sets it; outside of torchrun, unset it",
        )
    return int(text)
