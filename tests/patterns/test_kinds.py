"""Selections: exact counts for all scores, and approximate thresholds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.patterns import NM, MixedNM, Unstructured, lowest, lowest_k, parse_pattern
from apt.patterns.selection import nth_largest, stride
from tests.helpers.problems import seeds

LONG = 100_003

ROWS = {
    "random": torch.randn(LONG, generator=torch.Generator().manual_seed(0)),
    "equal": torch.zeros(LONG),
    "ascending": torch.arange(float(LONG)),
    "few values": torch.arange(LONG).remainder(3).float(),
    "nearly all zero": (torch.arange(LONG) == 17).float(),
}


@pytest.mark.parametrize("share", [0, 1 / LONG, 0.3, 0.5, 0.99, 1])
@pytest.mark.parametrize("name", ROWS)
def test_mask_of_a_long_row_has_the_exact_count(name, share):
    scores, k = ROWS[name], round(share * LONG)
    mask = lowest_k(scores[None], k)[0]
    assert int(mask.sum()) == k
    if 0 < k < LONG:
        assert scores[mask].max() <= scores[~mask].min()


def test_misleading_sample_still_gives_the_exact_count():
    """The sampled scores are large, and all other scores are small."""
    scores = torch.rand(LONG)
    scores[:: stride(LONG)] += 10
    mask = lowest_k(scores[None], LONG // 2)[0]
    assert int(mask.sum()) == LONG // 2
    assert scores[mask].max() <= scores[~mask].min()


@pytest.mark.parametrize("m", range(2, 10))
def test_nth_largest_equals_the_sorted_value(m):
    values = torch.randn(m, 50, generator=torch.Generator().manual_seed(m))
    ordered = values.sort(0, descending=True).values
    for n in range(1, m):
        assert torch.equal(nth_largest(list(values), n), ordered[n - 1])


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from([(2, 4), (1, 4), (4, 8), (2, 3)]))
def test_groups_with_equal_scores_have_exact_counts(seed, pattern):
    n, m = pattern
    scores = torch.randint(0, 3, (5, 6 * m), generator=torch.Generator().manual_seed(seed)).float()
    groups, mask = scores.view(-1, m), lowest(scores, NM(n, m)).view(-1, m)
    assert (mask.sum(1) == m - n).all()
    highest_pruned = groups.where(mask, torch.tensor(-1.0)).amax(1)
    assert (highest_pruned <= groups.where(~mask, torch.tensor(9.0)).amin(1)).all()


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from([(2, 4), (1, 4), (4, 8), (2, 3)]))
def test_threshold_of_n_m_keeps_n_of_each_group(seed, pattern):
    n, m = pattern
    values = torch.rand(6 * m, 5, generator=torch.Generator().manual_seed(seed))
    kept = values.view(-1, m, 5) >= NM(n, m).threshold(values)
    assert (kept.sum(1) == n).all()


@settings(deadline=None, max_examples=10)
@given(seeds, st.floats(0.1, 0.9))
def test_threshold_of_a_layer_keeps_about_the_share(seed, sparsity):
    values = torch.rand(300, 400, generator=torch.Generator().manual_seed(seed))
    kept = (values >= Unstructured(sparsity).threshold(values)).float().mean()
    assert float(kept) == pytest.approx(1 - sparsity, abs=0.03)


def test_threshold_of_short_rows_keeps_the_exact_count():
    values = torch.rand(40, 7)
    kept = values.view(1, 40, 7) >= Unstructured(0.3, "row").threshold(values)
    assert (kept[0].sum(0) == 28).all()


@pytest.mark.parametrize("size", [3 * 2**20, 2**22, 2**32 + 1])
def test_text_of_a_share_keeps_its_count(size):
    """A report stores patterns as text, and `verify` counts by them."""
    share = (size * 2 // 3 - 1) / size
    for pattern in (Unstructured(share), MixedNM(share)):
        assert parse_pattern(str(pattern)).count(size) == pattern.count(size)
    assert str(Unstructured(0.5)) == "0.5"


def test_width_not_divisible_by_m_raises_value_error():
    with pytest.raises(ValueError, match="6 columns are not a multiple of 4"):
        lowest(torch.rand(4, 6), NM(2, 4))


def test_count_is_exact_if_most_scores_are_nan():
    scores = torch.rand(65_000, generator=torch.Generator().manual_seed(0))
    scores[torch.rand(65_000, generator=torch.Generator().manual_seed(1)) < 0.6] = torch.nan
    assert int(lowest_k(scores.unsqueeze(0), 39_000).sum()) == 39_000


@pytest.mark.parametrize("pattern", [Unstructured(0.4, "row"), Unstructured(0.37), NM(2, 4)])
@pytest.mark.parametrize("levels", [0, 6])  # with 6 levels, many scores are equal
def test_numpy_and_torch_select_the_same_mask(monkeypatch, pattern, levels):
    scores = torch.rand(24, 64, generator=torch.Generator().manual_seed(0))
    scores = (scores * levels).floor() if levels else scores
    result = [lowest(scores, pattern), pattern.threshold(scores)]
    monkeypatch.setattr("apt.patterns.selection.selects_in_numpy", lambda values: False)
    assert torch.equal(result[0], lowest(scores, pattern))
    assert torch.equal(result[1], pattern.threshold(scores))
