"""Weights of dead inputs are pruned first by every method, with exact counts."""

import pytest
import torch

import apt as library
from apt.plugin.registry import registry
from apt.solver import NM, Gram, Solution, SolverOptions, Unstructured, lowest, solve_live
from tests.helpers.families import random_model, random_tokens

METHODS = sorted(registry().methods.specs)
PATTERNS = [
    Unstructured(0.5, "layer"), Unstructured(0.5, "row"), Unstructured(0.35, "layer"),
    Unstructured(0.2, "row"), NM(2, 4), NM(1, 4), NM(5, 8),
]  # fmt: skip
DEAD = [0, 1, 2, 8, 9, 17, 24, 25, 26, 27]  # of 32: groups of four with 0 to 4 dead inputs


def layer(dead=DEAD, rows=12, width=32):
    """A weight, and a Gram matrix with dead inputs."""
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=draw) * 0.3 + torch.eye(width)
    inputs = torch.randn(6, 30, width, generator=draw) @ mixing + 0.2
    inputs[..., dead] = 0
    return torch.randn(rows, width, generator=draw), Gram.of(inputs)


def method(name):
    return registry().methods.get(name).load()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_weights_of_dead_inputs_are_pruned_before_live_ones(name, pattern):
    weight, gram = layer()
    result = solve_live(method(name), weight, gram, pattern, SolverOptions())
    counts, needed = pattern.zero_counts(result.mask)
    assert (counts == needed).all()
    assert not pattern.surplus(result.weight, weight)
    assert not result.weight[result.mask].any()
    dead = gram.dead.expand_as(weight)
    there, _ = pattern.zero_counts(dead)
    gone, _ = pattern.zero_counts(result.mask & dead)
    assert torch.equal(gone, there.clamp_max(needed))
    spared = dead & ~result.mask
    torch.testing.assert_close(result.weight[spared], weight[spared])


@pytest.mark.parametrize("name", METHODS)
def test_live_inputs_are_solved_without_the_dead_inputs(name):
    weight, gram = layer()
    live = ~gram.dead
    for per, left in (("row", 16 - len(DEAD)), ("layer", 12 * (16 - len(DEAD)))):
        size = int(live.sum()) * (1 if per == "row" else 12)
        rest = Unstructured(left / size, per)
        alone = method(name)(weight[:, live], gram.live, rest, SolverOptions())
        result = solve_live(method(name), weight, gram, Unstructured(0.5, per), SolverOptions())
        assert torch.equal(result.weight[:, live], alone.weight)
        assert (result.damping, result.residual) == (alone.damping, alone.residual)


def test_smallest_dead_weights_are_pruned_without_a_call_of_the_method():
    weight, gram = layer()
    for pattern in (Unstructured(0.1, "layer"), Unstructured(0.1, "row")):
        result = solve_live(None, weight, gram, pattern, SolverOptions())
        expected = lowest(weight.abs() + 100 * ~gram.dead, pattern)
        assert torch.equal(result.mask, expected)
        assert torch.equal(result.weight, weight.masked_fill(expected, 0))


def test_layers_with_no_or_only_dead_inputs_reach_the_method_unchanged():
    seen = []

    def spy(*given):
        seen.append(given)
        return Solution(given[0], given[0] == 0)

    for dead in ([], list(range(32))):
        weight, gram = layer(dead)
        given = (weight, gram, Unstructured(0.5, "row"), SolverOptions())
        solve_live(spy, *given)
        assert all(a is b for a, b in zip(seen.pop(), given, strict=True))


def test_n_m_mask_that_ignores_the_weights_is_corrected():
    """The method prunes the last two weights of each group, and doubles the others."""
    weight, gram = layer()
    last = torch.tensor([False, False, True, True]).repeat(8).expand_as(weight)

    def careless(weight, gram, pattern, options):
        return Solution((weight * 2).masked_fill(last, 0), last.clone())

    result = solve_live(careless, weight, gram, NM(2, 4), SolverOptions())
    first = result.mask[:, :4]  # three dead inputs
    assert torch.equal(first, lowest(weight[:, :4].abs() + 100 * ~gram.dead[:4], NM(2, 4)))
    assert result.mask[:, 8:10].all()
    assert torch.equal(result.weight[:, 10:12], weight[:, 10:12])  # kept instead, as they were
    assert torch.equal(result.weight[:, 4:8], 2 * weight[:, 4:8].masked_fill(last[:, 4:8], 0))


@pytest.mark.parametrize("name", ["admm", "ss", "magnitude"])
@pytest.mark.parametrize("aware", [False, True])
def test_pruned_model_keeps_no_weight_of_a_dead_input(name, aware):
    model = random_model("opt")
    block = model.model.decoder.layers[1]
    block.fc1.bias.data[:20] = -1e3  # ReLU gives zeros
    dense = block.fc2.weight.detach().clone()
    options = library.PruneOptions(error_aware=aware)
    given = {"pattern": "0.5", "method": name, "allocation": "uniform"}
    library.prune(model, random_tokens(), **given, options=options)
    assert dense[:, :20].all()
    assert not block.fc2.weight[:, :20].any()
    assert int((block.fc2.weight == 0).sum()) == dense.numel() // 2
