"""The check for sparsities so small that they round to no weight."""

from collections.abc import Callable

from apt.errors import AptError
from apt.planning.plan import Plan, removed_by


def check_rounding(plan: Plan, notice: Callable[[str], None] = lambda line: None) -> None:
    """Raise if a plan prunes no weight; ``notice`` gets a line about sites that lose none."""
    pruned = [site for block in plan.blocks for site in block.pruned]
    whole = [site for site in pruned if not removed_by(site.pattern, site.shape)]
    if not whole:
        return
    first = whole[0]
    row = getattr(first.pattern, "per", None) == "row"
    count = f"{first.shape[1]:,} in each row" if row else f"{first.size:,}"
    said = f"{first.pattern} of the weights of {first.name} ({count}) rounds to none"
    if len(whole) == len(pruned) and not any(block.extras for block in plan.blocks):
        raise AptError(f"nothing would be pruned: {said}", "give a larger sparsity", ("sparsity",))
    notice(f"{len(whole)} of {len(pruned)} sites lose no weight: {said}")
