"""A check that a smaller model and the fitted model compute the same function."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, ModelInputs, Samples, Unrouted
from apt.adapter.recording import eval_mode
from apt.adapter.samples import on_device
from apt.compute import computing_in
from apt.errors import AptError
from apt.planning.plan import Plan
from apt.pruning.disconnecting import unrouted_experts
from apt.shrinking.skipping import skipping
from apt.text.language_model import language_model

_TOKENS = 64  # of one sample


@torch.no_grad()
def check_same_function(
    model: nn.Module,
    small: nn.Module,
    adapter: Adapter,
    plan: Plan,
    tokens: Tensor | Samples,
    compute: torch.dtype,
) -> None:
    """Raise if the smaller model gives other logits than the fitted model.

    Some families scale by the number of blocks, or by the position of a block. In these families, a
    model without some blocks is another function.

    Args:
        model: the fitted model; its groups are disconnected, and its dropped blocks are skipped.
        small: the model without these groups and blocks.
        tokens: token ids (samples, seqlen), or other samples; if there are no samples, one token
            is repeated.
        compute: the dtype in which both are computed.

    Raises:
        AptError: the logits differ by more than rounding explains.
    """
    sample = on_device(_first_sample(tokens), next(model.parameters()).device)
    with computing_in(model, compute), _without_removed(model, adapter, plan):
        expected = _outputs(model, sample)
    with computing_in(small, compute), eval_mode(small), adapter.running(small):
        actual = _outputs(small, sample)
    difference = float((actual - expected).norm() / expected.norm())
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
def _without_removed(model: nn.Module, adapter: Adapter, plan: Plan) -> Iterator[None]:
    """Inside the context, the model runs without the groups and blocks that the plan removes."""
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


def _first_sample(tokens: Tensor | Samples) -> ModelInputs:
    """The first sample, of at most `_TOKENS` tokens if it is a window of text."""
    if isinstance(tokens, Samples):
        return {name: tensor.unsqueeze(0) for name, tensor in tokens[0].items()}
    samples = tokens if len(tokens) else tokens.new_ones(1, tokens.shape[1])
    return samples[:1, :_TOKENS]


def _outputs(model: Any, inputs: ModelInputs) -> Tensor:
    """The logits of a decoder of text, or the first output of another model."""
    if isinstance(inputs, Tensor):
        logits: Tensor = language_model(model)(inputs, use_cache=False).logits
        return logits.float()
    first: Tensor = model(**inputs)[0]
    return first.float()
