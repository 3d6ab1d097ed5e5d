"""The least share of zeros at which packed products of one vector are faster on this machine."""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from apt.runtime.linear import kernels

_SIDE = 4096  # all matrices together are larger than a cache
_DRAWN = 256  # rows that are random; the others repeat them, since only their number has an effect
_SHARES = tuple(n / 10 for n in range(10))
_ROUNDS = 5


@torch.no_grad()
def pays_from(threads: int) -> float | None:
    """The least share of zeros, in steps of 10 %, at which packed bf16 beats torch's dense product.

    None if no share does, as without ``apt-kernels``. It takes a few seconds.

    Args:
        threads: the number of threads.
    """
    package = kernels()
    if package is None:
        return None
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        draw = torch.Generator().manual_seed(0)
        rows = torch.randn(_DRAWN, _SIDE, generator=draw).bfloat16()
        positions = torch.rand(_DRAWN, _SIDE, generator=draw)
        x = torch.randn(1, _SIDE, generator=draw).bfloat16()
        packed = [package.Matrix(_SIDE, *_parts(rows, positions >= share)) for share in _SHARES]
        dense = rows.repeat(_SIDE // _DRAWN, 1)
        runs: list[Callable[[], Tensor]] = [lambda: nn.functional.linear(x, dense)]
        runs += [lambda m=matrix: m.product(x) for matrix in packed]  # type: ignore[misc]
        base, *times = _times(runs)
    finally:
        torch.set_num_threads(threads_before)
    return next((s for s, t in zip(_SHARES, times, strict=True) if t < base), None)


def _parts(rows: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The bitmask and the kept values of a matrix that repeats these rows."""
    bits = kept.view(len(rows), -1, 8).to(torch.uint8)
    mask = (bits << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)
    repeats = _SIDE // _DRAWN
    return mask.repeat(repeats, 1), rows[kept].repeat(repeats)


def _times(runs: list[Callable[[], Tensor]]) -> list[float]:
    """The median seconds of each function; the functions run in turn."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(_ROUNDS + 1):
        for run, times in zip(runs, seconds, strict=True):
            started = perf_counter()
            run()
            times.append(perf_counter() - started)
    return [median(times[1:]) for times in seconds]
