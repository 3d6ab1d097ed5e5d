"""SparseSwaps against brute force: the best swap, its loss, and masks that no swap improves."""

from itertools import pairwise, product

import pytest
import torch
from apt_plugins import sparseswaps as module
from apt_plugins.baselines import wanda
from apt_plugins.sparseswaps import refine, sparseswaps
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.solver import NM, Gram, SolverOptions, Unstructured, parse_pattern
from tests.helpers.problems import group_patterns, problem, quadratic_loss, seeds


def row_losses(weight, matrix, masks):
    """``d G dᵀ`` of every row, or of one row (in,) for each of ``masks`` (masks, in)."""
    return 2 * quadratic_loss(weight, weight.masked_fill(masks, 0), matrix)


def swaps(mask, group):
    """All masks (swaps, in) that one swap within a group makes of ``mask`` (in,)."""
    found = []
    for p, u in product(mask.nonzero().flatten().tolist(), (~mask).nonzero().flatten().tolist()):
        if p // group == u // group:
            found.append(mask.clone())
            found[-1][[p, u]] = mask[[u, p]]
    return torch.stack(found)


cases = st.one_of(
    group_patterns.map(lambda nm: NM(*nm)),
    st.builds(Unstructured, st.floats(0.1, 0.9), st.sampled_from(["row", "layer"])),
)


def group_of(pattern, width):
    return pattern.m if isinstance(pattern, NM) else width


@settings(deadline=None, max_examples=40)
@given(seeds, cases)
def test_no_single_swap_improves_the_result(seed, pattern):
    weight, gram = problem(seed, 4, 24)
    matrix, group = gram.matrix / gram.tokens, group_of(pattern, 24)
    mask = sparseswaps(weight, gram, pattern, SolverOptions()).mask
    for row, chosen in zip(weight, mask, strict=True):
        if 0 < int(chosen.sum()) < 24:
            here = row_losses(row, matrix, chosen[None])[0]
            assert row_losses(row, matrix, swaps(chosen, group)).min() >= here * (1 - 2e-6)


@settings(deadline=None, max_examples=40)
@given(seeds, cases)
def test_first_swap_is_the_best_swap(seed, pattern):
    weight, gram = problem(seed, 4, 24)
    matrix, group = gram.matrix / gram.tokens, group_of(pattern, 24)
    start = wanda(weight, gram, pattern, SolverOptions()).mask
    mask = start.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_SWAPS", 1)
        refine(weight, matrix, mask, group)
    for row, before, after in zip(weight, start, mask, strict=True):
        if 0 < int(before.sum()) < 24:
            options = torch.cat([before[None], swaps(before, group)])
            best = row_losses(row, matrix, options).min()
            torch.testing.assert_close(
                row_losses(row, matrix, after[None])[0], best, rtol=2e-6, atol=0
            )


@settings(deadline=None, max_examples=20)
@given(seeds, cases)
def test_table_of_couplings_stays_exact(seed, pattern):
    """The reported change, ``c`` and the couplings are those of the new mask."""
    weight, gram = problem(seed, 4, 24)
    matrix, group = gram.matrix / gram.tokens, group_of(pattern, 24)
    mask = wanda(weight, gram, pattern, SolverOptions()).mask
    counts = mask.view(4, -1, group).sum(2)
    pruned, kept = int(counts.max()), group - int(counts.min())
    if not pruned * kept:
        return
    rows = module._Rows.of(weight, matrix, mask, group, pruned, kept)
    for _ in range(5):
        change, back, gone = module._best_swaps(rows, matrix, torch.empty_like(rows.coupling))
        can = change.isfinite()  # not where everything or nothing is pruned
        rows, change, back, gone = rows.take(can), change[can], back[can], gone[can]
        before = row_losses(rows.weight, matrix, rows.mask)
        module._swap(rows, matrix, back, gone)
        after = row_losses(rows.weight, matrix, rows.mask)
        torch.testing.assert_close(after - before, change)
        torch.testing.assert_close(rows.slope, (rows.weight * rows.mask) @ matrix)
        slots = rows.pruned.unsqueeze(3), rows.kept.unsqueeze(2)
        torch.testing.assert_close(
            rows.coupling, module._coupling(rows.weight, matrix, *slots), rtol=1e-9, atol=0
        )


@pytest.mark.parametrize("text", ["1:4", "2:4", "3:4", "4:8", "0.5", "0.7"])
def test_sparseswaps_has_a_lower_loss_than_wanda(text):
    weight, gram = problem(0, 48, 96)
    weight = weight.float()
    gram = Gram.from_sum(gram.matrix.float(), gram.tokens)
    pattern = parse_pattern(text)
    start = wanda(weight, gram, pattern, SolverOptions())
    found = sparseswaps(weight, gram, pattern, SolverOptions())
    before, after = (
        quadratic_loss(weight.double(), solution.weight.double(), gram.matrix.double())
        for solution in (start, found)
    )
    assert (after <= before).all()
    assert after.sum() < 0.9 * before.sum()
    assert torch.equal(found.weight, weight.masked_fill(found.mask, 0))
    group = group_of(pattern, 96)
    counts = [solution.mask.view(48, -1, group).sum(2) for solution in (start, found)]
    assert torch.equal(*counts)


@pytest.mark.parametrize("text", ["2:4", "0.5"])
def test_each_round_lowers_the_loss(text, monkeypatch):
    weight, gram = problem(1, 8, 48)
    found = []
    for count in range(8):
        monkeypatch.setattr(module, "MAX_SWAPS", count)
        pruned = sparseswaps(weight, gram, parse_pattern(text), SolverOptions()).weight
        found.append(quadratic_loss(weight, pruned, gram.matrix))
    for before, after in pairwise(found):
        assert (after <= before).all()
    assert (found[-1] < found[0]).all()


def test_chunks_do_not_change_the_result(monkeypatch):
    weight, gram = problem(2, 11, 32)
    plain = sparseswaps(weight, gram, Unstructured(0.5), SolverOptions())
    monkeypatch.setattr(module, "_CPU_CHUNK", 3 * 16 * 16)
    found = sparseswaps(weight, gram, Unstructured(0.5), SolverOptions())
    assert torch.equal(found.mask, plain.mask)


def test_sparseswaps_equals_wanda_without_a_gain():
    weight = torch.randn(3, 8)
    gram = Gram.of(torch.diag(torch.rand(8) + 0.5))
    for pattern in (NM(2, 4), Unstructured(0.5), Unstructured(0.01), Unstructured(0.99)):
        for one in (gram, Gram(8)):
            found = sparseswaps(weight, one, pattern, SolverOptions())
            assert torch.equal(found.mask, wanda(weight, one, pattern, SolverOptions()).mask)


def test_half_precision_weights_are_swapped_in_fp32():
    weight, gram = problem(3, 8, 32)
    gram = Gram.from_sum(gram.matrix.float(), gram.tokens)
    found = sparseswaps(weight.bfloat16(), gram, NM(2, 4), SolverOptions())
    assert found.weight.dtype == torch.bfloat16
    assert found.damping is None
    assert (found.mask.view(8, -1, 4).sum(2) == 2).all()


@pytest.mark.parametrize("text", ["2:4", "0.5"])
def test_transposed_weights_give_the_same_result(text):
    weight, gram = problem(4, 8, 32)
    plain = sparseswaps(weight, gram, parse_pattern(text), SolverOptions())
    found = sparseswaps(weight.T.contiguous().T, gram, parse_pattern(text), SolverOptions())
    assert torch.equal(found.mask, plain.mask)
