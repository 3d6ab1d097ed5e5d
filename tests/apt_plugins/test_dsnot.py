"""DSnoT against a plain loop over rows and weights."""

import pytest
import torch
from apt_plugins.baselines import wanda
from apt_plugins.dsnot import CYCLES, THRESHOLD, dsnot, dsnot_exact, refined
from hypothesis import given, settings
from hypothesis import strategies as st

import apt as library
from apt.solver import NM, Gram, SolverOptions, Unstructured, meets
from tests.helpers.families import FAMILIES, random_model, random_tokens
from tests.helpers.problems import quadratic_loss, seeds

PATTERNS = [NM(2, 4), NM(5, 8), Unstructured(0.5, "row"), Unstructured(0.7, "row")]


def problem(seed, rows=5, width=24):
    """A weight, and the inputs of three samples, whose means differ: (3, 40, width)."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3, 40, width, generator=draw) * torch.linspace(0.3, 2, width)
    inputs += torch.randn(3, 1, width, generator=draw) * torch.linspace(2, 0, width)
    return torch.randn(rows, width, generator=draw) * 0.05, inputs


def by_hand(row, inputs, start, group):
    """The exchanges in one row, written with lists; True where pruned.

    As in the authors' code, the error is that of the sum over a sample, and the variance is the
    mean of the variances of the samples.
    """
    sums = inputs.sum(1).mean(0).tolist()
    variance = inputs.var(1, unbiased=False).mean(0).tolist()
    share = [float(w) * m for w, m in zip(row, sums, strict=True)]
    norms = inputs.flatten(0, 1).norm(dim=0)
    score = [abs(float(w)) * float(n) for w, n in zip(row, norms, strict=True)]
    mask = start.tolist()
    removed, kept = ([j for j, p in enumerate(mask) if p is kind] for kind in (True, False))
    error = sum(share[j] for j in removed)
    sign = error > 0
    for _ in range(CYCLES):
        up = 1 if error > 0 else -1
        growing = [j for j in removed if share[j] * up > 0]
        if abs(error) <= THRESHOLD or not growing:
            break
        grown = max(growing, key=lambda j: share[j] * up / variance[j])
        if group:
            pruning = [j for j in kept if j // group == grown // group]
        else:
            pruning = [j for j in kept if share[j] * up < 0]
        if not pruning:
            break
        pruned = min(pruning, key=lambda j: score[j])
        after = error + share[pruned] - share[grown]
        if group and (after > 0) != sign:
            break
        error = after
        mask[grown], mask[pruned] = False, True
        removed.remove(grown)
        kept.remove(pruned)
    return mask


@settings(deadline=None, max_examples=60)
@given(seeds, st.sampled_from(PATTERNS))
def test_exchanges_follow_the_paper(seed, pattern):
    weight, inputs = problem(seed)
    start = wanda(weight, Gram.of(inputs), pattern, SolverOptions()).mask
    group = pattern.m if isinstance(pattern, NM) else None
    found = refined(weight, Gram.of(inputs), start, group, CYCLES)
    expected = [by_hand(*row, group) for row in zip(weight, [inputs] * 5, start, strict=True)]
    assert found.tolist() == expected
    assert meets(weight.masked_fill(found, 0), pattern)


def test_narrow_rows_have_fewer_exchanges():
    """50 exchanges in 4,096 inputs, in proportion for fewer; the kept weights stay as they are."""
    pattern = Unstructured(0.5, "row")
    for width, cycles in ((1024, 13), (4096, 50), (5000, 50)):
        weight, inputs = problem(0, 2, width)
        weight, gram = 20 * weight, Gram.of(inputs)  # rows far from the threshold
        start = wanda(weight, gram, pattern, SolverOptions()).mask
        found = dsnot(weight, gram, pattern, SolverOptions())
        assert torch.equal(found.mask, refined(weight, gram, start, cycles=cycles))
        assert not torch.equal(found.mask, refined(weight, gram, start, cycles=cycles - 1))
        assert torch.equal(found.weight, weight.masked_fill(found.mask, 0))


def expected_error(weight, inputs, mask):
    """The mean over rows of the expected error."""
    return float((weight.masked_fill(~mask, 0) @ inputs.mean((0, 1))).abs().mean())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_exchanges_lower_the_error_and_exact_weights_the_loss(pattern):
    weight, inputs = problem(0, 64, 48)
    gram, start = Gram.of(inputs), wanda(weight, Gram.of(inputs), pattern, SolverOptions()).mask
    found = dsnot(weight, gram, pattern, SolverOptions())
    assert not torch.equal(found.mask, start)
    errors = [expected_error(weight, inputs, mask) for mask in (start, found.mask)]
    if isinstance(pattern, Unstructured):  # within a group, the authors exchange what raises it
        assert errors[1] < errors[0]
    exact = dsnot_exact(weight, gram, pattern, SolverOptions())
    assert torch.equal(exact.mask, found.mask)
    loss = [quadratic_loss(weight, s.weight, gram.matrix).sum() for s in (found, exact)]
    assert loss[1] < 0.8 * loss[0]


def test_mask_is_unchanged_without_exchanges():
    weight, inputs = problem(4, 8, 64)
    mask = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(refined(weight, Gram.of(inputs), mask, cycles=0), mask)


def test_refined_accepts_any_mask_and_skips_inputs_with_zero_mean():
    weight, inputs = problem(1)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    assert not torch.equal(refined(weight, Gram.of(inputs), mask), mask)
    centred = torch.cat([inputs, -inputs])
    assert torch.equal(refined(weight, Gram.of(centred), mask), mask)
    full = torch.ones_like(mask)
    assert torch.equal(refined(weight, Gram.of(inputs), full), full)
    dead = inputs.clone()
    dead[..., :3] = 0
    assert refined(weight, Gram.of(dead), mask).sum() == mask.sum()


@pytest.mark.parametrize("family", FAMILIES.values())
def test_dsnot_refines_every_site(family):
    """The authors' code leaves every MLP out by default."""
    tokens, found = random_tokens(), {}
    for method in ("wanda", "dsnot"):
        model = random_model(family)
        library.prune(model, tokens, pattern="0.5", method=method)
        found[method] = model.state_dict()
    report = library.prune(random_model(family), tokens, pattern="2:4", method="dsnot-exact")
    changed = [
        not torch.equal(found["wanda"][f"{site.name}.weight"], tensor)
        for site in report.sites
        if (tensor := found["dsnot"].get(f"{site.name}.weight")) is not None
    ]
    assert sum(changed) > len(changed) / 2
