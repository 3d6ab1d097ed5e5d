"""SS, SM, MS and MM against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.solver import NM, Gram, SolverError, SolverOptions, Unstructured, meets, mm, ms, sm, ss
from tests.helpers.problems import (
    group_patterns,
    least_squares,
    problem,
    quadratic_loss,
    removal_sets,
    seeds,
)

EXACT = SolverOptions(damping=0.01, tolerance=1e-12)
METHODS = {"ss": ss, "sm": sm, "ms": ms, "mm": mm}


def sequential_obs(weight, matrix, window, choose):
    """Optimal Brain Surgeon column by column, with explicit inverses for the remaining columns."""
    weight, width = weight.clone(), weight.shape[1]
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for j in range(width):
        if j % window == 0:
            end = min(j + window, width)
            pivots = [torch.linalg.inv(matrix[k:, k:])[0, 0] for k in range(j, end)]
            scores = weight[:, j : j + window] ** 2 / torch.stack(pivots)
            mask[:, j : j + window] = choose(scores)
        inverse = torch.linalg.inv(matrix[j:, j:])
        for row in torch.nonzero(mask[:, j]).flatten():
            weight[row, j:] -= weight[row, j] / inverse[0, 0] * inverse[0]
            weight[row, j] = 0
    return weight, mask


@settings(deadline=None, max_examples=12)
@given(seeds, st.integers(1, 5), st.integers(1, 3), group_patterns)
def test_ss_is_column_by_column_obs_for_groups(seed, out, groups, nm):
    pattern = NM(*nm)
    weight, gram = problem(seed, out, groups * pattern.m)

    def choose(scores):
        order = scores.argsort(1)[:, : pattern.m - pattern.n]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)

    expected, mask = sequential_obs(weight, gram.damped(0.01).matrix, pattern.m, choose)
    result = ss(weight, gram, pattern, EXACT)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight, expected)


@settings(deadline=None, max_examples=12)
@given(seeds, st.integers(1, 5), st.floats(0.05, 0.95), st.sampled_from([4, 5, 12]))
def test_ss_is_column_by_column_obs_unstructured(seed, out, sparsity, window):
    pattern = Unstructured(sparsity)
    weight, gram = problem(seed, out, 12)

    pruned = 0

    def choose(scores):
        nonlocal pruned, columns
        columns += scores.shape[1]
        count, pruned = (pattern.count(out * columns) - pruned, pattern.count(out * columns))
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        mask[scores.flatten().argsort()[:count]] = True
        return mask.view_as(scores)

    columns = 0
    expected, mask = sequential_obs(weight, gram.damped(0.01).matrix, window, choose)
    result = ss(weight, gram, pattern, SolverOptions(damping=0.01, mask_window=window))
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight, expected)


@settings(deadline=None, max_examples=12)
@given(seeds, st.integers(1, 5), st.integers(1, 4), group_patterns, st.sampled_from(["sm", "mm"]))
def test_compensation_m_of_all_columns_is_the_least_squares_optimum(seed, out, groups, nm, method):
    weight, gram = problem(seed, out, groups * nm[1])
    result = METHODS[method](weight, gram, NM(*nm), EXACT)
    best = least_squares(weight, gram.damped(0.01).matrix, result.mask)
    torch.testing.assert_close(result.weight, best, rtol=1e-6, atol=1e-8)


@settings(deadline=None, max_examples=12)
@given(seeds, st.integers(1, 6), st.sampled_from([(1, 4), (2, 4), (3, 4), (2, 3)]))
def test_solution_of_one_group_equals_the_closed_form(seed, out, nm):
    """δ = −w_P ([H⁻¹]_PP)⁻¹ [H⁻¹]_P,: and its loss ½ w_P ([H⁻¹]_PP)⁻¹ w_Pᵀ."""
    pattern = NM(*nm)
    weight, gram = problem(seed, out, pattern.m)
    matrix = gram.damped(0.01).matrix
    result = mm(weight, gram, pattern, EXACT)
    inverse = torch.linalg.inv(matrix)
    for row in range(out):
        removed = result.mask[row]
        multipliers = weight[row, removed] @ torch.linalg.inv(inverse[removed][:, removed])
        delta = -multipliers @ inverse[removed]
        torch.testing.assert_close(result.weight[row], weight[row] + delta, atol=1e-9, rtol=1e-7)
        loss = 0.5 * multipliers @ weight[row, removed]
        measured = quadratic_loss(weight[row : row + 1], result.weight[row : row + 1], matrix)[0]
        torch.testing.assert_close(measured, loss)


@settings(deadline=None, max_examples=12)
@given(seeds, st.integers(1, 5), group_patterns)
def test_mask_m_of_one_group_has_the_least_loss(seed, out, nm):
    pattern = NM(*nm)
    weight, gram = problem(seed, out, pattern.m)
    matrix = gram.damped(0.01).matrix
    result = mm(weight, gram, pattern, EXACT)
    losses = torch.stack(
        [
            quadratic_loss(weight, least_squares(weight, matrix, mask.expand_as(weight)), matrix)
            for mask in removal_sets(pattern.m, pattern.m - pattern.n)
        ]
    )
    measured = quadratic_loss(weight, result.weight, matrix)
    torch.testing.assert_close(measured, losses.min(0).values, rtol=1e-6, atol=1e-10)


@settings(deadline=None, max_examples=10)
@given(seeds, st.sampled_from(["sm", "mm"]), st.sampled_from([4, 8, 12, 16]))
def test_blocks_equal_successive_joint_solves(seed, method, block):
    """The reference solves a block and all columns to its right jointly, then freezes the block."""
    weight, gram = problem(seed, 3, 24)
    matrix = gram.damped(0.01).matrix
    result = METHODS[method](weight, gram, NM(2, 4), SolverOptions(block_size=block))
    current = weight.clone()
    for start in range(0, 24, block):
        here = torch.zeros(24, dtype=torch.bool)
        here[start : start + block] = True
        free = matrix[start:, start:]
        mask = (result.mask & here)[:, start:]
        current[:, start:] = least_squares(current[:, start:], free, mask)
    torch.testing.assert_close(result.weight, current, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [8, None])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 8), Unstructured(0.37)], ids=str)
def test_count_of_zeros_is_exact(method, block, pattern):
    weight, gram = problem(0, 7, 40)
    options = SolverOptions(block_size=block)
    result = METHODS[method](weight, gram, pattern, options)
    assert meets(result.weight, pattern)
    assert torch.equal(result.weight == 0, result.mask)
    if isinstance(pattern, NM):
        assert int(result.mask.sum()) == 7 * 40 // pattern.m * (pattern.m - pattern.n)
    else:
        assert int(result.mask.sum()) == pattern.count(7 * 40)


@pytest.mark.parametrize("per", ["row", "layer"])
@pytest.mark.parametrize("method", METHODS)
def test_unstructured_count_over_windows_is_exact(method, per):
    weight, gram = problem(1, 5, 50)
    pattern = Unstructured(0.33, per)
    result = METHODS[method](weight, gram, pattern, SolverOptions(mask_window=16))
    if per == "row":
        assert (result.mask.sum(1) == pattern.count(50)).all()
    else:
        assert int(result.mask.sum()) == pattern.count(250)


def test_compensation_m_never_loses_more_than_compensation_s():
    weight, gram = problem(3, 32, 96)
    matrix = gram.damped(0.01).matrix
    for pattern in (NM(2, 4), Unstructured(0.6)):
        single = ss(weight, gram, pattern, SolverOptions())
        joint = sm(weight, gram, pattern, SolverOptions())
        assert torch.equal(single.mask, joint.mask)
        worse = quadratic_loss(weight, joint.weight, matrix) > quadratic_loss(
            weight, single.weight, matrix
        ) * (1 + 1e-9)
        assert not worse.any()


def test_bf16_weights_keep_their_dtype_and_meet_the_pattern():
    weight, gram = problem(4, 8, 16)
    gram = Gram.from_sum(gram.matrix.float(), gram.tokens)
    result = sm(weight.bfloat16(), gram, NM(2, 4), SolverOptions())
    assert result.weight.dtype == torch.bfloat16
    assert meets(result.weight, NM(2, 4))


def test_width_not_divisible_by_m_raises_solver_error():
    weight, gram = problem(0, 2, 6)
    with pytest.raises(SolverError, match="6 inputs, not a multiple of 4"):
        ss(weight, gram, NM(2, 4), SolverOptions())


def test_block_that_splits_a_group_raises_solver_error():
    weight, gram = problem(0, 2, 8)
    with pytest.raises(SolverError, match="block size 6"):
        sm(weight, gram, NM(2, 4), SolverOptions(block_size=6))


def test_too_many_removal_sets_raise_solver_error():
    with pytest.raises(SolverError, match="601,080,390 removal sets"):
        mm(torch.randn(2, 32), Gram.of(torch.randn(64, 32)), NM(16, 32), SolverOptions())
