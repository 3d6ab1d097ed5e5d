"""Published allocations of a sparsity: uniform, OWL, AlphaPruning, and ATP.

Sources: OWL is arXiv 2310.05175, AlphaPruning arXiv 2410.10912, ATP arXiv 2502.14770.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from apt import perplexity
from apt.adapter import Site
from apt.extending import (
    Plan,
    PlannedBlock,
    Unallocated,
    enter,
    eval_mode,
    sparsity_of,
    unstructured,
)
from apt.solver import lowest_k
from apt_plugins.spectra import tail_from_middle, tail_from_peak

OUTLIER = 5.0  # M of OWL: a score above M times the mean of its block is an outlier
MAX_SHIFT = 0.08  # λ of OWL: the largest deviation of a block's sparsity, before centring
SPREAD = 0.3  # ε of AlphaPruning: the relative deviation of a block's sparsity, before scaling
STEP = 0.002  # of the grid on which ATP seeks the slope β
MOST = 0.99  # the highest sparsity of a site, unless the mean is about as high

_ATP_TOKENS = 2048


def uniform(given: Unallocated) -> dict[str, float]:
    """The sparsities of the plan, unchanged."""
    return {site.name: sparsity_of(site) for site in unstructured(given.plan)}


@torch.no_grad()
def owl(given: Unallocated) -> dict[str, float]:
    """A lower sparsity for blocks with more outliers among their scores ``|w| ‖x‖``.

    A block's sparsity is the planned one plus a shift of at most `MAX_SHIFT`. The shift falls
    linearly with the share of scores above `OUTLIER` times their mean. The shifts are then centred:
    their mean, weighted by the size of the blocks, is 0.
    """
    outliers = outlier_shares(given)
    low, high = min(outliers.values(), default=0.0), max(outliers.values(), default=0.0)
    span = high - low
    middle = (low + high) / 2  # for a block none of whose sites saw a token
    shares = (outliers.get(index, middle) for index in range(len(given.plan.blocks)))
    shifts = [MAX_SHIFT * (1 - 2 * (x - low) / span) if span else 0.0 for x in shares]
    return _shifted(given.plan, shifts)


@torch.no_grad()
def outlier_shares(given: Unallocated) -> dict[int, float]:
    """The share of outliers among the scores of each block, see `owl`, by the index of the block.

    A block none of whose sites saw a token is left out.
    """
    outliers = dict[int, float]()
    for index, (block, _, norms) in enumerate(_norms(given)):
        if norms:
            scores = torch.cat([_wanda(block, site, norms).flatten() for site in norms])
            outliers[index] = float((scores > OUTLIER * scores.mean()).float().mean())
    return outliers


@torch.no_grad()
def alphapruning(given: Unallocated) -> dict[str, float]:
    """A higher sparsity for blocks whose weights have less heavy-tailed spectra.

    A block's value is the mean of ``α`` over its sites, see `tail_from_peak`. The values are mapped
    linearly to ``[1 − ε, 1 + ε]`` and scaled, so that their mean is the planned sparsity.
    """
    return _by_tails(given, tail_from_peak)


@torch.no_grad()
def alphapruning_matrix(given: Unallocated) -> dict[str, float]:
    """`alphapruning` with the ``α`` of each site instead of the mean of its block."""
    return _by_tails(given, tail_from_peak, per_block=False)


@torch.no_grad()
def alphapruning_mid(given: Unallocated) -> dict[str, float]:
    """`alphapruning` with the upper half of each spectrum as its tail, see `tail_from_middle`."""
    return _by_tails(given, tail_from_middle)


def _by_tails(
    given: Unallocated, exponent: Callable[[Tensor], float], *, per_block: bool = True
) -> dict[str, float]:
    alphas = dict[str, float]()
    for planned, block in given.blocks():
        sites = unstructured(planned)
        with given.opened(planned.name, block):
            exponents = [exponent(s.site.oriented(s.site.weight(block).data)) for s in sites]
        if per_block and sites:
            exponents = [sum(exponents) / len(exponents)] * len(sites)
        alphas |= {site.name: alpha for site, alpha in zip(sites, exponents, strict=True)}
    finite = [alpha for alpha in alphas.values() if math.isfinite(alpha)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = high - low
    ratios = {
        name: 1 - SPREAD + 2 * SPREAD * (min(alpha, high) - low) / span if span else 1.0
        for name, alpha in alphas.items()
    }
    return scaled(given.plan, ratios)


def scaled(plan: Plan, ratios: Mapping[str, float]) -> dict[str, float]:
    """Sparsities in these ratios, at most about `MOST`, with the total of the plan."""
    sites = unstructured(plan)
    total = sum(sparsity_of(site) * site.size for site in sites)
    most = max(MOST, (1 + total / sum(site.size for site in sites)) / 2)

    def shares(scale: float) -> dict[str, float]:
        return {site.name: min(scale * ratios[site.name], most) for site in sites}

    def zeros(scale: float) -> float:
        sparsities = shares(scale)
        return sum(sparsities[site.name] * site.size for site in sites)

    low, high = 0.0, most / max(min(ratios.values()), 1e-6)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if zeros(middle) < total else (low, middle)
    return shares(high)


@torch.no_grad()
def atp(given: Unallocated) -> dict[str, float]:
    """Sparsities that rise from block to block by ``β``, in an arithmetic progression.

    ``β`` is the multiple of `STEP` for which the model, pruned by Wanda's score, has the lowest
    loss on about 2,048 calibration tokens. No sparsity is above `MOST` or below 0.
    """
    if sum(bool(unstructured(block)) for block in given.plan.blocks) < 2:
        return uniform(given)  # every β is the same
    sample = given.windows[: max(1, _ATP_TOKENS // given.windows.shape[1])]
    norms = {planned.name: inputs for _, planned, inputs in _norms(given)}
    best, lowest_loss = uniform(given), math.inf
    for step in range(int(1 / STEP)):
        shares = _progression(given.plan, step * STEP)
        if not all(0 < share <= MOST for share in shares.values()):
            break
        with _pruned(given, norms, shares), given.adapter.running(given.model):
            loss = perplexity(given.model, sample)
        if loss < lowest_loss:
            best, lowest_loss = shares, loss
    return best


def _progression(plan: Plan, slope: float) -> dict[str, float]:
    return _shifted(plan, [slope * index for index in range(len(plan.blocks))])


def _shifted(plan: Plan, shifts: Sequence[float]) -> dict[str, float]:
    """The sparsities of the plan plus the shift of each block; the shifts are centred first."""
    sizes = [sum(site.size for site in unstructured(block)) for block in plan.blocks]
    mean = sum(s * n for s, n in zip(shifts, sizes, strict=True)) / sum(sizes)
    return {
        site.name: sparsity_of(site) + shift - mean
        for block, shift in zip(plan.blocks, shifts, strict=True)
        for site in unstructured(block)
    }


def _norms(given: Unallocated) -> Iterator[tuple[nn.Module, PlannedBlock, dict[Site, Tensor]]]:
    """Each block, opened, with the norms of the inputs (in,) of its unstructured sites."""
    adapter, model = given.adapter, given.model
    with eval_mode(model), adapter.running(model):
        batches = enter(adapter, model, given.tokens)
        for index, (planned, block) in enumerate(given.blocks()):
            squares = dict[Site, Tensor]()
            with given.opened(planned.name, block):
                with adapter.capture(
                    block, [s.site for s in unstructured(planned)], _adding(squares)
                ):
                    for batch in batches:
                        batch.state = adapter.step(block, batch.state, batch.calls[index])
                yield block, planned, {site: total.sqrt() for site, total in squares.items()}


def _adding(squares: dict[Site, Tensor]) -> Callable[[Site, Tensor], None]:
    """A function that adds the squares of inputs (..., in) to those of their site."""

    def add(site: Site, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        squares[site] = squares.get(site, 0) + rows.square().sum(0)

    return add


def _wanda(block: nn.Module, site: Site, norms: Mapping[Site, Tensor]) -> Tensor:
    """``|w| ‖x‖`` (out, in); a site without inputs has the magnitudes."""
    weight = site.oriented(site.weight(block).data).float().abs()
    return weight * norms[site] if site in norms else weight


@contextmanager
def _pruned(
    given: Unallocated, norms: Mapping[str, Mapping[Site, Tensor]], shares: Mapping[str, float]
) -> Iterator[None]:
    """Inside the context, each row has lost its weights of the lowest scores."""
    kept = []
    try:
        for planned, block in given.blocks():
            for site in unstructured(planned):
                scores = _wanda(block, site.site, norms[planned.name])
                mask = lowest_k(scores, round(shares[site.name] * scores.shape[1]))
                weight = site.site.oriented(site.site.weight(block).data)
                kept.append((weight, weight.clone()))
                weight.masked_fill_(mask, 0)
        yield
    finally:
        for weight, dense in kept:
            weight.copy_(dense)
