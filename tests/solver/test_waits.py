"""Solves ask a device for no numbers in loops over columns; on a CPU too, which never waits."""

from pathlib import Path

import pytest

from apt import devices
from apt.solver import NM, Gram, SolverOptions, mm, ss
from tests.helpers.problems import problem

DEVICE = devices.default_device()
METHODS = [ss, mm] if devices.is_accelerator(DEVICE) else [mm]  # on a CPU, numpy selects mask S


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_waits_for_the_device_do_not_grow_with_the_width(method, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from transfers import Questions

    asked = []
    for width in (128, 512):
        weight, gram = problem(3, 32, width)
        there = Gram.from_sum(gram.matrix.to(DEVICE), gram.tokens)
        options = SolverOptions(tolerance=1.0)  # one step of conjugate gradients
        with Questions(DEVICE) as questions:
            method(weight.to(DEVICE), there, NM(2, 4), options)
        asked.append(questions.found.total())
    assert asked[0] == asked[1]
