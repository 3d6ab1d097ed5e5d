"""``auto``: a sparsity for each site, so that the loss of the last weight is the same everywhere.

One pass over the dense model measures two quantities. The first is the loss of each site at every
sparsity, with exact kept weights. The second is the effect of an error of a site on the output of
the model: each site is pruned alone, then each block, and the change of the stream is measured
after the last block. An error-aware run compensates a part of this change in each later block, so
that early blocks have a lower weight. Bisection on the multiplier then distributes the zeros: the
loss of the last weight, in units of the change of the output, is the same for all sites.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Samples, Site, State
from apt.adapter.recording import eval_mode
from apt.calibration.batches import enter, walk
from apt.calibration.dense_activations import mean_squares, stream_rows
from apt.planning.allocation import Unallocated, sparsity_of, unstructured
from apt.planning.plan import PlannedSite
from apt.pruning.pipeline import stack_bounds
from apt.solver import Gram
from apt_plugins.site_losses import LEVELS, losses_of, pruned, site_grams

_GRAM_TOKENS = 4096
_PROBE_TOKENS = 512
# For error-aware runs; chosen on SmolLM2 at 70 %. With (1, 1), (1, 0.6), (0.95, 0.8), (0.93, 1) and
# (0.9, 0.7) the perplexity was 9.1, 9.6, 14.0, 13.6 and 13.5 % lower than with uniform sparsities.
_LEFT = 0.95  # the share of an error that remains after each later block
_SPREAD = 0.8  # the factor of the deviations from the planned sparsity
# With n:8 at 50 %, 0.5 gives perplexities of 24.6 / 85.4 on two texts, and 0.35 gives 25.5 / 87.9.
_SPREAD_NM = 0.5

_LEAST, _MOST = 0.01, 0.99


@dataclass(frozen=True)
class _Group:
    """The sites of one kind in a block, which are measured together.

    Attributes:
        sites: the sites; there are several only for experts.
        marginal: the loss of the next weight at each level of the sparsity (levels,), ascending.
        change: the relative change of the block's output if only these sites are pruned, times the
            share of the loss that compensation leaves.
    """

    sites: tuple[PlannedSite, ...]
    marginal: Tensor
    change: float

    @property
    def size(self) -> int:
        """The number of weights."""
        return sum(site.size for site in self.sites)

    @property
    def sparsity(self) -> float:
        """The planned sparsity."""
        return sum(sparsity_of(site) * site.size for site in self.sites) / self.size

    @property
    def loss(self) -> float:
        """The loss at the planned sparsity."""
        below = self.marginal[: max(1, round(self.sparsity * LEVELS))]
        return float(below.sum()) / LEVELS * self.size

    def below(self, threshold: float) -> float:
        """The sparsity at which the loss of the next weight equals a threshold."""
        index = int(torch.searchsorted(self.marginal, threshold))
        if not 0 < index < len(self.marginal):
            return index / LEVELS
        low, high = (float(self.marginal[i]) for i in (index - 1, index))
        fraction = (threshold - low) / (high - low) if high > low else 0.0
        return (index - 1 + fraction) / LEVELS


@torch.no_grad()
def auto(given: Unallocated) -> dict[str, float]:
    """The sparsities with the least change of the model's output; see the module's docstring."""
    return _spent(_measured(given), _spread(given))


@torch.no_grad()
def auto_block(given: Unallocated) -> dict[str, float]:
    """`auto` within each block; the total of each block is the planned one."""
    blocks, spread = _measured(given), _spread(given)
    return {name: share for block in blocks for name, share in _spent([block], spread).items()}


def _spread(given: Unallocated) -> float:
    if not given.error_aware:
        return 1.0
    mixed = any(site.pattern and not site.pattern.settled for site in given.plan.sites)
    return _SPREAD_NM if mixed else _SPREAD


def _spent(blocks: Sequence[tuple[Sequence[_Group], float]], spread: float) -> dict[str, float]:
    """The sparsity of each site at which the last weight has the same cost in all sites.

    Args:
        blocks: the groups of each block, and the change of the model's output divided by the change
            of the block's output.
        spread: the factor of the deviations from the planned sparsity.
    """
    costs = [
        (group, factor * group.change / group.loss)
        for groups, factor in blocks
        for group in groups
        if factor * group.change * group.loss > 0
    ]
    total = sum(group.size * group.sparsity for group, _ in costs)
    mean = total / max(sum(group.size for group, _ in costs), 1)
    least, most = min(_LEAST, mean / 2), max(_MOST, (1 + mean) / 2)
    sizes = torch.tensor([group.size for group, _ in costs], dtype=torch.float64)

    def shares(threshold: float) -> Tensor:
        sparsities = [group.below(math.exp(threshold) / cost) for group, cost in costs]
        return torch.tensor(sparsities, dtype=torch.float64).clamp(least, most)

    all_groups = (group for groups, _ in blocks for group in groups)
    sparsities = {site.name: group.sparsity for group in all_groups for site in group.sites}
    for (group, _), share in zip(costs, _with_total(total, sizes, shares).tolist(), strict=True):
        deviation = spread * (share - group.sparsity)
        sparsities |= {site.name: group.sparsity + deviation for site in group.sites}
    return sparsities


def _with_total(total: float, sizes: Tensor, shares: Callable[[float], Tensor]) -> Tensor:
    """The shares (groups,) that remove ``total`` weights, by bisection on the threshold.

    If the marginal loss of a group has a plateau, its share jumps at one threshold, and the sum may
    jump over the total. Then the shares are interpolated between both ends of the jump.
    """
    low, high = -100.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(sizes @ shares(middle)) < total else (low, middle)
    under, over = shares(low), shares(high)
    jump = float(sizes @ (over - under))
    part = (total - float(sizes @ under)) / jump if jump > 0 else 1.0
    return torch.lerp(under, over, min(max(part, 0.0), 1.0))


def _measured(given: Unallocated) -> list[tuple[list[_Group], float]]:
    """The groups of each block, and the model's change of output divided by the block's."""
    adapter, model = given.adapter, given.model
    all_groups, sums, changes = list[list[_Group]](), list[float](), list[float]()
    states = list[State]()
    probe_tokens, gram_tokens = _parts(given.tokens)
    with eval_mode(model), adapter.running(model):
        probe = enter(adapter, model, probe_tokens)[0]
        others = enter(adapter, model, gram_tokens)
        planned_blocks = [planned for planned, _ in given.blocks()]
        last = {end - 1 for _, end in stack_bounds(adapter, model)}
        for index, _, block in walk(adapter, model, [probe], others):
            planned = planned_blocks[index]
            with given.opened(planned.name, block):
                sites = unstructured(planned)
                step = partial(adapter.step, block, call=probe.calls[index])
                states = [step(state) for state in states]
                grams = site_grams(adapter, block, index, [s.site for s in sites], others)
                groups, change_sum = _groups(adapter, block, step, probe.state, sites, grams)
                all_groups.append(groups)
                sums.append(change_sum)
                with pruned(block, sites, grams):
                    states.append(step(probe.state))
                probe.state = step(probe.state)
            if index in last:  # what a later stack makes of a change is not measured
                end = stream_rows(adapter, probe.state)
                changes += [_change(end, stream_rows(adapter, state)) for state in states]
                states = []
    kept_share = _LEFT if given.error_aware else 1.0
    factors = [
        change / change_sum * kept_share ** (len(sums) - 1 - index) if change_sum > 0 else 0.0
        for index, (change, change_sum) in enumerate(zip(changes, sums, strict=True))
    ]
    return list(zip(all_groups, factors, strict=True))


def _parts(tokens: Tensor | Samples) -> tuple[Tensor | Samples, Tensor | Samples]:
    """The samples that follow each pruned block, and those of the sums of squares."""
    length = max(1, tokens.numel() // max(1, len(tokens)))
    count = max(1, _PROBE_TOKENS // length)
    others = tokens[count : count + max(1, _GRAM_TOKENS // length)]
    if isinstance(tokens, Tensor):
        probe = tokens[:count, :_PROBE_TOKENS]
        return probe, others if len(others) else probe
    # One batch, so of samples of equal shapes.
    inputs, _ = max(tokens.batches(_PROBE_TOKENS), key=lambda batch: len(batch[1]))
    names = inputs.keys()
    rows = [dict(zip(names, each, strict=True)) for each in zip(*inputs.values(), strict=True)]
    return tokens.with_samples(rows), others if len(others) else tokens


def _groups(
    adapter: Adapter,
    block: nn.Module,
    step: Callable[[State], State],
    state: State,
    sites: Sequence[PlannedSite],
    grams: Mapping[Site, Gram],
) -> tuple[list[_Group], float]:
    """The groups of a block, and the sum of the changes by the groups, without compensation."""
    kinds: dict[str, list[PlannedSite]] = {}
    for site in sites:
        kinds.setdefault(site.site.kind, []).append(site)
    dense, groups, total = stream_rows(adapter, step(state)), list[_Group](), 0.0
    for members in kinds.values():
        with pruned(block, members, grams):
            change = _change(dense, stream_rows(adapter, step(state)))
        total += change
        plain, losses = losses_of(block, members, grams)
        planned = round(LEVELS * sparsity_of(members[0]))
        change *= float(losses[planned] / plain[planned].clamp_min(1e-30))
        marginal = (losses.diff() * LEVELS / sum(s.size for s in members)).cummax(0).values
        groups.append(_Group(tuple(members), marginal, change))
    return groups, total


def _change(dense: Tensor, changed: Tensor) -> float:
    """The mean over tokens (tokens, hidden) of the squared change relative to the squared token."""
    squares = (changed - dense).square().mean(1, keepdim=True)
    return float((squares / mean_squares(dense)).mean())
