"""The time of a product of one vector on this processor, with dense and with packed matrices.

Each matrix of a model is read once for each token. So the products run over several copies of the
matrices of all shapes in turn, as many as the model has: a matrix is as far from the processor as
it is in the model.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, thread_time

import numpy as np
import torch
from torch import Tensor, nn

from apt.patterns import IntegerGrid
from apt.runtime.decoding import kernel_of
from apt.runtime.dense import use_kernels
from apt.runtime.linear import PackedLinear
from apt.runtime.matrix import MASK, SCALES, VALUES, encode
from apt.runtime.rounding import encode_rounded, nearest_integers

_PASSES, _ROUNDS = 2, 3  # other programs may slow one pass, so that the faster one counts
_MOST = 2**30  # bytes of dense matrices that are measured in turn; larger than a cache
_WEIGHTS = 2**23  # weights of a measured matrix; a larger one takes as long for each row
_SAMPLE = 2**20  # weights from which the magnitude is taken below which weights become zero


def clock() -> float:
    """The time in seconds for measurements on the processor.

    With one thread it is the time that the thread was running, so that other programs on the
    processor do not count.
    """
    return thread_time() if torch.get_num_threads() == 1 else perf_counter()


@dataclass(frozen=True)
class MatrixKind:
    """Matrices of one shape that a model multiplies in the same way.

    Attributes:
        rows, columns: the shape.
        in_call: True if the product is a part of a call of ``apt-kernels`` for a whole block;
            False if a module computes it.
    """

    rows: int
    columns: int
    in_call: bool


@dataclass(frozen=True)
class PackedKind:
    """The values of a packed matrix.

    Attributes:
        grid: the grid of the integers; None for floats.
        zeros: the share of weights that are removed before the rounding.
    """

    grid: IntegerGrid | None
    zeros: float


@dataclass(frozen=True)
class ProductTimes:
    """The times of products of one vector in nanoseconds.

    Attributes:
        dense: the time with a dense matrix, for each kind of matrix.
        packed: the shares of zeros and the times, by the kind of matrix and its grid.
    """

    dense: Mapping[MatrixKind, float]
    packed: Mapping[tuple[MatrixKind, IntegerGrid | None], Sequence[tuple[float, float]]]

    def packed_time(self, kind: MatrixKind, grid: IntegerGrid | None, zeros: float) -> float:
        """The time with a packed matrix of a share of zeros: linear between measured shares."""
        shares, times = zip(*sorted(self.packed[kind, grid]), strict=True)
        return float(np.interp(zeros, shares, times))


def product_times(
    counts: Mapping[MatrixKind, int], packed: Sequence[PackedKind], dtype: torch.dtype
) -> ProductTimes:
    """Measure products of one vector on the processor.

    Args:
        counts: the number of matrices of each kind in the model.
        packed: the kinds of packed matrices to measure.
        dtype: the dtype of the dense matrices and of the vectors.
    """
    total = sum(kind.rows * kind.columns * n for kind, n in counts.items()) * dtype.itemsize
    share = min(1.0, _MOST / max(total, 1))
    copies = {kind: max(1, math.ceil(n * share)) for kind, n in counts.items()}
    plain = {kind: _random_linear(kind, dtype) for kind in counts}
    forms: list[Mapping[MatrixKind, nn.Module]] = [plain]
    forms += [{kind: packed_linear(plain[kind], each) for kind in counts} for each in packed]
    times = [dict.fromkeys(counts, math.inf) for _ in forms]
    for _ in range(_PASSES):
        for modules, known in zip(forms, times, strict=True):
            found = _times({kind: _copies(modules[kind], n) for kind, n in copies.items()}, dtype)
            known.update({kind: min(known[kind], time) for kind, time in found.items()})
    points = dict[tuple[MatrixKind, IntegerGrid | None], list[tuple[float, float]]]()
    for form, modules, known in zip(packed, forms[1:], times[1:], strict=True):
        for kind, module in modules.items():
            point = (share_of_zeros(module), known[kind])
            points.setdefault((kind, form.grid), []).append(point)
    return ProductTimes(times[0], points)


def packed_linear(linear: nn.Linear, kind: PackedKind) -> PackedLinear:
    """A module with the packed matrix of a Linear module, for measurements of time.

    The smallest weights are removed, and the others are rounded to the nearest points of the grid.
    """
    weight = linear.weight.detach()
    if kind.zeros:
        sizes = weight.flatten()[:_SAMPLE].float().abs()
        weight = weight.masked_fill(weight.abs() < sizes.quantile(kind.zeros), 0)
    if kind.grid is None:
        entry, parts = encode(weight)
    else:
        name, group = kind.grid.name, kind.grid.group
        integers, _ = nearest_integers(weight, name, group)
        weight = weight.masked_fill(integers == 0, 0)  # as the file of a rounded model
        entry, parts = encode_rounded(weight, name, group)
    packed = PackedLinear(entry, bias=linear.bias is not None, dtype=weight.dtype)
    for name in (MASK, VALUES, SCALES):
        packed._buffers[f"weight_{name}"] = parts.get(name)
    packed.bias = linear.bias
    packed.prepare()
    return packed.eval()


def share_of_zeros(packed: nn.Module) -> float:
    """The share of zeros of a packed matrix."""
    assert isinstance(packed, PackedLinear)
    return 1 - packed.entry.kept / (packed.entry.rows * packed.entry.columns)


def _random_linear(kind: MatrixKind, dtype: torch.dtype) -> nn.Linear:
    """A module of a kind, with at most `_WEIGHTS` random weights."""
    rows = min(kind.rows, max(1, _WEIGHTS // kind.columns))
    linear = nn.Linear(kind.columns, rows, bias=False, dtype=dtype)
    linear.weight = nn.Parameter(torch.randn(rows, kind.columns).to(dtype), requires_grad=False)
    return linear.eval()


def _copies(module: nn.Module, count: int) -> list[nn.Module]:
    """Copies of a module in memory of their own, as in a loaded model."""
    copies = nn.ModuleList(copy.deepcopy(module) for _ in range(count))
    use_kernels(copies)
    return list(copies)


@torch.no_grad()
def _times(
    modules: Mapping[MatrixKind, Sequence[nn.Module]], dtype: torch.dtype
) -> dict[MatrixKind, float]:
    """The median nanoseconds of a product with a matrix of each kind; matrices run in turn."""
    products = list(_in_turn({k: [_product(k, m) for m in each] for k, each in modules.items()}))
    vectors = {kind: torch.randn(1, kind.columns).to(dtype) for kind in modules}
    times: dict[MatrixKind, list[float]] = {kind: [] for kind in modules}
    for turn in range(1 + _ROUNDS):
        for kind, product in products:
            started = clock()
            product(vectors[kind])
            if turn:  # the first one warms up
                times[kind].append(clock() - started)
    whole = {kind: kind.rows / _rows(modules[kind][0]) for kind in modules}
    return {kind: 1e9 * median(found) * whole[kind] for kind, found in times.items()}


_Product = Callable[[Tensor], Tensor]


def _product(kind: MatrixKind, module: nn.Module) -> _Product:
    """The product as a loaded model computes it."""
    if not kind.in_call:
        return module
    product: _Product = kernel_of(module).product
    return product


def _rows(module: nn.Module) -> int:
    rows = module.out_features
    assert isinstance(rows, int)
    return rows


def _in_turn(
    products: Mapping[MatrixKind, Sequence[_Product]],
) -> Iterator[tuple[MatrixKind, _Product]]:
    """All products; those of all kinds take turns."""
    for place in range(max(map(len, products.values()), default=0)):
        for kind, each in products.items():
            if place < len(each):
                yield kind, each[place]
