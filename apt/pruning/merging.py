"""The merging of experts: removed experts are averaged into similar kept experts.

This follows REAM (arXiv 2604.04356) and HC-SMoE (arXiv 2410.08589). The neurons of an expert can be
permuted without a change of its output. So before the merge, they are matched with the neurons of
the kept expert. The weights are averaged by the numbers of tokens.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Groups, Part
from apt.adapter.expert_channels import expert_channels, neurons
from apt.adapter.groups import entries_of, tensors_of
from apt.errors import AptError
from apt.pruning.routed_experts import RoutedExperts, owner_of


@torch.no_grad()
def merge_experts(
    block: nn.Module, adapter: Adapter, groups: Groups, experts: RoutedExperts, removed: Tensor
) -> tuple[tuple[int, int], ...]:
    """Average each removed expert into a kept expert, in place.

    The kept expert is the one with the most similar output on the tokens of the removed expert. A
    removed expert without tokens is not merged.

    Args:
        experts: the experts of the dense block, on calibration tokens.
        removed: True for the experts that are removed (experts,).

    Returns:
        The pairs of a removed expert and the kept expert that it was merged into.
    """
    kept = (~removed).nonzero().squeeze(1).tolist()
    weights = _Weights(block, adapter, groups)
    tokens = experts.sums(torch.ones_like(experts.routing.weights))
    clusters: dict[int, list[int]] = {expert: [expert] for expert in kept}
    for expert in (removed.cpu() & (tokens.cpu() > 0)).nonzero().squeeze(1).tolist():
        clusters[most_similar(experts, expert, kept)].append(expert)
    for members in clusters.values():
        if len(members) > 1:
            shares = tokens[members] / tokens[members].sum()
            weights.average(members, shares.tolist())
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
    """The weights of stacked experts, by the neurons that they belong to."""

    def __init__(self, block: nn.Module, adapter: Adapter, groups: Groups) -> None:
        owner, tensors = owner_of(groups), tensors_of(block)
        sites = [site for site in adapter.sites(block) if site.parameter.startswith(f"{owner}.")]
        channels = expert_channels(block, sites, ("", neurons(block, sites)), {})
        if channels is None:
            message = f"the weights in {owner} are stored in a way that is not known"
            raise AptError(message, "choose a method that does not merge", ("method",))
        self._channels, self._tensors = channels, tensors
        self._last = [site for site in sites if site.name in channels.readers]
        self._matrices = {site.parameter for site in sites}
        self._biases = [p.parameter for p in groups.outputs if p.parameter not in self._matrices]

    def average(self, members: Sequence[int], shares: Sequence[float]) -> None:
        """Set the first member to the mean of all, with its order of neurons."""
        orders = [self._order(members[0], member) for member in members]
        entries = [[values for _, values in self._entries(member)] for member in members]
        for parts in zip(*entries, strict=True):
            ordered = [values[order] for values, order in zip(parts, orders, strict=True)]
            parts[0].copy_(_mean(ordered, shares))
        for bias in (self._tensors[path].detach() for path in self._biases):
            bias[members[0]] = _mean([bias[member] for member in members], shares)

    def _order(self, first: int, expert: int) -> Tensor:
        """The neurons of ``expert``, in the order of the matched neurons of ``first``."""
        targets, matrices = self._matrices_of(first), self._matrices_of(expert)
        similarity = torch.stack([
            nn.functional.normalize(targets[path]) @ nn.functional.normalize(matrices[path]).T
            for path in targets
        ]).sum(0)  # fmt: skip
        return matched(similarity.nan_to_num())

    def _matrices_of(self, expert: int) -> dict[str, Tensor]:
        """The matrices (neurons, …) of an expert, by parameter."""
        parts_of = dict[str, list[Tensor]]()
        for part, values in self._entries(expert):
            if part.parameter in self._matrices:
                parts_of.setdefault(part.parameter, []).append(values.float().flatten(1))
        return {path: torch.cat(values, 1) for path, values in parts_of.items()}

    def _entries(self, expert: int) -> Iterator[tuple[Part, Tensor]]:
        """The parts of an expert, each with a view whose first dimension is the neurons."""
        return entries_of(self._tensors, self._channels, self._last[expert])


def _mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The mean of tensors, each with a weight."""
    return torch.stack([s * v.float() for s, v in zip(shares, values, strict=True)]).sum(0)
