"""Baselines for the choice of groups: scores of columns, FLAP, and LLM-Pruner."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Groups, Site
from apt.adapter.groups import entries_of
from apt.extending import enter, eval_mode
from apt.solver import ColumnGroups, Gram, SolverOptions

Scores = dict[str, dict[str, Tensor]]

_SAMPLES = 10  # for gradients, as in the code of LLM-Pruner
# Factors of the powers of a weight in the expansion of the loss, see `_salience`.
_FIRST = {1: 1.0}
_SECOND = {2: 1.0}
_MIX = {1: 1.0, 2: -0.5}


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
    is left out. Groups that no weight reads, such as experts, have no score.
    """
    scores: Scores = {}
    with eval_mode(model), adapter.running(model):
        batches = enter(adapter, model, tokens)
        for index, (name, block) in enumerate(adapter.blocks(model)):
            block_groups, moments = _groups(model, adapter, block), _Moments()
            read = {reader for groups in block_groups for reader in groups.readers}
            sites = {site.name: site for site in adapter.sites(block) if site.name in read}
            with adapter.capture(block, list(sites.values()), moments.add):
                for batch in batches:
                    batch.state = adapter.step(block, batch.state, batch.calls[index])
            reader_scores = {
                reader: _squared(block, site) * moments.variance(site)
                for reader, site in sites.items()
            }
            scores[name] = {
                groups.kind: _by_group(
                    torch.stack([reader_scores[r] for r in groups.readers]).sum(0), groups.count
                )
                for groups in block_groups
                if groups.readers and not groups.apart
            } | {
                r: reader_scores[r]
                for groups in block_groups
                if groups.apart
                for r in groups.readers
            }
    return scores


def llm_pruner(model: nn.Module, adapter: Adapter, tokens: Tensor) -> Scores:
    """``Σ |w g|`` over the weights of a group (LLM-Pruner, arXiv 2305.11627, eq. 5, first order).

    ``g`` is the gradient of the mean loss of a few samples: ``w g`` is the change of the loss
    without the weight.
    """
    return _taylor(model, adapter, tokens, _FIRST)


def llm_pruner_vector(model: nn.Module, adapter: Adapter, tokens: Tensor) -> Scores:
    """``Σ |Σ w g|``: the inner sum is over one row or column of one weight of the group.

    This is the importance of vectors in the code of LLM-Pruner (arXiv 2305.11627, eq. 4).
    """
    return _taylor(model, adapter, tokens, _FIRST, by_vector=True)


def llm_pruner_second(model: nn.Module, adapter: Adapter, tokens: Tensor) -> Scores:
    """``Σ w² h`` over the weights of a group: LLM-Pruner's ``param_second``.

    ``h`` is the mean over the samples of the squared gradient, which stands for the Hessian.
    """
    return _taylor(model, adapter, tokens, _SECOND)


def llm_pruner_mix(model: nn.Module, adapter: Adapter, tokens: Tensor) -> Scores:
    """``Σ |w g − w² h / 2|`` over the weights of a group (arXiv 2305.11627, eq. 5)."""
    return _taylor(model, adapter, tokens, _MIX)


def _taylor(
    model: nn.Module,
    adapter: Adapter,
    tokens: Tensor,
    factors: Mapping[int, float],
    *,
    by_vector: bool = False,
) -> Scores:
    """The sums of `_salience` over groups, as magnitudes of elements or of rows and columns."""
    salience = _salience(model, adapter, tokens[:_SAMPLES], factors)
    scores: Scores = defaultdict(dict)
    for name, block in adapter.blocks(model):
        for groups in _groups(model, adapter, block):
            if groups.apart:
                block_salience = {p: salience[f"{name}.{p}"] for p, _ in block.named_parameters()}
                for site in (site for site in adapter.sites(block) if site.name in groups.readers):
                    columns = torch.zeros(groups.columns_of(site.name))
                    for _, entry in entries_of(block_salience, groups, site):
                        vectors = entry.reshape(*entry.shape[:2], -1)
                        columns += _magnitude(vectors, by_vector=by_vector).sum(1).cpu()
                    scores[name][site.name] = columns
                continue
            total = torch.zeros(groups.count)
            for part in groups.parts:
                entries = salience[f"{name}.{part.parameter}"].movedim(part.dim, 0)
                vectors = entries.reshape(len(entries), -1)  # of a bias, single values
                sums = _magnitude(vectors, by_vector=by_vector)
                part_sums = sums[part.start : part.start + groups.count * part.each]
                total += _by_group(part_sums, groups.count).cpu()
            scores[name][groups.kind] = total
    return dict(scores)


def _magnitude(vectors: Tensor, *, by_vector: bool) -> Tensor:
    """The magnitude of the sum of each vector, or the sum of the magnitudes of its values."""
    return vectors.sum(-1).abs() if by_vector else vectors.abs().sum(-1)


@torch.enable_grad()
def _salience(
    model: nn.Module, adapter: Adapter, tokens: Tensor, factors: Mapping[int, float]
) -> dict[str, Tensor]:
    """``Σ_k factor_k w^k · mean(g^k)`` for the parameters of all blocks, by the powers ``k``.

    The means are over the samples, and ``g`` is the gradient of the loss of one sample.
    """
    parameters = {
        f"{name}.{path}": parameter
        for name, block in adapter.blocks(model)
        for path, parameter in block.named_parameters()
    }
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    means = {
        power: {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        for power in factors
    }
    with eval_mode(model), adapter.running(model):
        try:
            for parameter in parameters.values():
                parameter.requires_grad_()
            for sample in torch.split(tokens, 1):
                loss = _loss(model, sample)  # an expert without tokens has no gradient
                gradients = torch.autograd.grad(
                    loss, list(parameters.values()), materialize_grads=True
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    for power, mean in means.items():
                        mean[name] += gradient.float() ** power / len(tokens)
        finally:
            for name, parameter in parameters.items():
                parameter.requires_grad_(before[name])
    return {
        name: torch.stack([
            factor * parameter.detach().float() ** power * means[power][name]
            for power, factor in factors.items()
        ]).sum(0)
        for name, parameter in parameters.items()
    }  # fmt: skip


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
        unseen = (1, torch.zeros(()), torch.zeros(()))  # an expert without tokens
        count, first, second = self._sums.get(site, unseen)
        return (second / count - (first / count).square()).clamp_min(0).float()


def _groups(model: nn.Module, adapter: Adapter, block: nn.Module) -> list[Groups]:
    return adapter.groups(block, model.config)


def _squared(block: nn.Module, site: Site) -> Tensor:
    """The squared norms of the columns of a site's weight."""
    return site.oriented(site.weight(block)).float().square().sum(0)


def _by_group(values: Tensor, count: int) -> Tensor:
    """The sums (count,) of consecutive values."""
    return values.view(count, -1).sum(1)
