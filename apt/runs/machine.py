"""What a machine has to compute with: devices, precisions, memory."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from apt.calibration.storage import CpuStore, MemoryStore, Store
from apt.errors import AptError
from apt.runs.limits import DTYPES, check_dtype

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def read_dtype(name: str) -> torch.dtype | None:
    """The precision of that name; None for ``auto``, which keeps the checkpoint's."""
    check_dtype(name)
    found: torch.dtype | None = getattr(torch, name) if name in DTYPES else None
    return found


def choose_device(name: str) -> str:
    """The device for ``auto``, or the one named if this machine computes on it.

    Raises:
        AptError: there is no such device, or nothing can be computed on it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        two = float(torch.ones(2, 2, device=name).matmul(torch.ones(2, 2, device=name))[0, 0])
    except Exception as error:  # of every kind: RuntimeError, AssertionError, ImportError, …
        raise AptError(
            f"device '{name}' is not available here", "use the device cpu", ("device",)
        ) from error
    if two != 2:
        raise AptError(
            f"device '{name}' computes 1 + 1 as {two:g}", "use the device cpu", ("device",)
        )
    return name


def memory(device: str) -> int:
    """Bytes of memory that this process may have, with those of a GPU that it computes on."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _LIMITS:
        with suppress(OSError, ValueError):
            total = min(total, int(Path(path).read_text(encoding="ascii")))
    if device.startswith("cuda"):
        total += torch.cuda.get_device_properties(device).total_memory
    return total


def check_tokens(samples: int, seqlen: int, bytes_each: int, device: str, processes: int) -> None:
    """Raise where tokens cannot be held in memory, whatever else is done.

    Args:
        samples, seqlen: how many there are.
        bytes_each: what each takes up at least.
        device: where activations are held, beside the machine's own memory.
        processes: how many share them.
    """
    needed, there = samples * seqlen * bytes_each // processes, memory(device)
    if needed > there:
        raise AptError(
            f"{samples:,} samples of {seqlen} tokens take more than {needed / 2**30:,.0f} GiB of "
            f"memory, and there are {there / 2**30:,.0f} GiB",
            "use fewer samples, or a smaller seqlen",
            ("samples", "own_samples", "seqlen"),
        )


def activation_store(where: str) -> Store:
    """Where calibration activations are kept: ``"memory"``, with the model, or ``"cpu"``."""
    return CpuStore() if where == "cpu" else MemoryStore()
