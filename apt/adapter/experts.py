"""Stacked experts: three-dimensional parameters whose slices are the weights of the experts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from apt.adapter.groups import Groups, Part
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


def expert_groups(
    path: str, router: str, experts: int, parameters: Sequence[str], field: str, least: int
) -> Groups:
    """The experts of a block, as groups.

    Args:
        path: the path within the block of the module that owns the stacked parameters.
        router: the path of the router's weight (experts, hidden).
        experts: the number of experts.
        parameters: the parameters' names, the last of which produces the output.
        field: the configuration's number of experts.
        least: the number of experts that a token is sent to.
    """
    stacked = [Part(f"{path}.{name}") for name in parameters]
    return Groups(
        "experts",
        experts,
        (),
        (*stacked, Part(router)),
        {field: int},
        least=least,
        outputs=(stacked[-1],),
        routed=True,
    )


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
