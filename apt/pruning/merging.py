"""The merging of experts: those that are removed are averaged into others that resemble them.

This follows REAM (arXiv 2604.04356) and HC-SMoE (arXiv 2410.08589). The neurons of an expert can be
permuted without a change of its output. So they are matched with those of the expert that they are
merged into, before the weights are averaged by the numbers of tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Groups
from apt.adapter.groups import tensors_of
from apt.pruning.routed_experts import RoutedExperts, owner_of


@torch.no_grad()
def merge_experts(
    block: nn.Module, adapter: Adapter, groups: Groups, experts: RoutedExperts, removed: Tensor
) -> tuple[tuple[int, int], ...]:
    """Average each removed expert into one of the others, in place.

    It is that with the most similar output on the removed expert's tokens. An expert without
    tokens is merged into none.

    Args:
        experts: the experts of the dense block, on calibration tokens.
        removed: True for the experts that are removed (experts,).

    Returns:
        The removed experts that were merged, each with the one that it became a part of.
    """
    kept = (~removed).nonzero().squeeze(1).tolist()
    weights = _Weights(block, adapter, groups)
    tokens = experts.sums(torch.ones_like(experts.routing.weights))
    clusters: dict[int, list[int]] = {expert: [expert] for expert in kept}
    for expert in (removed.cpu() & (tokens.cpu() > 0)).nonzero().squeeze(1).tolist():
        clusters[most_similar(experts, expert, kept)].append(expert)
    for first, members in clusters.items():
        if len(members) > 1:
            shares = tokens[members] / tokens[members].sum()
            weights.average(members, first, shares.tolist())
    return tuple(sorted((other, first) for first, m in clusters.items() for other in m[1:]))


def most_similar(experts: RoutedExperts, expert: int, others: Sequence[int]) -> int:
    """The expert of ``others`` whose output differs least on the tokens of ``expert``."""
    tokens, weights = experts.routing.tokens_of(expert)
    first = tokens < experts.few
    tokens, weights = tokens[first], weights[first]
    outputs = experts.outputs[:, tokens]
    size = (weights.float().square() / experts.sizes[tokens]).unsqueeze(1)
    losses = [((outputs[other] - outputs[expert]).square() * size).sum() for other in others]
    return others[int(experts.over_ranks(torch.stack(losses)).argmin())]


def matched(similarity: Tensor) -> Tensor:
    """A permutation (n,): the column that each row is matched with, the most similar pairs first.

    Args:
        similarity: the similarity (n, n) of each row to each column.
    """
    left, columns = similarity.clone(), torch.full((len(similarity),), -1, dtype=torch.long)
    while (columns < 0).any():  # each round matches the pairs that prefer each other
        best = left.argmax(1)
        mutual = (left.argmax(0)[best] == torch.arange(len(left), device=left.device)).cpu()
        rows = (mutual & (columns < 0)).nonzero().squeeze(1)
        columns[rows] = best.cpu()[rows]
        left[rows.to(left.device)] = -torch.inf
        left[:, best[rows.to(left.device)]] = -torch.inf
    return columns


class _Weights:
    """The weights of experts, as views whose first dimension are the neurons."""

    def __init__(self, block: nn.Module, adapter: Adapter, groups: Groups) -> None:
        owner, tensors = owner_of(groups), tensors_of(block)
        inside = [part.parameter for part in groups.parts if part.parameter.startswith(f"{owner}.")]
        self._tensors = {path: tensors[path].detach() for path in inside}
        first = [site for site in adapter.sites(block) if site.expert == 0]
        self._sites = {site.parameter: site for site in first if site.parameter in self._tensors}
        self._last = max(self._sites.values(), key=lambda site: site.order)
        self._neurons = self._last.oriented(self._last.weight(block)).shape[1]
        # gate and up are stored one after the other, or as pairs of rows
        self._concatenated: bool = getattr(block.get_submodule(owner), "is_concatenated", True)

    def average(self, members: Sequence[int], first: int, shares: Sequence[float]) -> None:
        """Set an expert to the mean of some, with their neurons in the order of its own."""
        orders = [self._order(member, first) for member in members]
        for path in self._tensors:
            parts = [self._view(path, member).float() for member in members]
            if not self._is_shared(path):
                parts = [part[order] for part, order in zip(parts, orders, strict=True)]
            scaled = [share * part for share, part in zip(shares, parts, strict=True)]
            self._view(path, first).copy_(torch.stack(scaled).sum(0))

    def _order(self, expert: int, first: int) -> Tensor:
        """The neurons of an expert that are matched with those of another, in their order."""
        similarity: Tensor | None = None
        for path in self._sites:
            own, other = (self._view(path, e).float().flatten(1) for e in (first, expert))
            each = nn.functional.normalize(own) @ nn.functional.normalize(other).T
            similarity = each if similarity is None else similarity + each
        assert similarity is not None
        return matched(similarity.nan_to_num())

    def _is_shared(self, path: str) -> bool:
        """True for the bias of the last weight, which has no entry of each neuron."""
        return path not in self._sites and path.startswith(self._last.parameter)

    def _view(self, path: str, expert: int) -> Tensor:
        """A tensor of an expert (neurons, …); as it is if it has no entry of each neuron."""
        values, site = self._tensors[path][expert], self._sites.get(path)
        if self._is_shared(path):
            return values
        values = values if site is None else site.oriented(values)
        if site == self._last:
            return values.T
        if self._concatenated:
            return torch.unflatten(values, 0, (-1, self._neurons)).transpose(0, 1)
        return torch.unflatten(values, 0, (self._neurons, -1))
