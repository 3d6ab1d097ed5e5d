"""The last weights of kept experts, solved to compensate for removed experts."""

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
    """The outputs of the dense experts on one batch.

    Attributes:
        total: the sum (tokens, hidden) of the outputs, in fp32.
        scale: the root mean square of each token (tokens, 1) on the stream after the dense block.
    """

    batch: Batch
    total: Tensor
    scale: Tensor


@dataclass
class _Expert:
    """A kept expert.

    Attributes:
        site: the site of its last weight.
        dense: its last weight (out, in) before the solve, in fp32.
        tokens: the indices of its tokens among all tokens.
        rows: its inputs (tokens, in) times the weight of the router, divided by the scale.
        gram: the Gram matrix of ``rows`` over all ranks.
        change: the change of ``dense`` (out, in).
    """

    site: Site
    dense: Tensor
    tokens: Tensor
    rows: Tensor
    gram: Gram
    change: Tensor


def dense_outputs(block: OpenBlock, groups: Groups) -> list[DenseOutputs]:
    """The outputs of the experts of a dense block, on as many batches as fit into memory."""
    experts: Any = block.module.get_submodule(owner_of(groups))
    weights_per_expert = max(p.numel() for p in experts.parameters()) // groups.count
    outputs, values, totals = list[DenseOutputs](), 0, list[Tensor]()

    def record(module: Any, args: Any, output: Tensor) -> None:
        totals.append(output.detach().reshape(-1, output.shape[-1]).float())

    handle = experts.register_forward_hook(record)
    try:
        for batch in block.batches:
            recorded = list[Routing]()
            with routings(experts, recorded.append):
                state = block.step(batch, batch.state)
            scale = mean_squares(stream_rows(block.adapter, state)).sqrt()
            outputs.append(DenseOutputs(batch, totals.pop(), scale))
            block.progress()
            width = outputs[-1].total.shape[1]
            values += batch.tokens * (
                width + recorded[0].index.shape[1] * weights_per_expert // width
            )
            if values > _VALUES:
                break
    finally:
        handle.remove()
    return outputs


@full_precision()
def compensate(
    block: OpenBlock,
    groups: Groups,
    kept: Collection[int],
    targets: list[DenseOutputs],
    damping: float | None,
) -> None:
    """Solve the last weights of the kept experts for the outputs of all dense experts.

    The loss is ``Σ_t ‖d_t − Σ_e g_te (V_e h_te + b_e)‖² / s_t²``, with ``d_t`` the sum of the dense
    experts for a token and ``s_t`` its size on the stream. ``g_te`` and ``h_te`` are the weight and
    the input of the last weight ``V_e`` of a kept expert, with a router that chooses among kept
    experts. The weights are solved in turn, each given the other weights, in a few sweeps. Damping
    draws each weight towards its dense value.

    Args:
        block: the block; its router chooses kept experts only.
        groups: all experts of the block.
        kept: the indices of the kept experts.
        targets: the outputs of the dense experts.
        damping: see `Gram.damped`.
    """
    experts, residuals = _kept_experts(block, groups, kept, targets)
    for expert in experts:
        residuals[expert.tokens] -= expert.rows @ expert.dense.T
    mean = mean_square(expert.gram for expert in experts)
    for _ in range(_SWEEPS):
        for expert in experts:
            gram = expert.gram.with_missing_tokens(mean)
            residual = residuals[expert.tokens] + expert.rows @ expert.change.T
            cross = residual.T @ expert.rows
            block.ranks.add(cross)
            expert.change = gram.damped(damping).solve(cross / gram.tokens)
            residuals[expert.tokens] = residual - expert.rows @ expert.change.T
    for expert in experts:
        weight = expert.site.oriented(expert.site.weight(block.module).data)
        weight.copy_(expert.dense + expert.change)


def _kept_experts(
    block: OpenBlock, groups: Groups, kept: Collection[int], targets: list[DenseOutputs]
) -> tuple[list[_Expert], Tensor]:
    """The kept experts, and the targets divided by their scales, without the experts' biases."""
    outputs = {part.parameter for part in groups.outputs}
    sites = [s for s in block.adapter.sites(block.module) if s.parameter in outputs]
    sites = [site for site in sites if site.expert in kept]
    tensors = tensors_of(block.module)
    biases = [tensors[path].float() for path in sorted(outputs) if tensors[path].ndim == 2]
    tokens: dict[Site, list[Tensor]] = {site: [] for site in sites}
    rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
    residuals, start = list[Tensor](), 0
    for target in targets:
        residual = target.total / target.scale
        routing, inputs = _inputs(block, groups, sites, target.batch)
        for site in sites:
            assert site.expert is not None
            expert_tokens, weights = routing.tokens_of(site.expert)
            factor = weights.float().unsqueeze(1) / target.scale[expert_tokens]
            for bias in biases:
                residual[expert_tokens] -= factor * bias[site.expert]
            tokens[site].append(expert_tokens + start)
            rows[site].append(inputs[site].float() * factor)
        residuals.append(residual)
        start += len(residual)
    return [_expert(block, site, tokens[site], rows[site]) for site in sites], torch.cat(residuals)


def _inputs(
    block: OpenBlock, groups: Groups, sites: list[Site], batch: Batch
) -> tuple[Routing, dict[Site, Tensor]]:
    """The routing of a batch, and the inputs (tokens, in) of the last weights of experts."""
    recorded, owner = list[Routing](), block.module.get_submodule(owner_of(groups))
    weights = {site: site.oriented(site.weight(block.module).data) for site in sites}
    inputs = {site: weight.new_zeros(0, weight.shape[1]) for site, weight in weights.items()}

    def add(site: Site, rows: Tensor) -> None:
        inputs[site] = torch.cat([inputs[site], rows.reshape(-1, rows.shape[-1])])

    with block.adapter.capture(block.module, sites, add), routings(owner, recorded.append):
        block.step(batch, batch.state)
    block.progress()
    return recorded[-1], inputs


def _expert(block: OpenBlock, site: Site, tokens: list[Tensor], rows: list[Tensor]) -> _Expert:
    """A kept expert, with its tokens of all batches."""
    dense = site.oriented(site.weight(block.module).data).float()
    inputs, gram = torch.cat(rows), Gram(dense.shape[1], dense.device)
    gram.add(inputs)
    if block.ranks.size > 1:
        gram.add_up(block.ranks.add, round(block.ranks.sum(gram.tokens)))
    return _Expert(site, dense, torch.cat(tokens), inputs, gram, torch.zeros_like(dense))
