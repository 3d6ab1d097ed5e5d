"""Stacked experts: three-dimensional parameters of which each slice is one expert's weight."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from apt.adapter.sites import Site


def expert_sites(path: str, experts: int, parameters: Sequence[str], order: int) -> list[Site]:
    """A site for each slice of stacked parameters, each with an input of its own.

    Args:
        path: the path of the module that holds them within the block.
        experts: how many there are.
        parameters: the parameters' names, in the order in which they are multiplied.
        order: the order of the first.
    """
    return [
        Site(
            f"{path}.{name}.{expert}", f"{path}.{name}", f"{name} of {expert}", order + place,
            expert=expert, routed=True,
        )
        for expert in range(experts)
        for place, name in enumerate(parameters)
    ]  # fmt: skip


@contextmanager
def one_by_one(experts: nn.Module | None) -> Iterator[None]:
    """Multiply expert by expert: grouped kernels take all slices at once, where no tap sees them.

    Args:
        experts: the module that holds them, as transformers 5 has it; None does nothing.
    """
    if experts is None:
        yield
        return
    config: Any = experts.config
    before = config._experts_implementation
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = before
