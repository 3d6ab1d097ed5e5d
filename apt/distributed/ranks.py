"""Several processes that prune one model together, each a *rank* as torch.distributed has it.

Each rank runs its part of the calibration samples through its own copy of the blocks. Sums over
tokens are added over all ranks. The sites of a block are solved by different ranks, and each solved
weight is broadcast to all. A single process is one rank; it communicates nothing.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from apt.files.journal import Line, check_same

_SAME = "start all of them with the same options, files and versions"
T = TypeVar("T")


@dataclass
class Work:
    """The record of the work of one rank.

    Attributes:
        tokens: the number of its calibration tokens.
        solves: the number of sites that it has solved.
        solve_seconds: the time of these solves.
    """

    tokens: int = 0
    solves: int = 0
    solve_seconds: float = 0.0


class Ranks:
    """The ranks that prune one model together; each process has an instance.

    All ranks must make the same calls. If an error ends the work of one rank, the others wait for
    it until the timeout of the group, unless their processes are ended, as ``torchrun`` does.

    Args:
        group: their process group; None for a single process.

    Attributes:
        rank: the number of this rank, from 0.
        size: the number of ranks.
        work: the record of this rank's work.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1
        self.work, self._turns = Work(), 0

    @property
    def first(self) -> bool:
        """True for rank 0, which writes and reports."""
        return self.rank == 0

    def mine(self, parts: Sequence[T]) -> Sequence[T]:
        """The items of ``parts`` that belong to this rank: every ``size``-th one."""
        return parts[self.rank :: self.size]

    def rounds(self, work: Sequence[T]) -> Iterator[dict[int, T]]:
        """``work`` in rounds of at most one piece per rank; the key of a piece is its turn.

        Turns are counted over the whole run. So over many rounds all ranks get equally many pieces,
        even if some rounds have fewer pieces than ranks.
        """
        for start in range(0, len(work), self.size):
            pieces = work[start : start + self.size]
            yield dict(enumerate(pieces, self._turns))
            self._turns += len(pieces)

    def owner(self, turn: int) -> int:
        """The rank to which ``turn`` belongs."""
        return turn % self.size

    def add(self, *tensors: Tensor) -> None:
        """Sum each of ``tensors`` over all ranks, in place."""
        if self._group:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self._group)

    def sum(self, value: float) -> float:
        """The sum of ``value`` over all ranks."""
        total = torch.tensor(value, dtype=torch.float64)
        self.add(total)
        return float(total)

    def send(self, tensor: Tensor, owner: int) -> None:
        """Broadcast ``tensor`` from rank ``owner`` to all ranks, in place."""
        if self._group:
            contiguous = tensor.contiguous()
            dist.broadcast(contiguous, dist.get_global_rank(self._group, owner), self._group)
            if contiguous is not tensor:
                tensor.copy_(contiguous)

    def gather(self, value: T) -> list[T]:
        """The ``value`` of every rank, a plain object, in the order of ranks."""
        return [self.share(value, owner) for owner in range(self.size)]

    def share(self, value: T, owner: int = 0) -> T:
        """The ``value`` of rank ``owner``, a plain object, on every rank."""
        if not self._group:
            return value
        box = [value]
        source = dist.get_global_rank(self._group, owner)
        dist.broadcast_object_list(box, source, self._group, torch.device("cpu"))
        return box[0]

    def check_alike(self, inputs: Callable[[], Line]) -> None:
        """Raise on all ranks if a rank has other inputs than the first rank.

        Without this check, ranks with other files or tokens would add up sums of different models.

        Args:
            inputs: returns everything that the run depends on, as values for JSON. A single rank
                does not call it.

        Raises:
            AptError: the inputs differ; the message names the first such rank and the entries.
        """
        if self.size == 1:
            return
        first, *others = self.gather(json.loads(json.dumps(inputs())))
        for rank, other in enumerate(others, 1):
            check_same(f"rank {rank} has other inputs than rank 0", first, other, _SAME)

    def wait(self) -> None:
        """Wait until every rank has called this."""
        if self._group:
            dist.barrier(self._group)
