"""``auto-search``: the sparsities of ``auto``, refined by evolutionary search (EvoPress).

A generation has several offspring of the best sparsities so far. Each offspring moves a step of
sparsity from one group of sites to another, so that the total does not change. The fitness is the
loss of the pruned model on calibration tokens. As in the paper, a first selection uses few tokens,
and a second selection, which includes the parent, uses more (arXiv 2410.14649, algorithm 1).

The paper stores every site, compensated at every level, in a database. Here a candidate needs only
scores: removed weights are not set to zero, but scaled by the root of the share of the loss that
compensation leaves. So the error of a site is as large as with exact weights.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apt import perplexity
from apt.adapter import Site
from apt.extending import PlannedSite, Unallocated, enter, eval_mode, unstructured
from apt_plugins.budget import auto
from apt_plugins.site_losses import LEVELS, losses_of, removed_at, site_grams

GENERATIONS = 20
OFFSPRING = 4
SURVIVORS = 1
FEW, MORE = 512, 2048  # tokens of the two selections
STEP = 0.02  # of the sparsity of a group of mean size
_GRAM_TOKENS = 4096
_LEAST, _MOST = 0.01, 0.99


@dataclass
class _Group:
    """The sites of one kind in a block, with the data for their pruning.

    Attributes:
        sites: the sites.
        weights: the dense weights (out, in), views of the model's weights.
        scales: the factor of each input in the scores ``(w · scale)²``.
        left: the share of the loss that exact weights leave, at each level of the sparsity.
    """

    sites: list[PlannedSite]
    weights: list[Tensor]
    scales: list[Tensor]
    left: Tensor

    @property
    def size(self) -> int:
        return sum(site.size for site in self.sites)

    def prune(self, dense: Sequence[Tensor], sparsity: float) -> None:
        """Scale the weights of the lowest scores."""
        kept = 1 - float(self.left[round(sparsity * LEVELS)].clamp(0, 1).sqrt())
        for site, weight, scale, weights_before in zip(
            self.sites, self.weights, self.scales, dense, strict=True
        ):
            mask = removed_at((weights_before.float() * scale).square(), site, sparsity)
            weight.copy_(torch.where(mask, weights_before * kept, weights_before))


@torch.no_grad()
def auto_search(given: Unallocated) -> dict[str, float]:
    """The sparsities of `auto`, refined by search; see the module's docstring."""
    start = auto(given)
    groups = _groups(given)
    levels = [start[group.sites[0].name] for group in groups]
    with _pruned(given, groups) as apply:
        best = _evolved(given, groups, levels, apply)
    return start | {
        site.name: level for group, level in zip(groups, best, strict=True) for site in group.sites
    }


def _groups(given: Unallocated) -> list[_Group]:
    """The groups of all blocks."""
    adapter, model, groups = given.adapter, given.model, list[_Group]()
    count = max(1, _GRAM_TOKENS // given.windows.shape[1])
    with eval_mode(model), adapter.running(model):
        batches = enter(adapter, model, given.windows[:count])
        for index, (planned, block) in enumerate(given.blocks()):
            with given.opened(planned.name, block):
                sites = unstructured(planned)
                grams = site_grams(adapter, block, index, [s.site for s in sites], batches)
                for members in _kinds(sites):
                    plain, losses = losses_of(block, members, grams)
                    groups.append(
                        _Group(
                            members,
                            [_weight(block, s.site) for s in members],
                            [grams[s.site].damped(0.05).balanced.scale.clone() for s in members],
                            losses / plain.clamp_min(1e-30),
                        )
                    )
    return groups


def _kinds(sites: Sequence[PlannedSite]) -> list[list[PlannedSite]]:
    kinds: dict[str, list[PlannedSite]] = {}
    for site in sites:
        kinds.setdefault(site.site.kind, []).append(site)
    return list(kinds.values())


def _weight(block: nn.Module, site: Site) -> Tensor:
    return site.oriented(site.weight(block).data)


@contextmanager
def _pruned(given: Unallocated, groups: Sequence[_Group]) -> Iterator["_Pruned"]:
    """Inside the context, candidates can be applied to the model; at the end it is dense again."""
    pruned_model = _Pruned(groups)
    with eval_mode(given.model), given.adapter.running(given.model):
        try:
            yield pruned_model
        finally:
            pruned_model.restore()


class _Pruned:
    """The model with the sparsities of a candidate."""

    def __init__(self, groups: Sequence[_Group]) -> None:
        self._groups = groups
        self._dense = [[weight.clone() for weight in group.weights] for group in groups]
        self._levels: list[float | None] = [None] * len(groups)

    def __call__(self, levels: Sequence[float]) -> None:
        """Prune the groups whose sparsity has changed."""
        for index, level in enumerate(levels):
            if self._levels[index] != level:
                self._groups[index].prune(self._dense[index], level)
                self._levels[index] = level

    def restore(self) -> None:
        """Make the model dense again."""
        for group, dense in zip(self._groups, self._dense, strict=True):
            for weight, original in zip(group.weights, dense, strict=True):
                weight.copy_(original)


def _evolved(
    given: Unallocated, groups: Sequence[_Group], levels: list[float], apply: _Pruned
) -> list[float]:
    """The best sparsities that the search finds."""
    draw, length = random.Random(0), given.windows.shape[1]
    selection_tokens, final_tokens = (
        given.windows[: max(1, count // length)] for count in (FEW, MORE)
    )

    def loss(candidate: Sequence[float], tokens: Tensor) -> float:
        apply(candidate)
        return float(perplexity(given.model, tokens))

    if len(groups) < 2:
        return levels
    best, lowest_loss = levels, loss(levels, final_tokens)
    for _ in range(GENERATIONS):
        offspring = [_moved(groups, best, draw) for _ in range(OFFSPRING)]
        first = sorted(
            (loss(child, selection_tokens), index) for index, child in enumerate(offspring)
        )
        for _, index in first[:SURVIVORS]:
            child_loss = loss(offspring[index], final_tokens)
            if child_loss < lowest_loss:
                best, lowest_loss = offspring[index], child_loss
    return best


def _moved(groups: Sequence[_Group], levels: Sequence[float], draw: random.Random) -> list[float]:
    """A copy in which sparsity has moved from one group to another, one to three times."""
    levels_after, mean = list(levels), sum(group.size for group in groups) / len(groups)
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        source, target = draw.sample(range(len(groups)), 2)
        weights = STEP * mean
        less, more = (weights / groups[index].size for index in (source, target))
        if levels_after[source] - less > _LEAST and levels_after[target] + more < _MOST:
            levels_after[source] -= less
            levels_after[target] += more
    return levels_after
