"""A check that a smaller model computes what the model computes that was fitted."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Unrouted
from apt.adapter.recording import eval_mode
from apt.compute import computing_in
from apt.errors import AptError
from apt.planning.plan import Plan
from apt.pruning.disconnecting import unrouted_experts
from apt.shrinking.skipping import skipping

_TOKENS = 64  # of one sample


@torch.no_grad()
def check_same_function(
    model: nn.Module,
    small: nn.Module,
    adapter: Adapter,
    plan: Plan,
    tokens: Tensor,
    compute: torch.dtype,
) -> None:
    """Raise if the smaller model gives other logits than the model that was fitted.

    Some families scale by the number of blocks, or by the position of a block, and a model without
    some blocks is then another function.

    Args:
        model: the model whose groups are disconnected; the dropped blocks are skipped.
        small: the model without these groups and blocks.
        tokens: token ids (samples, seqlen); if there are no samples, one token is repeated.
        compute: the dtype in which both are computed.

    Raises:
        AptError: the logits differ by more than rounding explains.
    """
    given = tokens if len(tokens) else tokens.new_ones(1, tokens.shape[1])
    few = given[:1, :_TOKENS].to(next(model.parameters()).device)
    with computing_in(model, compute), _fitted(model, adapter, plan):
        expected = _logits(model, few)
    with computing_in(small, compute), eval_mode(small), adapter.running(small):
        found = _logits(small, few)
    difference = float((found - expected).norm() / expected.norm())
    allowed = torch.finfo(compute).eps ** 0.5
    if not difference <= allowed:
        config: Any = small.config
        raise AptError(
            f"the smaller model is another function than the one that was fitted: its logits "
            f"differ by {difference:.2%}; {type(config).__name__} may scale by the number of "
            "blocks, or by their positions",
            "remove groups instead of blocks",
            ("width_only",),
        )


@contextmanager
def _fitted(model: nn.Module, adapter: Adapter, plan: Plan) -> Iterator[None]:
    """While entered, the model runs without what a plan removes."""
    modules, masks = dict(adapter.blocks(model)), dict[Tensor, Tensor]()
    for block in plan.blocks:
        masks |= unrouted_experts(modules[block.name], block.disconnected)
    with (
        eval_mode(model),
        adapter.running(model),
        skipping(model, adapter, plan.dropped),
        Unrouted(masks),
    ):
        yield


def _logits(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits.float()
