"""All registered methods: independence of layout, dtype, device and size of the inputs."""

import pytest
import torch
from torch import nn

from apt.plugin.registry import registry
from apt.solver import NM, Gram, SolverError, SolverOptions, Unstructured, relative_layer_error

METHODS = sorted(registry().methods.specs)
PATTERNS = [NM(2, 4), Unstructured(0.5)]
OPTIONS = [SolverOptions(), SolverOptions(block_size=8)]


def problem(out, width=128, seed=0):
    """A weight (out, width) and correlated inputs (tokens, width), in fp32."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * width, width, generator=generator)
    inputs @= torch.eye(width) + 0.2 * torch.randn(width, width, generator=generator)
    return torch.randn(out, width, generator=generator), inputs


def solved(name, weight, gram, pattern, options):
    return registry().methods.get(name).load()(weight, gram, pattern, options)


def same(result, expected):
    return torch.equal(result.weight, expected.weight) and torch.equal(result.mask, expected.mask)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("out", [1, 5])
def test_transposed_layout_gives_the_same_solution_and_no_write(name, pattern, out):
    weight, inputs = problem(out)
    gram = Gram.of(inputs)
    for options in OPTIONS:
        expected = solved(name, weight.clone(), gram, pattern, options)
        given = weight.T.contiguous().T  # as the weight of a Conv1D is stored
        before = gram.matrix.clone()
        result = solved(name, given, gram, pattern, options)
        assert torch.equal(given, weight)
        assert torch.equal(gram.matrix, before)
        torch.testing.assert_close(result.weight, expected.weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("exponent", [-53, -40, 31, 50])  # 1e-16, 1e-12, 2e9, 1e15
def test_relative_error_does_not_depend_on_the_size_of_inputs(name, exponent):
    weight, inputs = problem(6)
    loss = [
        relative_layer_error(weight, result.weight, gram.matrix)
        for gram in (Gram.of(inputs), Gram.of(inputs * 2.0**exponent))
        if (result := solved(name, weight, gram, NM(2, 4), SolverOptions()))
    ]
    assert loss[1] == pytest.approx(loss[0], rel=0.1)  # dsnot's thresholds are not relative


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradients_and_autocast_do_not_change_the_solution(name, pattern):
    weight, inputs = problem(6)
    expected = solved(name, weight, Gram.of(inputs), pattern, SolverOptions())
    parameter = nn.Parameter(weight.clone())
    with torch.autocast("cpu", torch.bfloat16):
        gram = Gram.of(inputs.requires_grad_())
        result = solved(name, parameter, gram, pattern, SolverOptions())
    assert same(result, expected)
    assert not result.weight.requires_grad
    assert not gram.matrix.requires_grad
    assert torch.equal(parameter, weight)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "magnitude"])
def test_inputs_that_are_not_finite_raise_solver_error(name):
    weight, inputs = problem(4)
    inputs[3, 5] = torch.nan
    with pytest.raises(SolverError, match="not finite"):
        solved(name, weight, Gram.of(inputs), NM(2, 4), SolverOptions())


@pytest.mark.parametrize("name", METHODS)
def test_default_device_does_not_change_the_solution(name):
    weight, inputs = problem(4)
    gram = Gram.of(inputs)
    expected = solved(name, weight, gram, NM(2, 4), SolverOptions())
    with torch.device("meta"):
        result = solved(name, weight, Gram.of(inputs), NM(2, 4), SolverOptions())
    assert same(result, expected)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_default_dtype_does_not_change_the_solution(name, pattern):
    weight, inputs = problem(4)
    expected = solved(name, weight, Gram.of(inputs), pattern, SolverOptions())
    torch.set_default_dtype(torch.float64)
    try:
        result = solved(name, weight, Gram.of(inputs), pattern, SolverOptions())
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(result, expected)
