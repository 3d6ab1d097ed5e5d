"""Blocks that are on disk while they have no turn, read from one checkpoint, written to another."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from apt.errors import AptError, first_line
from apt.events import SitePruned
from apt.journal import Workplace
from apt.plan import Plan
from apt.ranks import Ranks
from apt.shards import Shards
from apt.verify import block_verdicts, failures


class OnDisk:
    """See `apt.residency.Residency`.

    Args:
        plan: what is pruned.
        blocks: the modules by name, on the meta device.
        device: where a block has its turn. On a GPU, the next one is read meanwhile.
        names: from the model's weights to the checkpoint's.
        source, target: the checkpoint, and what is becoming of its copy.
        work: the journal.
        ranks: the processes that do this together, the first of which writes.
    """

    repeatable = True

    def __init__(
        self,
        plan: Plan,
        blocks: Mapping[str, nn.Module],
        device: str,
        names: Mapping[str, str],
        source: Shards,
        target: Shards,
        work: Workplace,
        ranks: Ranks,
    ) -> None:
        self._plan, self._blocks, self._device, self._names = plan, blocks, device, names
        self._source, self._target, self._work, self._ranks = source, target, work, ranks
        self._done = {str(line["block"]): line for line in work.lines if "block" in line}
        order = [planned.name for planned in plan.blocks]
        self._next = dict(itertools.pairwise(order))
        self._ahead: dict[str, Future[dict[str, Tensor]]] = {}
        self._reader = ThreadPoolExecutor(1) if reads_ahead(device) else None

    @contextmanager
    def open(self, name: str, block: nn.Module) -> Iterator[None]:
        """The block as the input has it; then on the meta device again."""
        coming = self._ahead.pop(name, None)
        dense = coming.result() if coming else self._read(name, self._source)
        following = self._next.get(name)
        if self._reader is not None and following is not None:
            self._ahead[following] = self._reader.submit(self._read, following, self._source)
        with _loaded(block, dense, self._device):
            yield

    def _read(self, name: str, shards: Shards) -> dict[str, Tensor]:
        """The parameters of a block."""
        read = {}
        for path, _ in self._blocks[name].named_parameters():
            tensor = shards.read(key := self._names[f"{name}.{path}"])
            if not torch.isfinite(tensor).all():
                raise AptError(
                    f"{key} holds values that are not finite",
                    "the checkpoint is damaged; get it again",
                )
            pinned = self._device.startswith("cuda")
            read[path] = tensor.pin_memory() if pinned else tensor
        return read

    def pruned(self, name: str) -> list[SitePruned] | None:
        """As the journal has it."""
        return sites_of(self._done[name]) if name in self._done else None

    def restore(self, name: str, block: nn.Module) -> None:
        """Read the block from the output."""
        _put(block, self._read(name, self._target), self._device)

    def keep(self, name: str, block: nn.Module, sites: Sequence[SitePruned]) -> None:
        """Write what was pruned, and say so in the journal."""
        if not self._ranks.first:
            return
        planned = next(entry for entry in self._plan.blocks if entry.name == name)
        paths = dict.fromkeys(
            [entry.site.parameter for entry in planned.pruned]
            + [entry.extra.parameter for entry in planned.extras]
        )
        self._target.write((self._names[f"{name}.{p}"], block.get_parameter(p)) for p in paths)
        self._work.add({"block": name, "sites": [asdict(site) for site in sites]})

    def verify(self) -> None:
        """Hold what was written against the plan."""
        for planned in self._plan.blocks:
            block = self._blocks[planned.name]
            with _loaded(block, self._read(planned.name, self._target), self._device):
                if failed := failures(block_verdicts(planned, block)):
                    raise RuntimeError(f"{failed[0].name} as written: {failed[0].detail}")


def reads_ahead(device: str) -> bool:
    """Whether a block is read while another has its turn.

    On a processor that would take memory for a second block and win little: the kernel reads ahead.
    """
    return device.startswith("cuda")


def sites_of(line: dict[str, Any]) -> list[SitePruned]:
    """What a line of the journal says was pruned.

    Raises:
        AptError: no run has written such a line.
    """
    try:
        return [SitePruned(**{**s, "shape": tuple(s["shape"])}) for s in line.get("sites", ())]
    except (KeyError, TypeError) as error:
        raise AptError(
            f"the journal of the interrupted run is damaged: {first_line(error)}",
            "delete the folder .NAME.apt beside the output NAME and begin again",
        ) from error


@contextmanager
def _loaded(block: nn.Module, tensors: dict[str, Tensor], device: str) -> Iterator[None]:
    """A block with these parameters; then on the meta device again."""
    _put(block, tensors, device)
    try:
        yield
    finally:
        empty = {n: torch.empty_like(p, device="meta") for n, p in block.named_parameters()}
        _put(block, empty, "meta")


def _put(block: nn.Module, tensors: dict[str, Tensor], device: str) -> None:
    """Give a block its parameters, and keep none of them here."""
    for path in list(tensors):
        owner, _, own = path.rpartition(".")
        tensor = tensors.pop(path).to(device, non_blocking=True)
        setattr(block.get_submodule(owner), own, nn.Parameter(tensor, requires_grad=False))
