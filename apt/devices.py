"""The devices that torch computes on: a CPU, or an accelerator of any kind.

Only this file asks what kind an accelerator is. torch names them ``cuda`` (NVIDIA and AMD),
``xpu``, ``mps`` or ``npu``, or as a package registers it.
"""

import math
import time
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

_HOSTS = ("cpu", "meta")
_WITHOUT_SOLVES = ("mps",)  # torch lacks factorisations there
_PROBE, _PROBES = (256, 256), 8  # the shape of a product that is timed, and how often


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

    A processor is asked by a product of some tenths of a millisecond, once in a process: oneDNN and
    torch compute half precision on every processor, on many of them 2 to 250 times slower than
    fp32, and name no list of these. Accelerators say whether they compute bf16.
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
    """True if this processor multiplies matrices of a dtype faster than those of fp32.

    The two products take turns, and the shortest times are compared: another process that takes
    the processor for a while does not change the answer. The ratio of the two is far from 1 on
    every processor: above 1.6 with instructions for the dtype, below 0.5 without.
    """
    given = [torch.ones(_PROBE, dtype=k, device="cpu") for k in (torch.float32, dtype)]
    seconds = [math.inf, math.inf]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(_PROBES):
            for place, matrix in enumerate(given):
                started = time.perf_counter()
                torch.nn.functional.linear(matrix, matrix)
                seconds[place] = min(seconds[place], time.perf_counter() - started)
    return seconds[1] < seconds[0]


def multiplies_bf16(device: torch.device | str) -> bool:
    """True if a device multiplies bf16 in hardware, several times as fast as fp32."""
    return multiplies_fast(torch.bfloat16, device)


def compute_dtype(stored: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype that a model with weights of the dtype ``stored`` runs in by default.

    It is fp32 where the device multiplies the stored dtype more slowly than fp32.
    """
    half = stored in (torch.bfloat16, torch.float16)
    return torch.float32 if half and not multiplies_fast(stored, device) else stored


def runs_triton(device: torch.device | str) -> bool:
    """True if APT's kernels in Triton run on a device: they were tried on those of CUDA only."""
    return torch.device(device).type == "cuda"


def _module(device: torch.device | str) -> Any:
    """The module of torch for a kind of device, such as `torch.cuda`."""
    return torch.get_device_module(torch.device(device))
