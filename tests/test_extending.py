"""The names that plugins import, and the errors for wrong results of plugins."""

import math
import subprocess
import sys

import pytest
import torch

import apt as library
from apt import AptError
from apt.extending import Trainable
from apt.hookspecs import CalibrationSpec, EvaluatorSpec
from apt.solver import Solution, ss
from tests.helpers.families import random_model, random_tokens

TOKENS = random_tokens(samples=4)
LAYER_WISE = library.PruneOptions(error_aware=False)


def wrong(change):
    """A method that changes its correct solution with ``change``."""

    def mine(*given):
        return change(ss(*given))

    return mine


def without_mask(found):
    found.weight[found.mask.nonzero(as_tuple=True)[0][0]] = 1
    return found


WRONG = {
    "nothing": (lambda s: None, "returns NoneType, not an apt.solver.Solution, for SITE"),
    "the weight": (lambda s: s.weight, "returns Tensor, not an apt.solver.Solution, for SITE"),
    "a pair": (lambda s: (s.weight, s.mask), "returns tuple, not an apt.solver.Solution"),
    "no mask": (lambda s: Solution(s.weight, None), "returns NoneType as a mask, not a tensor"),
    "transposed": (
        lambda s: Solution(s.weight.T[:, :8], s.mask), "returns a weight of (32, 8), not (32, 32)"
    ),
    "a mask of a row": (lambda s: Solution(s.weight, s.mask[0]), "a mask of (32,), not (32, 32)"),
    "doubles": (
        lambda s: Solution(s.weight.double(), s.mask), "of torch.float64, not torch.float32"
    ),
    "a mask of floats": (
        lambda s: Solution(s.weight, s.mask.float()), "a mask of torch.float32, not torch.bool"
    ),
    "elsewhere": (
        lambda s: Solution(s.weight.to("meta"), s.mask), "returns a weight on meta, not cpu"
    ),
    "not zero": (without_mask, "returns a weight of SITE that is not zero at its mask"),
    "not finite": (
        lambda s: Solution(s.weight.masked_fill(~s.mask, math.nan), s.mask),
        "returns a weight of SITE that is not finite; use more damping",
    ),
    "dense": (lambda s: Solution(s.weight + 1, s.mask & False), "removes fewer weights of SITE"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_result_of_a_method_is_a_one_line_error(name):
    change, expected_message = WRONG[name]
    model, site = random_model("llama"), "model.layers.0.self_attn.q_proj"
    with pytest.raises(AptError) as caught:
        library.prune(model, TOKENS, pattern="0.5", method=wrong(change), options=LAYER_WISE)
    message = str(caught.value)
    assert message.startswith("in model.layers.0: method mine ")
    assert expected_message.replace("SITE", site) in message
    assert site in message
    assert "\n" not in message
    assert "method" in caught.value.options


def smallest_columns(weight, gram, groups, options):
    """A `GroupChoice`, the same as group-magnitude."""
    return groups.lowest(weight.square().sum(0).view(groups.count, -1).sum(1))


def by_norm(model, adapter, tokens):
    """A `GroupScores`: the norm of the readers of each group."""
    return {
        name: {
            groups.kind: sum(
                block.get_submodule(reader).weight.square().sum(0).view(groups.count, -1).sum(1)
                for reader in groups.readers
            )
            for groups in adapter.groups(block, model.config)
        }
        for name, block in adapter.blocks(model)
    }


def last(model, adapter, tokens, count):
    """A `BlockChoice`, the same as the one named last."""
    return [name for name, _ in adapter.blocks(model)][-count:]


@pytest.mark.parametrize(
    ("method", "name", "size"),
    [
        (smallest_columns, "group-magnitude", {"sizes": {"channels": 32}}),
        (by_norm, "group-magnitude", {"sizes": {"channels": 32}}),
        (last, "last", {"mode": "depth", "keep": 0.66}),
        (last, "last", {"blocks": 2}),
    ],
)  # fmt: skip
def test_shrink_accepts_functions_and_names(method, name, size):
    results = []
    for given in (name, method):
        options = library.PruneOptions(error_aware=False, tuning_epochs=0)
        small, report = library.shrink(
            random_model("llama"), TOKENS, size=library.ShrinkOptions(**size), method=given,
            options=options,
        )  # fmt: skip
        results.append((small.state_dict(), report))
    (first, _), (second, report) = results
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert report.options["method"] == method.__name__


def nothing(*given):
    return None


REFUSED = {
    "any number": (nothing, {"blocks": 2}, "nothing is not a function of 2, of 3 or of 4 a"),
    "no function": (5, {"blocks": 2}, "method is 5; give its name, or a function"),
    "no blocks": (
        lambda m, a, t, c: None, {"blocks": 2},
        "method <lambda> returns None, not the names of 1 blocks; use another method",
    ),
    "too few blocks": (lambda m, a, t, c: [], {"blocks": 2}, "returns [], not the names of 1"),
    "unknown blocks": (lambda m, a, t, c: ["x"], {"blocks": 2}, "returns ['x'], not the names"),
    "no scores": (
        lambda m, a, t: None, {"sizes": {"channels": 32}},
        "method <lambda> returns no scores for the channels of model.layers.0",
    ),
    "scores of another shape": (
        lambda m, a, t: {n: {"channels": torch.ones(3)} for n, _ in a.blocks(m)},
        {"sizes": {"channels": 32}},
        "returns scores of shape (3,) for the channels of model.layers.0, not (64,)",
    ),
    "no score": (
        lambda m, a, t: {n: {"channels": torch.full((64,), math.nan)} for n, _ in a.blocks(m)},
        {"sizes": {"channels": 32}}, "returns a score that is NaN",
    ),
    "no mask": (
        lambda w, g, c, o: None, {"sizes": {"channels": 32}},
        "method <lambda> returns NoneType as a mask of groups, not a tensor, for model.layers",
    ),
    "indices": (
        lambda w, g, c, o: torch.arange(32), {"sizes": {"channels": 32}},
        "returns a mask of groups of (32,), not (64,)",
    ),
    "too many groups": (
        lambda w, g, c, o: torch.ones(64, dtype=torch.bool), {"sizes": {"channels": 32}},
        "removes 64 groups instead of 32, for model.layers.0.mlp.down_proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_result_of_a_choice_is_a_one_line_error(name):
    method, size, expected_message = REFUSED[name]
    with pytest.raises(AptError) as caught:
        library.shrink(
            random_model("llama"), TOKENS, size=library.ShrinkOptions(**size), method=method,
            options=LAYER_WISE,
        )  # fmt: skip
    assert expected_message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("returned", "expected_message"),
    [
        (None, "allocation mine returns NoneType, not the sparsities of the sites"),
        ([0.5], "allocation mine returns list, not the sparsities of the sites"),
        ({"a": None}, "allocation mine gives NoneType as the sparsity of a"),
        ({}, "allocation mine gives no value as the sparsity of model.layers.0.self_attn.q_proj"),
    ],
)
def test_wrong_result_of_an_allocation_is_a_one_line_error(returned, expected_message):
    def mine(given):
        return returned

    with pytest.raises(AptError, match=expected_message):
        library.prune(random_model("llama"), TOKENS, pattern="0.5", allocation=mine)


@pytest.mark.parametrize(
    ("returned", "expected_message"),
    [
        (lambda given: None, "recovery mine returns NoneType, not an apt.extending.Trainable"),
        (lambda given: given.model, "recovery mine returns LlamaForCausalLM, not an apt.ext"),
        (lambda given: Trainable(given.model), "without a parameter that needs gradients"),
    ],
)
def test_wrong_result_of_a_recovery_is_a_one_line_error(returned, expected_message):
    def mine(given):
        given.model.requires_grad_(False)
        return returned(given)

    model, options = random_model("llama"), library.RecoverOptions(steps=1, batch=1)
    with pytest.raises(AptError, match=expected_message):
        library.recover(model, TOKENS, kind=mine, options=options)


def test_wrong_result_of_a_metric_or_a_text_is_a_one_line_error():
    metric = EvaluatorSpec("mine", "", f"{__name__}:nothing")
    with pytest.raises(AptError, match="metric mine returns NoneType, not a number; use another"):
        metric.measure(None, None)
    for target, kind in (("nothing", "NoneType"), ("text", "str"), ("tokens", "Tensor")):
        text = CalibrationSpec("mine", "", f"{__name__}:{target}")
        with pytest.raises(AptError, match=f"data set 'mine' gives {kind} in place of documents"):
            list(text.documents("calibration"))


def tokens(split):
    return TOKENS


def text(split):
    return "one text is no iterable of texts"


def test_names_for_plugins_are_imported_on_use():
    code = """
import sys
import apt, apt.extending, apt.hookspecs, apt.testing.plugin
assert "torch" not in sys.modules
from apt.extending import Allocation, Method, Unallocated
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("given", [5, type(None), object()])
def test_object_that_is_neither_name_nor_function_is_refused(given):
    model, expected_message = random_model("llama"), "is .*; give its name, or a function"
    with pytest.raises(AptError, match=f"method {expected_message}"):
        library.prune(model, TOKENS, pattern="0.5", method=given)
    with pytest.raises(AptError, match=f"allocation {expected_message}"):
        library.prune(model, TOKENS, pattern="0.5", allocation=given)
    with pytest.raises(AptError, match=f"kind {expected_message}"):
        library.recover(model, TOKENS, kind=given)
