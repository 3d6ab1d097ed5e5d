"""Memory of the matrices, in large pages where the system has them.

A product reads a matrix once, from beginning to end. With pages of 4 KiB the translation of
addresses takes a third of the time. The pages of a file in memory are of this size.
"""

import mmap
from contextlib import suppress
from threading import Lock
from weakref import ReferenceType, ref

import torch
from torch import Tensor

BEYOND = 256  # bytes that the kernels may read behind the last value
_REGION = 64 * 2**20  # bytes of memory for many matrices
_ALIGNMENT = 64


class _Region(mmap.mmap):
    """Memory that tensors share. It is given back with the last one of them."""

    used = 0


_last: "ReferenceType[_Region] | None" = None
_turn = Lock()  # several threads may load models


def in_large_pages(values: Tensor) -> Tensor:
    """A copy of ``values`` on the processor, with `BEYOND` bytes behind it that can be read."""
    size = values.nbytes
    with _turn:
        place = _reserved(-(-(size + BEYOND) // _ALIGNMENT) * _ALIGNMENT)
    copy = place[:size].view(values.dtype).view(values.shape)
    return copy.copy_(values)


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
