"""Metrics of single windows, and the intervals that follow from them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt.evaluation.windows import Windows, interval

POSITIVE = st.floats(0.01, 1000)
PAIRS = st.lists(st.tuples(POSITIVE, POSITIVE), min_size=2, max_size=20)


@given(PAIRS, st.sampled_from(["arithmetic", "geometric"]))
def test_an_interval_contains_its_value(pairs, mean):
    own, dense = (Windows(mean, list(values)) for values in zip(*pairs, strict=True))
    low, high = own.interval(dense)
    assert low <= own.value * (1 + 1e-9) + 1e-9
    assert high >= own.value * (1 - 1e-9) - 1e-9


@given(st.lists(POSITIVE, min_size=2, max_size=20), st.floats(0.1, 10))
def test_the_difficulty_of_the_text_is_no_uncertainty(values, factor):
    """A model that is worse by the same factor on every window has an interval of one point."""
    dense = Windows("geometric", values)
    own = Windows("geometric", [factor * value for value in values])
    assert own.interval(dense) == pytest.approx((own.value, own.value))


def test_intervals_are_those_of_the_formula():
    dense, own = Windows("arithmetic", [1.0, 2.0, 6.0]), Windows("arithmetic", [2.0, 4.0, 6.0])
    assert own.value == 4
    margin = 1.959964 * 1 / math.sqrt(3)  # the differences are 1, 2 and 0
    assert own.interval(dense) == pytest.approx((4 - margin, 4 + margin))
    dense, own = Windows("geometric", [1.0, 1.0]), Windows("geometric", [1.0, math.e])
    margin = 1.959964 * math.sqrt(0.5) / math.sqrt(2)
    assert own.interval(dense) == pytest.approx((math.exp(0.5 - margin), math.exp(0.5 + margin)))


def test_the_value_is_that_of_all_windows_at_once():
    tokens = torch.arange(12).reshape(4, 3)
    found = Windows.measure(lambda some: float(some.double().mean()), tokens, "arithmetic")
    assert found.values == [1, 4, 7, 10]
    assert found.value == 5.5
    row = {"windows": {"text": {"mean": found.record()}}}
    assert Windows.of(row, "text", "mean") == found


@pytest.mark.parametrize("values", [[], [1.0]])
def test_nothing_is_known_of_fewer_than_two_windows(values):
    record = {"mean": "arithmetic", "values": values}
    row = {"windows": {"text": {"accuracy": record}}}
    assert interval(row, row, "text", "accuracy") is None
    assert interval(row, {}, "text", "accuracy") is None
    assert interval({}, row, "text", "accuracy") is None


def test_values_that_are_no_number_have_no_number_as_interval():
    dense, own = Windows("geometric", [1.0, 2.0]), Windows("geometric", [math.nan, 2.0])
    assert math.isnan(own.value)
    assert all(math.isnan(end) for end in own.interval(dense))
