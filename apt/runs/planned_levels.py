"""The plan of a dry run with the sparsities that its allocation chooses."""

from collections.abc import Callable

from apt.checkpoints.load import load
from apt.planning.allocation import Unallocated, with_shares
from apt.planning.plan import Plan
from apt.runs.prepare import Prepared
from apt.runs.prune_model import named_allocation
from apt.runs.text import read_text


def planned_levels(prepared: Prepared, status: Callable[[str], None]) -> Plan:
    """The plan of a run; for an allocation, the text and the model are loaded.

    The model of a streamed run is not loaded, and its patterns are not final.

    Args:
        prepared: the checked run.
        status: called with a text for each step.
    """
    plan, shell = prepared.plan, prepared.shell
    if prepared.structure is not None or prepared.options.stream:
        return plan
    named = named_allocation(prepared.options.allocation, plan, prepared.registry)
    if named is None:
        return plan
    name, allocation = named
    status("reading text")
    text = read_text(prepared)
    status("loading the model")
    model = load(shell, shell.dtype, prepared.device).module
    text.check(model, shell.source.reference)
    status(f"distributing the sparsity ({name})")
    aware = prepared.recipe.targets is not None
    given = Unallocated(model, shell.adapter, plan, text.tokens, error_aware=aware)
    return with_shares(plan, name, allocation(given))
