"""The time to prune many small weights one by one, and what stacks of them would save.

The first table has the CPU time of the solves of experts of one shape, each with a Gram matrix of
its own, beside that of one matrix with as many weights. The time is that of 128 experts, from fewer
experts that are timed. It is divided into factorisations, calls (the time of four rows instead of
all) and the rest, which is the algebra of the method. The second table has the parts of the
methods, one by one and for a stack of experts at once, as batched operations of torch::

    OMP_NUM_THREADS=1 python benchmarks/experts.py --json out/experts.json
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import save
from rich.console import Console
from rich.table import Table
from torch import Tensor

from apt.plugin.registry import registry
from apt.solver import NM, Gram, SolverOptions, full_precision, parse_pattern
from apt.solver.admm_search import ROUNDS, _add_product
from apt.solver.gram import upper_root
from apt.solver.scaled import positive_inverse
from apt.solver.sparsegpt import _single

METHODS = ["wanda", "ss", "admm:fast", "admm:default", "admm:best"]
OF = 128
_FEW = 4  # rows whose algebra takes little time beside that of the calls


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["96x192", "512x1024", "768x2048"])
    parser.add_argument("--methods", nargs="+", default=METHODS, help="NAME or NAME:EFFORT")
    parser.add_argument("--pattern", default="0.5")
    parser.add_argument("--weights", type=int, default=2**21, help="of all timed experts, about")
    parser.add_argument("--repeats", type=int, default=3, help="the shortest time is reported")
    parser.add_argument("--wall", action="store_true", help="time by the clock, not the CPU's")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Experts:
    """Random weights (experts, out, in), and Gram matrices of correlated inputs."""

    def __init__(self, shape: str, options: argparse.Namespace) -> None:
        self.shape, (out, width) = shape, map(int, shape.split("x"))
        count = min(64, max(2, options.weights // (out * width)))
        draw = torch.Generator().manual_seed(0)
        mixing = torch.randn(width, width, generator=draw) / width**0.5 + torch.eye(width)
        self.weights = torch.randn(count, out, width, generator=draw)
        self.grams = [
            Gram.of(torch.randn(2 * width, width, generator=draw) @ mixing) for _ in range(count)
        ]
        self.repeats = options.repeats
        self.clock = time.perf_counter if options.wall else time.process_time
        self.pattern = parse_pattern(options.pattern)

    def seconds(self, work: Callable[[], Any], *, fresh: bool = True) -> float:
        """The shortest time; without the factors of earlier runs if ``fresh``."""
        times = []
        for _ in range(self.repeats):
            for gram in self.grams if fresh else ():
                gram._damped.clear()
            started = self.clock()
            work()
            times.append(self.clock() - started)
        return min(times)

    def solves(self, name: str) -> dict[str, Any]:
        """The seconds of a method for 128 experts, and for one matrix with as many weights."""
        method, _, effort = name.partition(":")
        spec = registry().methods.get(method)
        solve, pattern = spec.load(), self.pattern
        pattern = pattern.counted(spec.per)
        options, scale = SolverOptions(effort=effort or "default"), OF / len(self.weights)

        def each(rows: slice) -> None:
            for weight, gram in zip(self.weights, self.grams, strict=True):
                solve(weight[rows].clone(), gram, pattern, options)

        def whole() -> None:
            solve(self.weights.flatten(0, 1), self.grams[0], pattern, options)

        row = {"shape": self.shape, "method": name, "experts": len(self.weights)}
        one_by_one = self.seconds(lambda: each(slice(None))) * scale
        row |= {"one_by_one": one_by_one, "one_matrix": self.seconds(whole) * scale}
        factors = self.seconds(lambda: self.factorise(method, effort)) * scale
        self.factorise(method, effort)
        calls = self.seconds(lambda: each(slice(0, _FEW)), fresh=False) * scale
        rest = max(0.0, one_by_one - factors - calls)
        return row | {"factors": factors, "calls": calls, "method_itself": rest}

    @full_precision()
    def factorise(self, method: str, effort: str) -> None:
        """Compute what the method caches for each Gram matrix."""
        for gram in self.grams if method != "wanda" else ():
            damped = gram.damped()
            if method in ("ss", "ms"):
                _ = damped.factor
            elif method == "admm":
                _ = damped.unit.outliers
                for part in ROUNDS[effort or "default"]:
                    for _ in damped.balanced.proximals(part.penalties):
                        pass

    @full_precision()
    def parts(self) -> Iterator[dict[str, Any]]:
        """The seconds of each part of the methods for 128 experts, one by one and stacked."""
        weights, grams = self.weights, torch.stack([g.damped().matrix for g in self.grams])
        roots = torch.linalg.cholesky(torch.linalg.inv(grams)).mT.contiguous()
        proximal = torch.stack([next(g.damped().balanced.proximals([1.2])) for g in self.grams])
        targets, spare = weights.mT.contiguous(), weights.mT.contiguous()
        mixed = torch.empty_like(targets)

        def stacked_product() -> None:
            if proximal.dtype == spare.dtype:
                torch.baddbmm(targets, proximal, spare, out=mixed)
            else:
                torch.add(targets, proximal @ spare.to(proximal.dtype), out=mixed)

        def relax(values: Tensor, kept: Tensor) -> None:
            values.mul_(0.8).add_(kept, alpha=-0.1).add_(kept, alpha=0.1)

        for name, one, stacked in (
            ("root", lambda i: upper_root(grams[i]), lambda: torch.linalg.cholesky_ex(grams)),
            ("inverse", lambda i: positive_inverse(grams[i]),
             lambda: torch.cholesky_inverse(torch.linalg.cholesky(grams))),
            ("product", lambda i: _add_product(targets[i], proximal[i], spare[i], mixed[i]),
             stacked_product),
            ("element by element", lambda i: relax(mixed[i], targets[i]),
             lambda: relax(mixed, targets)),
            ("2:4", lambda i: NM(2, 4).threshold(targets[i]),
             lambda: NM(2, 4).threshold(targets.flatten(0, 1))),
            ("sweep of a strip", lambda i: _strip(spare[i], roots[i], mixed[i]),
             lambda: _stacked_strip(spare, roots, mixed)),
        ):  # fmt: skip
            spare.copy_(targets), mixed.copy_(targets)
            alone = self.seconds(lambda one=one: list(map(one, range(len(weights)))), fresh=False)
            spare.copy_(targets), mixed.copy_(targets)
            together = self.seconds(stacked, fresh=False)
            scale = OF / len(weights)
            yield {"shape": self.shape, "part": name, "one_by_one": alone * scale,
                   "stacked": together * scale}  # fmt: skip


def _strip(columns: Tensor, factor: Tensor, coefficients: Tensor, width: int = 32) -> None:
    """Every other weight is removed from the first columns of a weight (in, out)."""
    mask = torch.zeros_like(columns[:width], dtype=torch.bool)
    mask[:, ::2] = True
    _single(columns[:width], factor[:width, :width], mask, coefficients[:width])


def _stacked_strip(columns: Tensor, factor: Tensor, coefficients: Tensor, width: int = 32) -> None:
    """The same for a stack of weights (experts, in, out)."""
    mask = torch.zeros_like(columns[:, :width], dtype=torch.bool)
    mask[:, :, ::2] = True
    pivots = factor.diagonal(dim1=1, dim2=2)
    for j in range(width):
        removed = torch.mul(columns[:, j], mask[:, j], out=coefficients[:, j])
        removed.div_(pivots[:, j, None])
        columns[:, j:width].baddbmm_(factor[:, j, j:width, None], removed[:, None], alpha=-1)


def main() -> None:
    options, console, rows = arguments(), Console(), []
    solves = Table("shape", "method", "one by one, s", "of one matrix", "factors", "calls", "rest")
    parts = Table("shape", "part", "one by one, s", "stacked, s", "gain")
    for shape in options.shapes:
        experts = Experts(shape, options)
        for name in options.methods:
            rows.append(row := experts.solves(name))
            shares = [f"{row[k] / row['one_by_one']:.0%}" for k in ("factors", "calls")]
            ratio = f"{row['one_by_one'] / row['one_matrix']:.2f} ×"
            rest = f"{row['method_itself'] / row['one_by_one']:.0%}"
            solves.add_row(shape, name, f"{row['one_by_one']:.2f}", ratio, *shares, rest)
        for row in experts.parts():
            rows.append(row)
            gain = f"{row['one_by_one'] / row['stacked']:.2f} ×"
            times = (f"{row['one_by_one']:.3f}", f"{row['stacked']:.3f}")
            parts.add_row(shape, row["part"], *times, gain)
    console.print(f"{OF} experts, {options.pattern}")
    console.print(solves)
    console.print(parts)
    save(options.json, rows)


if __name__ == "__main__":
    main()
