"""The choice of levels under a budget, against all choices where these are few."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.fit.choice import DoesNotFitError, choose, choose_first, lower_hull, smallest_size
from apt.fit.levels import FileForm, Level
from apt.fit.table import LossTable, MeasuredLevel

_LEVELS = st.lists(
    st.tuples(st.integers(1, 60), st.floats(0, 1, allow_subnormal=False)), min_size=1, max_size=4
)


def table_of(rows, rest=100):
    """A table with tensors a, b, … whose levels are pairs of a size and a loss."""
    tensors = {
        chr(97 + place): tuple(
            MeasuredLevel(f"l{index}", size, loss) for index, (size, loss) in enumerate(row)
        )
        for place, row in enumerate(rows)
    }
    return LossTable(tensors, rest, 0.5)


@given(st.lists(_LEVELS, min_size=1, max_size=6), st.integers(0, 460))
def test_file_never_exceeds_the_budget(rows, budget):
    table = table_of(rows)
    if budget < table.smallest:
        with pytest.raises(DoesNotFitError, match=f"{table.smallest:,} bytes"):
            choose(table, budget)
        return
    choice = choose(table, budget)
    assert choice.keys() == table.tensors.keys()
    assert table.size(choice) <= budget


@given(st.lists(_LEVELS, min_size=2, max_size=5), st.floats(0, 1))
def test_loss_is_near_the_least_of_all_choices(rows, share):
    table = table_of(rows)
    budget = round(table.smallest + share * (table.largest - table.smallest))
    all_choices = (
        dict(zip(table.tensors, names, strict=True))
        for names in product(*([x.name for x in levels] for levels in table.tensors.values()))
    )
    least = min(table.loss(c) for c in all_choices if table.size(c) <= budget)
    widest = max(x.loss for levels in table.tensors.values() for x in levels)
    # The Lagrangian relaxation is at most one level of one tensor away from the optimum.
    assert least - 1e-12 <= table.loss(choose(table, budget)) <= least + widest


@given(st.lists(_LEVELS, min_size=3, max_size=5), st.floats(0, 1))
def test_tied_tensors_have_one_level(rows, share):
    count = min(map(len, rows))
    table = replace(table_of([row[:count] for row in rows]), tied=(("a", "c"),))
    budget = round(table.smallest + share * (table.largest - table.smallest))
    if budget < table.joined().smallest:
        with pytest.raises(DoesNotFitError):
            choose(table, budget)
        return
    choice = choose(table, budget)
    assert choice.keys() == table.tensors.keys()
    assert choice["a"] == choice["c"]
    assert table.size(choice) <= budget
    joined = table.joined()
    assert joined.size({name: choice[name] for name in joined.tensors}) == table.size(choice)


def test_left_over_bytes_are_spent():
    table = table_of([[(10, 1.0), (20, 0.5), (30, 0.4)], [(10, 1.0), (13, 0.95)]], rest=0)
    choice = choose(table, 33)  # the best step of a leaves 3 bytes, which fit b alone
    assert choice == {"a": "l1", "b": "l1"}
    assert table.size(choice) == 33


def test_levels_that_are_no_better_for_more_bytes_are_never_chosen():
    table = table_of([[(10, 0.5), (20, 0.6), (30, 0.1)]], rest=0)
    assert choose(table, 29) == {"a": "l0"}
    assert [level.name for level in lower_hull(table.tensors["a"])] == ["l0", "l2"]


@given(st.lists(_LEVELS, min_size=1, max_size=4))
def test_record_of_a_table_reads_as_the_same_table(rows):
    table = table_of(rows)
    assert LossTable.read(table.record()) == table


@pytest.mark.parametrize(
    "record",
    [None, {}, {"rest": 1}, {"rest": 1, "tensors": {"a": []}}, {"rest": "x", "tensors": []}],
)
def test_damaged_record_is_an_error(record):
    with pytest.raises(ValueError, match="table of losses"):
        LossTable.read(record)


@given(st.lists(_LEVELS, min_size=1, max_size=6), st.integers(0, 400), st.randoms())
def test_outputs_of_uncertain_sizes_never_exceed_the_budget(rows, more, random):
    table = table_of(rows)
    form = FileForm(
        {
            name: [Level(x.name, x.size + random.randint(0, 20)) for x in levels]
            for name, levels in table.tensors.items()
        },
        table.rest,
    )
    budget, written = smallest_size(form) + more, table.rest
    names = list(table.tensors)
    while names:
        first, names = names[:2], names[2:]
        left = {name: table.tensors[name] for name in (*first, *names)}
        choice = choose_first(LossTable(left, written), first, form, budget)
        assert choice.keys() == left.keys()
        for name in first:  # the real size may be any size up to the largest
            largest = form.level(name, choice[name]).size
            written += random.choice([largest, random.randint(0, largest)])
        assert written <= budget
