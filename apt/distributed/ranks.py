"""Several processes that prune one model together, each a *rank* as torch.distributed has it.

Each carries its part of the calibration samples through its own copy of the blocks; sums over
tokens are added up, the sites of a block are solved by different ranks, and weights go from the one
that solved them to all. A single process is one rank, for which nothing here costs anything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass
class Work:
    """What one rank has done.

    Attributes:
        tokens: the calibration tokens that it carries through the blocks.
        solves: the sites that it has solved.
        solve_seconds: the time that took.
    """

    tokens: int = 0
    solves: int = 0
    solve_seconds: float = 0.0


class Ranks:
    """The ranks that prune together, seen from one of them.

    Args:
        group: their process group; None for a single process.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
        work: what this one has done.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1
        self.work, self._turns = Work(), 0

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and reports."""
        return self.rank == 0

    def mine(self, parts: Sequence[T]) -> Sequence[T]:
        """This rank's of ``parts``, which are dealt out in turn."""
        return parts[self.rank :: self.size]

    def rounds(self, work: Sequence[T]) -> Iterator[dict[int, T]]:
        """``work`` in rounds of one piece for each rank, by turn.

        Turns are counted through the whole run, so that over many rounds, some of them with fewer
        pieces than ranks, each rank gets as many as the others.
        """
        for start in range(0, len(work), self.size):
            some = work[start : start + self.size]
            yield dict(enumerate(some, self._turns))
            self._turns += len(some)

    def owner(self, turn: int) -> int:
        """The rank whose turn it is."""
        return turn % self.size

    def add(self, *tensors: Tensor) -> None:
        """Add up each of ``tensors`` over all ranks, in place."""
        if self._group:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self._group)

    def sum(self, value: float) -> float:
        """``value`` added up over all ranks."""
        total = torch.tensor(value, dtype=torch.float64)
        self.add(total)
        return float(total)

    def send(self, tensor: Tensor, owner: int) -> None:
        """Overwrite ``tensor`` on every rank by what ``owner`` has there."""
        if self._group:
            whole = tensor.contiguous()
            dist.broadcast(whole, dist.get_global_rank(self._group, owner), self._group)
            if whole is not tensor:
                tensor.copy_(whole)

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, a plain object, in the order of ranks."""
        return [self.share(value, owner) for owner in range(self.size)]

    def share(self, value: T, owner: int = 0) -> T:
        """``owner``'s ``value``, a plain object, on every rank."""
        if not self._group:
            return value
        box = [value]
        source = dist.get_global_rank(self._group, owner)
        dist.broadcast_object_list(box, source, self._group, torch.device("cpu"))
        return box[0]

    def wait(self) -> None:
        """Wait until every rank has come here."""
        if self._group:
            dist.barrier(self._group)
