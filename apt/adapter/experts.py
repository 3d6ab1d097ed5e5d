"""Stacked experts: three-dimensional parameters whose slices are the weights of the experts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from apt.adapter.sites import Site


def expert_sites(path: str, experts: int, parameters: Sequence[str], order: int) -> list[Site]:
    """A site for each slice of stacked parameters, each with an input of its own.

    Args:
        path: the path within the block of the module that owns the parameters.
        experts: the number of experts.
        parameters: the parameters' names, in the order in which they are multiplied.
        order: the order of the first parameter's sites.
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
    """Inside the context, multiply expert by expert.

    Grouped kernels multiply all slices in one call, which the weight tap cannot observe.

    Args:
        experts: the module of the experts, as in transformers 5; None has no effect.
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
