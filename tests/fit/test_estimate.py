"""The table of losses of a smaller model, estimated from that of the whole model."""

from apt.fit.estimate import estimated_table
from apt.fit.levels import FileForm, Level
from apt.fit.table import LossTable, MeasuredLevel
from apt.patterns import Unstructured

GRID = object()


def test_losses_are_those_of_the_kept_tensors_times_the_kept_share():
    rows = (MeasuredLevel("bf16", 160, 0.0), MeasuredLevel("q4_0", 40, 0.8))
    table = LossTable({"0.a": rows, "1.a": rows, "2.a": (*rows, MeasuredLevel("q2_K", 20, 3.0))}, 7)
    levels = (Level("bf16", 120), Level("q4_0", 30, GRID), Level("q5_1", 36, GRID))
    form = FileForm({"0.a": levels, "1.a": levels}, 5)
    found = estimated_table(table, form, {"0.a": "0.a", "1.a": "2.a"})
    expected = (MeasuredLevel("bf16", 120, 0.0), MeasuredLevel("q4_0", 30, 0.8 * 30 / 40))
    assert dict(found.tensors) == {"0.a": expected, "1.a": expected}
    assert found.rest == 5


def test_sizes_that_depend_on_the_values_are_shares_of_those_of_the_whole_tensor():
    half = Unstructured(0.5)
    rows = (MeasuredLevel("bf16", 160, 0.0), MeasuredLevel("int4 50%", 32, 0.8))
    levels = (Level("bf16", 120, None, None, int), Level("int4 50%", 36, GRID, half, int))
    found = estimated_table(LossTable({"a": rows}, 7), FileForm({"a": levels}, 5), {"a": "a"})
    zeros = MeasuredLevel("int4 50%", 24, 0.8 * 120 / 160)
    assert dict(found.tensors) == {"a": (MeasuredLevel("bf16", 120, 0.0), zeros)}
    levels = (levels[0], Level("bf16 50%", 70, None, half, int))
    known = (rows[0], MeasuredLevel("bf16 50%", 80, 0.4))
    found = estimated_table(LossTable({"a": known}, 7), FileForm({"a": levels}, 5), {"a": "a"})
    assert found.tensors["a"][1] == MeasuredLevel("bf16 50%", 60, 0.4 * 120 / 160)
