"""One arena for all threads' memory.

The C library gives every thread an arena of its own, in which what the thread has freed stays. In
a walk through a block each batch is a thread, and what all of them have freed is a third of a run's
memory. Only one of them runs at a time, so that one arena serves them as well.
"""

import ctypes
from contextlib import suppress

_ARENA_MAX = -8  # M_ARENA_MAX of glibc's malloc.h


def share_arena() -> None:
    """Let threads that start from now on share an arena, where the C library is glibc."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
