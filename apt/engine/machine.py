"""Devices, dtypes and memory of this machine."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from apt.calibration.storage import CpuStore, MemoryStore, Store
from apt.devices import default_device, total_memory
from apt.errors import AptError

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def read_dtype(name: str) -> torch.dtype | None:
    """The dtype of a name; None for ``auto``, which keeps the dtype of the checkpoint."""
    return None if name == "auto" else getattr(torch, name)


def choose_device(name: str) -> str:
    """The device of a name; for ``auto`` the default device.

    Raises:
        AptError: the device does not exist, or its results are wrong.
    """
    if name == "auto":
        return default_device()
    try:
        product = float(torch.ones(2, 2, device=name).matmul(torch.ones(2, 2, device=name))[0, 0])
    except Exception as error:  # of many types: RuntimeError, AssertionError, ImportError, …
        raise AptError(
            f"device '{name}' is not available here", "use the device cpu", ("device",)
        ) from error
    if product != 2:
        raise AptError(
            f"device '{name}' computes 1 + 1 as {product:g}", "use the device cpu", ("device",)
        )
    return name


def memory(device: str) -> int:
    """The memory limit of this process in bytes, with the memory of its GPU."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _LIMITS:
        with suppress(OSError, ValueError):
            total = min(total, int(Path(path).read_text(encoding="ascii")))
    return total + total_memory(device)


def check_tokens(samples: int, seqlen: int, bytes_each: int, device: str, processes: int) -> None:
    """Raise if the calibration tokens, of at least ``bytes_each`` bytes, do not fit into memory."""
    needed, available = samples * seqlen * bytes_each // processes, memory(device)
    if needed > available:
        raise AptError(
            f"{samples:,} samples of {seqlen} tokens take more than {needed / 2**30:,.0f} GiB of "
            f"memory, and there are {available / 2**30:,.0f} GiB",
            "use fewer samples, or a smaller seqlen",
            ("samples", "own_samples", "seqlen"),
        )


def activation_store(where: str) -> Store:
    """The store of calibration activations: ``"memory"``, with the model, or ``"cpu"``."""
    return CpuStore() if where == "cpu" else MemoryStore()
