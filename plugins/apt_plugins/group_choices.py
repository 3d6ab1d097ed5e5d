"""Baselines for the choice of groups: scores of columns, FLAP, and LLM-Pruner."""

from collections import defaultdict
from typing import Literal

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Groups, Site
from apt.adapter.eval_mode import eval_mode
from apt.calibration.batches import enter
from apt.solver import ColumnGroups, Gram, SolverOptions

Scores = dict[str, dict[str, Tensor]]

_SAMPLES = 10  # for gradients, as in the code of LLM-Pruner


def magnitude(weight: Tensor, gram: Gram, groups: ColumnGroups, options: SolverOptions) -> Tensor:
    """The groups of the smallest ``Σ w²``."""
    return groups.lowest(_by_group(weight.square().sum(0), groups.count))


def wanda(weight: Tensor, gram: Gram, groups: ColumnGroups, options: SolverOptions) -> Tensor:
    """The groups of the smallest ``Σ_j ‖w_j‖² ‖x_j‖²``: Wanda's score, squared and added up."""
    squares = gram.matrix.diagonal() / gram.tokens
    return groups.lowest(_by_group(weight.square().sum(0) * squares, groups.count))


@torch.no_grad()
def flap(model: nn.Module, adapter: Adapter, tokens: Tensor) -> Scores:
    """``Σ_j ‖w_j‖² Var(x_j)`` of each group: the fluctuation of FLAP (arXiv 2312.11983, eq. 5).

    FLAP adds the mean of the removed products to a bias. Most models have none there, so this part
    is left out.
    """
    scores: Scores = {}
    with eval_mode(model), adapter.running(model):
        batches = enter(adapter, model, tokens)
        for index, (name, block) in enumerate(adapter.blocks(model)):
            found, moments = _groups(model, adapter, block), _Moments()
            read = {reader for groups in found for reader in groups.readers}
            sites = {site.name: site for site in adapter.sites(block) if site.name in read}
            with adapter.capture(block, list(sites.values()), moments.add):
                for batch in batches:
                    batch.state = adapter.step(block, batch.state, batch.calls[index])
            varied = {
                reader: _squared(block, site) * moments.variance(site)
                for reader, site in sites.items()
            }
            scores[name] = {
                groups.kind: _by_group(
                    torch.stack([varied[r] for r in groups.readers]).sum(0), groups.count
                )
                for groups in found
            }
    return scores


def llm_pruner(model: nn.Module, adapter: Adapter, tokens: Tensor) -> Scores:
    """``Σ |w ∂L/∂w|`` over the weights of a group (LLM-Pruner, arXiv 2305.11627, eq. 5)."""
    return _taylor(model, adapter, tokens, "elements")


def llm_pruner_vector(model: nn.Module, adapter: Adapter, tokens: Tensor) -> Scores:
    """``|Σ w ∂L/∂w|``, LLM-Pruner's importance of a whole group (arXiv 2305.11627, eq. 4)."""
    return _taylor(model, adapter, tokens, "vector")


def _taylor(
    model: nn.Module, adapter: Adapter, tokens: Tensor, of: Literal["elements", "vector"]
) -> Scores:
    """The first-order change of the loss, from one gradient of the mean loss of a few samples."""
    products = _products(model, adapter, tokens[:_SAMPLES])
    scores: Scores = defaultdict(dict)
    for name, block in adapter.blocks(model):
        for groups in _groups(model, adapter, block):
            parts = []
            for part in groups.parts:
                product = products[f"{name}.{part.parameter}"]
                product = product.abs() if of == "elements" else product
                rows = product.movedim(part.dim, 0).flatten(1).sum(1)
                own = rows[part.start : part.start + groups.count * part.each]
                parts.append(_by_group(own, groups.count))
            scores[name][groups.kind] = torch.stack(parts).sum(0).abs()
    return dict(scores)


@torch.enable_grad()
def _products(model: nn.Module, adapter: Adapter, tokens: Tensor) -> dict[str, Tensor]:
    """``w ∂L/∂w`` for the parameters of all blocks."""
    owned = {
        f"{name}.{path}": parameter
        for name, block in adapter.blocks(model)
        for path, parameter in block.named_parameters()
    }
    before = {name: parameter.requires_grad for name, parameter in owned.items()}
    gradients = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in owned.items()}
    with eval_mode(model), adapter.running(model):
        try:
            for parameter in owned.values():
                parameter.requires_grad_()
            for sample in torch.split(tokens, 1):
                found = torch.autograd.grad(_loss(model, sample), list(owned.values()))
                for total, gradient in zip(gradients.values(), found, strict=True):
                    total += gradient.float() / len(tokens)
        finally:
            for name, parameter in owned.items():
                parameter.requires_grad_(before[name])
    return {name: gradient * owned[name].detach().float() for name, gradient in gradients.items()}


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean loss of the next token."""
    tokens = tokens.to(next(model.parameters()).device)
    logits = model(tokens).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class _Moments:
    """Sums of the inputs of sites, for their variances."""

    def __init__(self) -> None:
        self._sums: dict[Site, tuple[int, Tensor, Tensor]] = {}

    def add(self, site: Site, inputs: Tensor) -> None:
        """Add the inputs (..., in) of a site."""
        rows = inputs.reshape(-1, inputs.shape[-1]).double()
        count, first, second = self._sums.get(site, (0, rows.new_zeros(()), rows.new_zeros(())))
        self._sums[site] = (
            count + len(rows), first + rows.sum(0), second + rows.square().sum(0),
        )  # fmt: skip

    def variance(self, site: Site) -> Tensor:
        """The variance of each input (in,)."""
        count, first, second = self._sums[site]
        return (second / count - (first / count).square()).clamp_min(0).float()


def _groups(model: nn.Module, adapter: Adapter, block: nn.Module) -> list[Groups]:
    return adapter.groups(block, model.config)


def _squared(block: nn.Module, site: Site) -> Tensor:
    """The squared norms of the columns of a site's weight."""
    return site.oriented(site.weight(block)).float().square().sum(0)


def _by_group(values: Tensor, count: int) -> Tensor:
    """The sums (count,) of consecutive values."""
    return values.view(count, -1).sum(1)
