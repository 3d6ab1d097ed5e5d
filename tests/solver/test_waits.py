"""Loops over columns read no values back from the device. The count works on a CPU too."""

from pathlib import Path

import pytest

from apt import devices
from apt.solver import NM, Gram, SolverOptions, mm, ss
from tests.helpers.problems import problem

DEVICE = devices.default_device()
METHODS = [ss, mm] if devices.is_accelerator(DEVICE) else [mm]  # on a CPU, numpy selects mask S


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_number_of_waits_does_not_depend_on_the_width(method, monkeypatch):
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
