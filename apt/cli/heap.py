"""The heap of the process, as the C library manages it."""

import ctypes
import os

# The numbers of the parameters in malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 2**30  # free bytes at the end of the heap that are not returned to the system
_MAPPED = 2**25  # bytes of a block that is mapped alone; the largest value that glibc accepts
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Let the process keep up to 1 GiB of freed memory for its next tensors.

    glibc returns free memory at the end of the heap to the system, by default above 64 MiB. Each
    of its pages then costs a fault when a tensor uses it again: a quarter of the time of a step of
    a training. Other C libraries, and a user's own settings, stay as they are.
    """
    if os.name != "posix" or any(name in os.environ for name in _VARIABLES):
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _MAPPED)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
