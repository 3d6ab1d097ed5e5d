"""The plan of a dry run with the sparsities that its allocation chooses."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from apt.checkpoints.load import load
from apt.checkpoints.offload import StoredBlocks, assemble
from apt.checkpoints.stored import open_stored
from apt.distributed.ranks import Ranks
from apt.engine.machine import read_dtype
from apt.engine.prepare import Prepared
from apt.engine.prune_model import named_allocation
from apt.engine.run import job_of
from apt.engine.text import read_text
from apt.planning.allocation import Opened, Unallocated, allocated, with_shares
from apt.planning.plan import Plan


def planned_levels(prepared: Prepared, status: Callable[[str], None]) -> Plan:
    """The plan of a run; for an allocation, the text and the model are read as in the run.

    Args:
        prepared: the checked run.
        status: called with a text for each step.
    """
    plan, shell = prepared.plan, prepared.shell
    if prepared.structure is not None:
        return plan
    named = named_allocation(prepared.options.allocation, plan, prepared.registry)
    if named is None:
        return plan
    name, allocation = named
    status("reading text")
    text = read_text(prepared)
    status("loading the model")
    model, opened, readable = (_on_disk if prepared.options.stream else _in_memory)(prepared)
    text.check(model, shell.source.reference)
    if prepared.augmentation.own_samples:
        status("generating calibration text")
    with readable:
        tokens = job_of(prepared, text).with_own_text(model, text.tokens, Ranks())
    status(f"distributing the sparsity ({name})")
    aware = prepared.recipe.targets is not None
    given = Unallocated(model, shell.adapter, plan, tokens, opened, aware)
    return with_shares(plan, name, allocated(name, allocation, given))


_Parts = tuple[nn.Module, Opened, AbstractContextManager[None]]


def _in_memory(prepared: Prepared) -> _Parts:
    """The model, the function that opens a block, and a context in which the model can run."""
    shell, dtype = prepared.shell, read_dtype(prepared.options.dtype)
    model = load(shell, dtype or shell.dtype, prepared.device).module
    return model, lambda name, block: nullcontext(), nullcontext()


def _on_disk(prepared: Prepared) -> _Parts:
    """The same for a model whose blocks are on disk."""
    shell = prepared.shell
    stored = open_stored(shell)
    dtype = stored.dtype(shell, prepared.plan)
    parts = stored.shards, stored.layout
    model: Any = assemble(shell, *parts, prepared.device, dtype)
    blocks = dict(shell.adapter.blocks(model))
    source = StoredBlocks(*parts, blocks, prepared.device, dtype)

    def opened(name: str, block: nn.Module) -> AbstractContextManager[Any]:
        return source.open(name)

    return model, opened, source.read_on_call()
