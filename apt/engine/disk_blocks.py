"""Blocks on disk: read from the input checkpoint one at a time, and written to the output."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor, nn

from apt.checkpoints.offload import StoredBlocks
from apt.checkpoints.stored import pruned_parameters
from apt.checkpoints.verify import block_verdicts, failures
from apt.devices import is_accelerator
from apt.distributed.ranks import Ranks
from apt.errors import first_line
from apt.events import Done, ExpertsRemoved, SitePruned
from apt.files.journal import Journal, Line
from apt.output.report import read_site
from apt.planning.plan import Plan


class DiskBlocks:
    """Blocks on disk, see `apt.pruning.block_storage.BlockStorage`.

    Args:
        source, target: the blocks of the input, and those of the output.
        device: the device of the current block. For a GPU, the next block is read in advance.
        ranks: the processes that prune together. Only the first one writes.
    """

    repeatable = True

    def __init__(
        self,
        plan: Plan,
        source: StoredBlocks,
        target: StoredBlocks,
        device: str,
        journal: Journal,
        ranks: Ranks,
    ) -> None:
        self._plan, self._source, self._target = plan, source, target
        self._journal, self._ranks = journal, ranks
        self._done = {str(line["block"]): line for line in journal.lines if "block" in line}
        order = [planned.name for planned in plan.blocks]
        self._next = dict(itertools.pairwise(order))
        self._ahead: dict[str, Future[dict[str, Tensor]]] = {}
        self._reader = ThreadPoolExecutor(1) if reads_ahead(device) else None

    @contextmanager
    def open(self, name: str, block: nn.Module) -> Iterator[None]:
        """While entered, the dense block is in memory; then it is on the meta device again."""
        reading = self._ahead.pop(name, None)
        self._ahead.clear()  # of a dropped block that is not opened
        dense = reading.result() if reading else self._source.read(name)
        following = self._next.get(name)
        if self._reader is not None and following is not None:
            self._ahead[following] = self._reader.submit(self._source.read, following)
        with self._source.open(name, dense):
            yield

    def pruned(self, name: str) -> list[Done] | None:
        """The records in the journal of a block; None if the block is not finished."""
        return records_of(self._done[name], self._journal) if name in self._done else None

    def restore(self, name: str, block: nn.Module) -> None:
        """Read the pruned block from the output."""
        self._target.restore(name)

    def keep(self, name: str, block: nn.Module, done: Sequence[Done]) -> None:
        """Write the pruned parameters, and then a line in the journal.

        Every rank continues with the values as stored, as a resumed run does.
        """
        planned = next(entry for entry in self._plan.blocks if entry.name == name)
        paths = pruned_parameters(planned)
        self._target.round(name, paths)
        if not self._ranks.first:
            return
        self._target.write(name, paths, self._source)
        records = {
            "sites": [asdict(each) for each in done if isinstance(each, SitePruned)],
            "experts": [asdict(each) for each in done if isinstance(each, ExpertsRemoved)],
        }
        line = {"block": name, **records, "digest": self._target.digest(planned)}
        self._journal.add(line)

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The dtype in which a parameter of that full name is stored."""
        return self._target.stored_dtype(name)

    def check(self) -> None:
        """Compare the blocks that an earlier run wrote with their checksums in the journal.

        Raises:
            AptError: a block was changed since then.
        """
        for planned in self._plan.blocks:
            line = self._done.get(planned.name)
            if line is not None and line.get("digest") != self._target.digest(planned):
                raise self._journal.damaged(f"{planned.name} was changed")

    def verify(
        self, plan: Plan, visit: Callable[[str, nn.Module], None] = lambda name, block: None
    ) -> dict[str, int]:
        """The zeros of each site in the written blocks, each of which is shown to ``visit``."""
        zeros = dict[str, int]()
        for planned in plan.blocks:
            with self._target.open(planned.name) as block:
                visit(planned.name, block)
                verdicts = list(block_verdicts(planned, block))
            if failed := failures(verdicts):
                raise RuntimeError(f"{failed[0].name} as written: {failed[0].detail}")
            zeros |= {verdict.name: verdict.zeros for verdict in verdicts}
        return zeros


def reads_ahead(device: str) -> bool:
    """True if the next block is read while the current one is pruned.

    On a CPU that would need memory for a second block and gain little: the kernel reads ahead.
    """
    return is_accelerator(device)


def records_of(line: Line, journal: Journal) -> list[Done]:
    """The records of a block in a line of a journal.

    Raises:
        AptError: the line is damaged.
    """
    try:
        sites = [read_site(entry) for entry in line.get("sites", ())]
        return [*(_experts(**entry) for entry in line.get("experts", ())), *sites]
    except (KeyError, TypeError, ValueError) as error:
        raise journal.damaged(first_line(error)) from error


def _experts(name: str, experts: list[int], merged: list[tuple[int, int]]) -> ExpertsRemoved:
    return ExpertsRemoved(name, tuple(experts), tuple((first, other) for first, other in merged))
