"""The devices that torch computes on: a CPU, or an accelerator of any kind.

Only this file asks what kind an accelerator is. torch names them ``cuda`` (NVIDIA and AMD),
``xpu``, ``mps`` or ``npu``, or as a package registers it.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch

_HOSTS = ("cpu", "meta")
_WITHOUT_SOLVES = ("mps",)  # torch lacks factorisations there
_ROUNDS = 8  # measurements of the time of a product


def accelerator() -> str | None:
    """The kind of the accelerator of this machine; None if there is none."""
    if not torch.accelerator.is_available():
        return None
    current = torch.accelerator.current_accelerator()
    return None if current is None else current.type


def default_device() -> str:
    """The device of a run by default: the accelerator if all solves run on it, else ``cpu``."""
    kind = accelerator()
    return "cpu" if kind is None or kind in _WITHOUT_SOLVES else kind


def device_kinds() -> tuple[str, ...]:
    """The kinds of devices of this machine."""
    kind = accelerator()
    return ("cpu",) if kind is None else ("cpu", kind)


def is_accelerator(device: torch.device | str) -> bool:
    """True if a device has its own memory, and computes while the CPU continues."""
    return torch.device(device).type not in _HOSTS


def synchronize(device: torch.device | str) -> None:
    """Wait until an accelerator has done all queued work. A CPU has no queue."""
    if is_accelerator(device):
        torch.accelerator.synchronize(torch.device(device))


def name_of(device: torch.device | str) -> str:
    """The name of an accelerator by its maker, or the kind of the device."""
    read = getattr(_module(device), "get_device_name", None)
    return str(read(device)) if read else torch.device(device).type


def total_memory(device: torch.device | str) -> int:
    """The bytes of memory of an accelerator; 0 for a CPU, or if torch does not know them."""
    if not is_accelerator(device):
        return 0
    read = getattr(_module(device), "get_device_properties", None)
    return int(getattr(read(device), "total_memory", 0)) if read else 0


def peak_allocated(device: torch.device | str) -> int:
    """The peak of the bytes that torch allocated on an accelerator; 0 if it is unknown."""
    read = getattr(_module(device), "max_memory_allocated", None)
    return int(read(device)) if read else 0


def reset_peak(device: torch.device | str) -> None:
    """Reset the peak that `peak_allocated` reads."""
    if reset := getattr(_module(device), "reset_peak_memory_stats", None):
        reset(device)


def keep_random_states() -> AbstractContextManager[None]:
    """While entered, torch's random states may change. At the end they are restored.

    The state of an accelerator that `default_device` leaves out is not restored: torch cannot do so
    for ``mps``.
    """
    if (kind := default_device()) == "cpu":
        return torch.random.fork_rng(devices=[])
    # All are named: without names torch warns if there are several.
    indices = range(torch.accelerator.device_count())
    return torch.random.fork_rng(devices=indices, device_type=kind)


def random_state() -> Any:
    """The random state of the accelerator, if this process has used it; else None."""
    module = _module(accelerator() or "cpu")
    used = getattr(module, "is_initialized", lambda: True)()
    return module.get_rng_state() if used and accelerator() else None


def multiplies_fast(dtype: torch.dtype, device: torch.device | str) -> bool:
    """True if a device multiplies matrices of a half precision faster than matrices of fp32.

    On a CPU, oneDNN is asked first: without it torch multiplies half precision 5 to 250 times more
    slowly. If oneDNN computes with instructions for fp32, half precision is 2 times slower; one
    product of some tenths of a millisecond in each process measures that. Accelerators report
    whether they compute bf16.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype == torch.float32
    kind = torch.device(device).type
    if kind in _HOSTS:
        return _cpu_multiplies_faster(dtype)
    if kind == "cuda":
        in_hardware: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return dtype == torch.float16 or in_hardware
    is_supported = getattr(_module(device), "is_bf16_supported", None)
    return dtype == torch.float16 or bool(is_supported and is_supported())


@cache
def _cpu_multiplies_faster(dtype: torch.dtype) -> bool:
    """True if this processor multiplies matrices of a dtype faster than those of fp32."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    is_supported = getattr(
        torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None
    )  # not in every torch
    if is_supported is None or not is_supported():
        return False
    with _one_thread():  # a second thread may have to wait for a processor
        fp32, half = (_seconds_of_product(kind, "cpu", 256) for kind in (torch.float32, dtype))
    return half < fp32


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds_of_product(dtype: torch.dtype, device: torch.device | str, size: int) -> float:
    """The shortest measured time of a product of two square matrices with ``size`` rows."""
    matrix, seconds = torch.ones(size, size, dtype=dtype, device=device), math.inf
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            torch.nn.functional.linear(matrix, matrix)
            synchronize(device)
            seconds = min(seconds, time.perf_counter() - started)
    return seconds


def operations_per_second(dtype: torch.dtype, device: torch.device | str) -> float:
    """The floating-point operations per second of a product of matrices, a short measurement."""
    size = 4096 if is_accelerator(device) else 512
    return 2.0 * size**3 / _seconds_of_product(dtype, device, size)


def multiplies_bf16(device: torch.device | str) -> bool:
    """True if a device multiplies bf16 in hardware, several times as fast as fp32."""
    return multiplies_fast(torch.bfloat16, device)


def runs_triton(device: torch.device | str) -> bool:
    """True if APT's kernels in Triton run on a device: they were tested on CUDA only."""
    return torch.device(device).type == "cuda"


def _module(device: torch.device | str) -> Any:
    """The module of torch for a kind of device, such as `torch.cuda`."""
    return torch.get_device_module(torch.device(device))
