"""Giving back the OpenMP threads of a thread that is going to wait.

Every Python thread that computes on the CPU gets an OpenMP team of its own, which stays when the
thread waits. GNU's library counts all teams, and once they have more threads than there are
processors, none of them spins at a barrier any longer: they sleep and are woken, which makes
kernels of many short parallel regions, such as a Cholesky factorisation, two to three times
slower. A team that is given back is made anew in some 0.2 ms.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache

_SOFT = 1  # omp_pause_soft of OpenMP 5.0: settings stay


def release_team() -> None:
    """Give back the calling thread's OpenMP team, where there is one and the library can."""
    pause = _pause()
    if pause is not None:
        pause(_SOFT)


@cache
def _pause() -> Callable[[int], int] | None:
    """``omp_pause_resource_all`` of the OpenMP library in this process, of 5.0 or later."""
    with suppress(OSError, AttributeError, TypeError):  # none, too old, or Windows
        return ctypes.CDLL(None).omp_pause_resource_all
    return None
