"""The plan of a dry run with the sparsities that its allocation chooses."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from apt.checkpoints.load import load
from apt.checkpoints.offload import StoredBlocks, assemble
from apt.checkpoints.stored import open_stored
from apt.planning.allocation import Opened, Unallocated, with_shares
from apt.planning.plan import Plan
from apt.runs.machine import read_dtype
from apt.runs.prepare import Prepared
from apt.runs.prune_model import named_allocation
from apt.runs.text import read_text


def planned_levels(prepared: Prepared, status: Callable[[str], None]) -> Plan:
    """The plan of a run; for an allocation, the text and the model are read.

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
    model, opened = (_on_disk if prepared.options.stream else _in_memory)(prepared)
    text.check(model, shell.source.reference)
    status(f"distributing the sparsity ({name})")
    aware = prepared.recipe.targets is not None
    given = Unallocated(model, shell.adapter, plan, text.tokens, opened, aware)
    return with_shares(plan, name, allocation(given))


def _in_memory(prepared: Prepared) -> tuple[nn.Module, Opened]:
    """The model, and the function that opens a block: they are all open."""
    shell, dtype = prepared.shell, read_dtype(prepared.options.dtype)
    model = load(shell, dtype or shell.dtype, prepared.device).module
    return model, lambda name, block: nullcontext()


def _on_disk(prepared: Prepared) -> tuple[nn.Module, Opened]:
    """The model without the weights of its blocks, and the function that opens a block."""
    shell = prepared.shell
    stored = open_stored(shell)
    dtype = stored.dtype(shell, prepared.plan)
    parts = stored.shards, stored.layout
    model: Any = assemble(shell, *parts, prepared.device, dtype)
    blocks = dict(shell.adapter.blocks(model))
    source = StoredBlocks(*parts, blocks, prepared.device, dtype)

    def opened(name: str, block: nn.Module) -> AbstractContextManager[Any]:
        return source.open(name)

    return model, opened
