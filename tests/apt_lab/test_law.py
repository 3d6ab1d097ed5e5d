"""The P² law: predictions from fitted curves, and terms that are left out."""

import math

import numpy as np
import pytest
from apt_lab.law import Point, fit_law
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.errors import AptError

TOKENS = [1e5, 3e5, 1e6, 3e6, 1e7]
TRUE = {"gamma": -1.2, "delta": 0.2, "N_C": 0.8, "alpha": 0.3, "D_C": 0.5, "beta": 0.4, "E": 0.1}


def true_loss(dense, rate, size, tokens, **values):
    v = TRUE | values
    scale = (1 / rate) ** v["gamma"] * (1 / (size / 1e6)) ** v["delta"]
    inner = v["N_C"] / (size / 1e6) ** v["alpha"] + v["D_C"] / (tokens / 1e6) ** v["beta"] + v["E"]
    return dense + scale * inner


def curves(rates=(0.3, 0.5, 0.7), sizes=(5e6, 5e7), noise=0.0, **values):
    draw = np.random.default_rng(0)
    return [
        Point(f"{rate}-{size}", 2.5, rate, size, tokens,
              true_loss(2.5, rate, size, tokens, **values) + noise * draw.normal())
        for rate in rates for size in sizes for tokens in TOKENS
    ]  # fmt: skip


def test_law_predicts_unseen_curves():
    points = curves()
    seen = [point for point in points if point.tokens < 1e7]
    law = fit_law(seen)
    assert set(law.values) == set(TRUE)
    assert not law.missing
    assert law.error < 2e-3
    for point in points:
        assert law.loss(point) == pytest.approx(point.loss, abs=0.01)
    other = Point("new", 2.5, 0.6, 5e7, 3e6, 0.0)
    assert law.loss(other) == pytest.approx(true_loss(2.5, 0.6, 5e7, 3e6), abs=0.02)
    assert law.slope_difference < 0.05


def test_unidentified_terms_are_left_out_with_a_reason():
    one_size = fit_law(curves(sizes=(5e7,)))
    assert set(one_size.values) == {"gamma", "D_C", "beta", "E"}
    assert one_size.missing == ("one model size: no delta, N_C and alpha",)
    one_rate = fit_law(curves(rates=(0.5,)))
    assert set(one_rate.values) == set(TRUE) - {"gamma"}
    assert one_rate.missing == ("one pruning rate: no gamma",)
    unknown = [Point("a", 0.0, 0.5, 5e7, t, true_loss(2.5, 0.5, 5e7, t)) for t in TOKENS]
    single = fit_law(unknown)
    assert set(single.values) == {"D_C", "beta", "E"}
    assert single.missing[-1] == "the loss of a dense model is not known: it is a part of E"
    assert all(single.loss(point) == pytest.approx(point.loss, abs=2e-3) for point in unknown)


@settings(deadline=None, max_examples=15)
@given(st.floats(0.1, 0.9), st.floats(0.15, 0.9), st.floats(0.001, 0.05))
def test_doubling_enough_tokens_gains_the_threshold(rate, beta, threshold):
    points = curves(rates=(rate,), sizes=(5e6,), beta=beta)
    law = fit_law(points)
    enough = law.enough(points[0], threshold)
    gain = law.loss(points[0], enough) - law.loss(points[0], 2 * enough)
    assert gain == pytest.approx(threshold, rel=1e-3)


def test_intervals_contain_the_parameters_of_a_noisy_curve():
    law = fit_law(curves(noise=0.01), resamples=25)
    assert set(law.intervals) == set(law.values)
    for name, (low, high) in law.intervals.items():
        assert low <= high, name
    low, high = law.intervals["beta"]
    assert low - 0.2 < TRUE["beta"] < high + 0.2
    assert fit_law(curves(noise=0.01), resamples=3) == fit_law(curves(noise=0.01), resamples=3)


def test_too_few_points_are_refused():
    points = curves(rates=(0.5,), sizes=(5e6,))
    with pytest.raises(
        AptError, match="at 4 different numbers of tokens at least, and there are 3"
    ):
        fit_law(points[:3])
    broken = [*points[:3], Point("a", 0, 0.5, 5e6, 0, 2.0), Point("a", 0, 0.5, 5e6, 1e6, math.nan)]
    with pytest.raises(AptError, match="there are 3"):
        fit_law(broken)


def test_flat_curve_is_reported_and_not_resampled():
    points = [Point("a", 0, 0.5, 1e8, tokens, 3.0) for tokens in np.geomspace(1e4, 1e6, 30)]
    law = fit_law(points, resamples=200)
    assert law.loss(points[0]) == pytest.approx(3.0, abs=1e-3)
    assert "the losses do not change with the tokens: D_C and beta mean nothing" in law.missing
    assert law.intervals == {}
