"""The weights of the experts that are left: they make up for those that are removed."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apt.adapter import Groups, Routing, Site, routings
from apt.adapter.groups import tensors_of
from apt.calibration.batches import Batch, OpenBlock
from apt.calibration.dense_activations import mean_squares, stream_rows
from apt.pruning.layer import mean_square
from apt.pruning.routed_experts import owner_of
from apt.solver import Gram
from apt.solver.precision import full_precision

_SWEEPS = 3
_VALUES = 2**29  # elements of the experts' outputs and of the inputs of their last weights: 2 GiB


@dataclass(frozen=True)
class DenseOutputs:
    """The sum of the dense experts' outputs on one batch.

    Attributes:
        total: this sum (tokens, hidden), in fp32.
        scale: the root mean square of each token (tokens, 1) on the stream after the dense block.
    """

    batch: Batch
    total: Tensor
    scale: Tensor


@dataclass
class _Expert:
    """An expert that is left.

    Attributes:
        site: its last weight.
        dense: this weight (out, in) before it is solved, in fp32.
        tokens: the indices of its tokens among all.
        rows: the inputs (tokens, in) of the weight times the weight of the router, over the scale.
        gram: their Gram matrix over all ranks.
        change: what is added to ``dense``.
    """

    site: Site
    dense: Tensor
    tokens: Tensor
    rows: Tensor
    gram: Gram
    change: Tensor


def dense_outputs(block: OpenBlock, groups: Groups) -> list[DenseOutputs]:
    """The outputs of the experts of a block that is still dense, on as many batches as fit."""
    experts: Any = block.module.get_submodule(owner_of(groups))
    inside = max(p.numel() for p in experts.parameters()) // groups.count
    found, values, totals = list[DenseOutputs](), 0, list[Tensor]()

    def keep(module: Any, args: Any, output: Tensor) -> None:
        totals.append(output.detach().reshape(-1, output.shape[-1]).float())

    handle = experts.register_forward_hook(keep)
    try:
        for batch in block.batches:
            picked = list[Routing]()
            with routings(experts, picked.append):
                after = block.step(batch, batch.state)
            scale = mean_squares(stream_rows(block.adapter, after)).sqrt()
            found.append(DenseOutputs(batch, totals.pop(), scale))
            block.progress()
            width = found[-1].total.shape[1]
            values += batch.tokens * (width + picked[0].index.shape[1] * inside // width)
            if values > _VALUES:
                break
    finally:
        handle.remove()
    return found


@full_precision()
def compensate(
    block: OpenBlock,
    groups: Groups,
    kept: Collection[int],
    targets: list[DenseOutputs],
    damping: float | None,
) -> None:
    """Solve the last weights of the experts that are left for the outputs of all dense experts.

    The loss is ``Σ_t ‖d_t − Σ_e g_te (V_e h_te + b_e)‖² / s_t²``, with ``d_t`` the sum of the dense
    experts for a token and ``s_t`` its size on the stream. ``g_te`` and ``h_te`` are the weight and
    the input of the last weight ``V_e`` of an expert that is left, with the router that chooses
    among these. The weights are solved in turn, given the others, in a few sweeps. Damping draws
    each towards the weight that it has.

    Args:
        block: the block; its router no longer chooses other experts.
        groups: all its experts.
        kept: the indices of the experts that are left.
        targets: the outputs of the dense experts.
        damping: see `Gram.damped`.
    """
    experts, rest = _experts_left(block, groups, kept, targets)
    for expert in experts:
        rest[expert.tokens] -= expert.rows @ expert.dense.T
    mean = mean_square(expert.gram for expert in experts)
    for _ in range(_SWEEPS):
        for expert in experts:
            gram = expert.gram.with_missing_tokens(mean)
            left = rest[expert.tokens] + expert.rows @ expert.change.T
            cross = left.T @ expert.rows
            block.ranks.add(cross)
            expert.change = gram.damped(damping).solve(cross / gram.tokens)
            rest[expert.tokens] = left - expert.rows @ expert.change.T
    for expert in experts:
        weight = expert.site.oriented(expert.site.weight(block.module).data)
        weight.copy_(expert.dense + expert.change)


def _experts_left(
    block: OpenBlock, groups: Groups, kept: Collection[int], targets: list[DenseOutputs]
) -> tuple[list[_Expert], Tensor]:
    """The experts that are left, and the targets over their scales without the experts' biases."""
    outputs = {part.parameter for part in groups.outputs}
    sites = [s for s in block.adapter.sites(block.module) if s.parameter in outputs]
    sites = [site for site in sites if site.expert in kept]
    tensors = tensors_of(block.module)
    biases = [tensors[path].float() for path in sorted(outputs) if tensors[path].ndim == 2]
    tokens: dict[Site, list[Tensor]] = {site: [] for site in sites}
    rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
    rest, start = list[Tensor](), 0
    for target in targets:
        left = target.total / target.scale
        routing, inputs = _inputs(block, groups, sites, target.batch)
        for site in sites:
            assert site.expert is not None
            own, weights = routing.tokens_of(site.expert)
            factor = weights.float().unsqueeze(1) / target.scale[own]
            for bias in biases:
                left[own] -= factor * bias[site.expert]
            tokens[site].append(own + start)
            rows[site].append(inputs[site].float() * factor)
        rest.append(left)
        start += len(left)
    return [_expert(block, site, tokens[site], rows[site]) for site in sites], torch.cat(rest)


def _inputs(
    block: OpenBlock, groups: Groups, sites: list[Site], batch: Batch
) -> tuple[Routing, dict[Site, Tensor]]:
    """The routing of a batch, and the inputs (tokens, in) of the last weights of experts."""
    found, owner = list[Routing](), block.module.get_submodule(owner_of(groups))
    weights = {site: site.oriented(site.weight(block.module).data) for site in sites}
    inputs = {site: weight.new_zeros(0, weight.shape[1]) for site, weight in weights.items()}

    def take(site: Site, rows: Tensor) -> None:
        inputs[site] = torch.cat([inputs[site], rows.reshape(-1, rows.shape[-1])])

    with block.adapter.capture(block.module, sites, take), routings(owner, found.append):
        block.step(batch, batch.state)
    block.progress()
    return found[-1], inputs


def _expert(block: OpenBlock, site: Site, tokens: list[Tensor], rows: list[Tensor]) -> _Expert:
    """An expert that is left, with its tokens on all batches."""
    dense = site.oriented(site.weight(block.module).data).float()
    own, gram = torch.cat(rows), Gram(dense.shape[1], dense.device)
    gram.add(own)
    if block.ranks.size > 1:
        gram.add_up(block.ranks.add, round(block.ranks.sum(gram.tokens)))
    return _Expert(site, dense, torch.cat(tokens), own, gram, torch.zeros_like(dense))
