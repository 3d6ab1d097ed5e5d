"""Metrics of single windows, and the intervals that follow from them."""

import math
import statistics

import pytest
import torch
from apt_lab.windows import Windows, quantile, score, score_beside, spread
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from apt.plugin.specs import EvaluatorSpec

POSITIVE = st.floats(0.01, 1000)
PAIRS = st.lists(st.tuples(POSITIVE, POSITIVE), min_size=2, max_size=20)


class Times(nn.Module):
    """A module that multiplies by a number."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, values):
        return self.factor * values


def mean_of(model, tokens, dense=None):
    """The mean of the outputs, or of their differences from the dense ones."""
    return (model(tokens).double() - (0 if dense is None else dense(tokens))).mean()


def metric(mean, dense=False):
    return EvaluatorSpec("mean", "", f"{__name__}:mean_of", mean=mean, dense=dense)


@given(PAIRS, st.sampled_from(["arithmetic", "geometric"]))
def test_interval_contains_the_value(pairs, mean):
    own, dense = (Windows(mean, list(values)) for values in zip(*pairs, strict=True))
    found = own.spread(dense)
    assert found.low <= own.value * (1 + 1e-9) + 1e-9
    assert found.high >= own.value * (1 - 1e-9) - 1e-9


@given(st.lists(POSITIVE, min_size=2, max_size=20), st.floats(0.1, 10))
def test_difficulty_of_the_windows_does_not_widen_the_interval(values, factor):
    """A model that is worse by the same factor on every window has an interval of one point."""
    dense = Windows("geometric", values)
    own = Windows("geometric", [factor * value for value in values])
    found = own.spread(dense)
    assert (found.low, found.high) == pytest.approx((own.value, own.value))
    assert found.error == pytest.approx(0, abs=1e-6 * own.value)


def test_intervals_follow_the_formula():
    dense, own = Windows("arithmetic", [1.0, 2.0, 6.0]), Windows("arithmetic", [2.0, 4.0, 6.0])
    assert own.value == 4
    found, error = own.spread(dense), 1 / math.sqrt(3)  # the differences are 1, 2 and 0
    assert found.error == pytest.approx(error)
    assert (found.low, found.high) == pytest.approx((4 - 4.303 * error, 4 + 4.303 * error))
    dense, own = Windows("geometric", [1.0, 1.0]), Windows("geometric", [1.0, math.e])
    found, error = own.spread(dense), math.sqrt(0.5) / math.sqrt(2)
    assert found.error == pytest.approx(math.exp(0.5) * error)
    assert found.high == pytest.approx(math.exp(0.5 + 12.706 * error))


@pytest.mark.parametrize("degrees", [1, 2, 3, 15, 30, 31, 60, 1000])
def test_quantiles_equal_those_of_students_distribution(degrees):
    assert quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1.5e-3)


def test_value_equals_the_metric_of_all_windows():
    tokens = torch.arange(12).reshape(4, 3)
    value, found = score(metric("arithmetic"), nn.Identity(), tokens, None)
    assert found.values == [1, 4, 7, 10]
    assert found.value == value == 5.5
    assert score(metric(None), nn.Identity(), tokens, None) == (5.5, None)
    row = {"windows": {"text": {"mean": found.record()}}}
    assert Windows.of(row, "text", "mean") == found


def test_score_has_the_interval_of_the_differences():
    tokens = torch.tensor([[1.0, 3.0], [4.0, 8.0], [6.0, 6.0]])
    found = score_beside(metric("arithmetic"), Times(2), tokens, Times(1))
    assert (found.value, found.dense) == (28 / 3, 14 / 3)
    expected = Windows("arithmetic", [4, 12, 12]).spread(Windows("arithmetic", [2, 6, 6]))
    assert found.spread == expected
    found = score_beside(metric("arithmetic", dense=True), Times(2), tokens, Times(1))
    assert (found.value, found.dense) == (14 / 3, None)
    assert found.spread.error == pytest.approx(statistics.stdev([2, 6, 6]) / math.sqrt(3))
    assert (found.spread.low + found.spread.high) / 2 == pytest.approx(14 / 3)
    assert score_beside(metric(None), Times(2), tokens, Times(1)).spread is None


@pytest.mark.parametrize("values", [[], [1.0]])
def test_fewer_than_two_windows_have_no_interval(values):
    record = {"mean": "arithmetic", "values": values}
    row = {"windows": {"text": {"accuracy": record}}}
    assert spread(row, row, "text", "accuracy") is None
    assert spread(row, {}, "text", "accuracy") is None
    assert spread({}, row, "text", "accuracy") is None


def test_values_that_are_not_finite_have_no_interval():
    dense, own = Windows("geometric", [1.0, 2.0]), Windows("geometric", [math.nan, 2.0])
    assert math.isnan(own.value)
    assert own.spread(dense) is None
