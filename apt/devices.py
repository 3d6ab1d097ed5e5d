"""The devices that torch computes on: a CPU, or an accelerator of any kind.

Only this file asks what kind an accelerator is. torch names them ``cuda`` (NVIDIA and AMD),
``xpu``, ``mps`` or ``npu``, or as a package registers it.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch

_HOSTS = ("cpu", "meta")
_WITHOUT_SOLVES = ("mps",)  # torch lacks factorisations there


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


def multiplies_bf16(device: torch.device | str) -> bool:
    """True if a device multiplies bf16 in hardware, several times as fast as fp32."""
    kind = torch.device(device).type
    if kind == "cuda":
        supported: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return supported
    if kind == "cpu":
        has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    ask = getattr(_module(device), "is_bf16_supported", None)
    return bool(ask and ask())


def runs_triton(device: torch.device | str) -> bool:
    """True if APT's kernels in Triton run on a device: they were tried on those of CUDA only."""
    return torch.device(device).type == "cuda"


def _module(device: torch.device | str) -> Any:
    """The module of torch for a kind of device, such as `torch.cuda`."""
    return torch.get_device_module(torch.device(device))
