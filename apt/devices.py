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
_REPEATED = 8  # times of a product


def accelerator() -> str | None:
    """The kind of the accelerator of this machine; None if there is none."""
    if not torch.accelerator.is_available():
        return None
    current = torch.accelerator.current_accelerator()
    return None if current is None else current.type


def best() -> str:
    """The device for a run that names none: the accelerator if all solves run on it, or ``cpu``."""
    kind = accelerator()
    return "cpu" if kind is None or kind in _WITHOUT_SOLVES else kind


def kinds() -> tuple[str, ...]:
    """The kinds of devices of this machine."""
    kind = accelerator()
    return ("cpu",) if kind is None else ("cpu", kind)


def is_accelerator(device: torch.device | str) -> bool:
    """True if a device has a memory of its own, and computes while the CPU goes on."""
    return torch.device(device).type not in _HOSTS


def synchronize(device: torch.device | str) -> None:
    """Wait for all work that an accelerator was given; on a CPU there is nothing to wait for."""
    if is_accelerator(device):
        torch.accelerator.synchronize(torch.device(device))


def name_of(device: torch.device | str) -> str:
    """The name of an accelerator, as its maker gives it; else its kind."""
    ask = getattr(_module(device), "get_device_name", None)
    return str(ask(device)) if ask else torch.device(device).type


def total_memory(device: torch.device | str) -> int:
    """The bytes of memory of an accelerator; 0 for a CPU, and where torch does not know it."""
    if not is_accelerator(device):
        return 0
    ask = getattr(_module(device), "get_device_properties", None)
    return int(getattr(ask(device), "total_memory", 0)) if ask else 0


def peak_allocated(device: torch.device | str) -> int:
    """The most bytes that torch had allocated on an accelerator; 0 where it does not know that."""
    ask = getattr(_module(device), "max_memory_allocated", None)
    return int(ask(device)) if ask else 0


def forget_peak(device: torch.device | str) -> None:
    """Begin anew with the peak of `peak_allocated`."""
    if forget := getattr(_module(device), "reset_peak_memory_stats", None):
        forget(device)


def random_states_kept() -> AbstractContextManager[None]:
    """While entered, torch's random states may change: then they are as before.

    Those of an accelerator that `best` leaves out are not kept: torch cannot do so for ``mps``.
    """
    if (kind := best()) == "cpu":
        return torch.random.fork_rng(devices=[])
    every = range(torch.accelerator.device_count())  # named, or torch warns that they are several
    return torch.random.fork_rng(devices=every, device_type=kind)


def random_state() -> Any:
    """The random state of the accelerator, if this process has used it; else None."""
    module = _module(accelerator() or "cpu")
    used = getattr(module, "is_initialized", lambda: True)()
    return module.get_rng_state() if used and accelerator() else None


def multiplies_fast(dtype: torch.dtype, device: torch.device | str) -> bool:
    """True if a device multiplies matrices of a half precision faster than those of fp32.

    On a processor, oneDNN is asked first: without it torch multiplies half precision 5 to 250 times
    more slowly. What oneDNN computes with instructions for fp32 is 2 times slower; a product of
    some tenths of a millisecond, once in a process, finds that. Accelerators say whether they
    compute bf16.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype == torch.float32
    kind = torch.device(device).type
    if kind in _HOSTS:
        return _is_faster_here(dtype)
    if kind == "cuda":
        in_hardware: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return dtype == torch.float16 or in_hardware
    ask = getattr(_module(device), "is_bf16_supported", None)
    return dtype == torch.float16 or bool(ask and ask())


@cache
def _is_faster_here(dtype: torch.dtype) -> bool:
    """True if this processor multiplies matrices of a dtype faster than those of fp32."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    ask = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)  # not in every torch
    if ask is None or not ask():
        return False
    with _one_thread():  # another one may have to wait for a processor
        fp32, half = (_seconds_of_product(each, "cpu", 256) for each in (torch.float32, dtype))
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
    """The shortest of some times of a product of two square matrices of that many rows."""
    matrix, seconds = torch.ones(size, size, dtype=dtype, device=device), math.inf
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        for _ in range(_REPEATED):
            started = time.perf_counter()
            torch.nn.functional.linear(matrix, matrix)
            synchronize(device)
            seconds = min(seconds, time.perf_counter() - started)
    return seconds


def operations_per_second(dtype: torch.dtype, device: torch.device | str) -> float:
    """The floating-point operations of a product of matrices in a second, in some milliseconds."""
    size = 4096 if is_accelerator(device) else 512
    return 2.0 * size**3 / _seconds_of_product(dtype, device, size)


def multiplies_bf16(device: torch.device | str) -> bool:
    """True if a device multiplies bf16 in hardware, several times as fast as fp32."""
    return multiplies_fast(torch.bfloat16, device)


def runs_triton(device: torch.device | str) -> bool:
    """True if APT's kernels in Triton run on a device: they were tried on those of CUDA only."""
    return torch.device(device).type == "cuda"


def _module(device: torch.device | str) -> Any:
    """The module of torch for a kind of device, such as `torch.cuda`."""
    return torch.get_device_module(torch.device(device))
