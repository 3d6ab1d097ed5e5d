"""Memory of the matrices, in large pages where the system has them.

A product reads a matrix once, from beginning to end. With pages of 4 KiB the translation of
addresses takes a third of the time. The pages of a file in memory are of this size.
"""

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path
from threading import Lock
from weakref import ReferenceType, ref

import torch
from torch import Tensor

BEYOND = 256  # bytes that the kernels may read after the last value
_REGION = 64 * 2**20  # bytes of memory for many matrices
_ALIGNMENT = 64
_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4, which Python does not name


class _Region(mmap.mmap):
    """Memory that tensors share. It is released with the last of these tensors."""

    used = 0


_last: "ReferenceType[_Region] | None" = None
_files: list[tuple[int, int]] = []  # the addresses of mapped files, when they were last read
_turn = Lock()  # several threads may load models


def in_large_pages(values: Tensor) -> Tensor:
    """A copy of ``values`` on the processor, followed by `BEYOND` readable bytes.

    If ``values`` are mapped from a file, their memory is released; the file can be read again.

    Raises:
        ValueError: they are not on the processor.
    """
    if not values.is_cpu:
        raise ValueError(f"values on {values.device}, not on cpu")
    copy = zeros_in_large_pages(values.nbytes).view(values.dtype).view(values.shape)
    copy.copy_(values)
    give_back(values)
    return copy


def zeros_in_large_pages(size: int) -> Tensor:
    """Bytes that are zero, followed by `BEYOND` readable bytes."""
    with _turn:
        place = _reserved(-(-(size + BEYOND) // _ALIGNMENT) * _ALIGNMENT)
    return place[:size]


def give_back(values: Tensor) -> None:
    """Let the system release the pages of a mapped file. The values do not change."""
    page = mmap.PAGESIZE
    first = -(-values.data_ptr() // page) * page
    size = (values.data_ptr() + values.nbytes) // page * page - first
    if size > 0 and values.is_contiguous() and _is_of_a_file(first):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _PAGEOUT)


def _is_of_a_file(address: int) -> bool:
    """True if a file is mapped to this address; False if the system cannot report it."""
    global _files
    if not any(first <= address < last for first, last in _files):
        _files = _mapped_files()
    return any(first <= address < last for first, last in _files)


def _mapped_files() -> list[tuple[int, int]]:
    """The address ranges of files that are mapped into this process, on Linux."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    mapped = (line.split(maxsplit=5) for line in lines)
    spans = (parts[0].split("-") for parts in mapped if len(parts) == 6 and parts[5][0] == "/")
    return [(int(first, 16), int(last, 16)) for first, last in spans]


def _reserved(size: int) -> Tensor:
    """Bytes of a region, which are zero."""
    global _last
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    region = _last() if _last is not None else None
    if region is None or region.used + size > len(region):
        region = _Region(-1, max(size, _REGION), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without large pages
            region.madvise(mmap.MADV_HUGEPAGE)
        _last = ref(region)
    place = torch.frombuffer(region, dtype=torch.uint8, count=size, offset=region.used)
    region.used += size
    return place
