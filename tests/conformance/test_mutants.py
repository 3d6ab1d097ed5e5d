"""Each mutant fails a check with the right message, and correct adapters pass all checks."""

import re

import pytest

from apt.conformance.outcomes import outcome, outcomes
from apt.hookspecs import AdapterSpec
from apt.plugin.registry import registry
from apt.testing import CHECKS, Subject
from tests.conformance.mutants import HARMLESS, MUTANTS
from tests.conformance.mutants.leaks import LEAKS, ONCE, leaking, process_kept, several
from tests.conformance.mutants.models import LLAMA, MODELS, RIGHT
from tests.helpers.families import CONFIGS, random_model, random_tokens
from tests.helpers.releases import EXTRAS

TOKENS = random_tokens(2, 16)


def problem(check, adapter, model, spec=None):
    """The lines that a check reports about an adapter."""
    return outcome(check, Subject(adapter, model, TOKENS, spec)).problem


PARTS = {
    "eager": ("blocks", "batches", "logits", "capture"),
    "short": ("batches", "logits"),
    "jamba, three experts": ("groups",),
}
"""The checks that the mutants of a model are for; the adapters pass all in test_checks.py."""


# The others are those of the shipped adapters, see test_checks.py.
@pytest.mark.parametrize("name", [n for n in RIGHT if n not in CONFIGS and n != "llava"])
def test_correct_adapters_pass_on_the_models_of_the_mutants(name):
    adapter, model = RIGHT[name](), MODELS[name]()
    for check in PARTS.get(name, CHECKS):
        assert not problem(check, adapter, model), check


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=EXTRAS if m.check == "effects" else ()) for n, m in MUTANTS.items()],
)
def test_each_mutant_is_caught_with_its_fault_and_place(name):
    mutant = MUTANTS[name]
    lines = problem(mutant.check, mutant.adapter(), MODELS[mutant.model]()).splitlines()
    assert any(re.search(mutant.message, line) for line in lines), lines
    assert all(re.search(r"conformance/mutants/\w+\.py:\d+\)$", line) for line in lines), lines


@pytest.mark.parametrize("name", HARMLESS)
def test_groups_with_equivalent_outputs_pass(name):
    adapter, model = HARMLESS[name]
    assert not problem("groups", adapter(), MODELS[model]())


WHERE = {
    ("running", False): "running",
    ("running", True): "running",
    ("enter", False): "untouched",
    ("enter", True): "exception",
    ("step", False): "untouched",
    ("capture", False): "untouched",
    ("capture", True): "exception",
}


@pytest.mark.parametrize("leak", [leak for leak in LEAKS if leak not in ONCE])
@pytest.mark.parametrize(("where", "on_error"), WHERE)
def test_side_effects_are_caught_with_their_name(where, on_error, leak):
    adapter, model = leaking(leak, where, on_error)(), random_model("llama")
    with process_kept():
        message = problem(WHERE[where, on_error], adapter, model)
    assert re.search(f"^{where} {LEAKS[leak]}{_when(on_error)} ", message, re.MULTILINE), message


def _when(on_error):
    return " when an exception ends it" if on_error else ""


@pytest.mark.parametrize(("where", "on_error"), WHERE)
def test_repeated_side_effects_are_caught_in_a_full_run(where, on_error):
    adapter, model = leaking(several, where, on_error)(), random_model("llama")
    with process_kept():
        found = outcomes(Subject(adapter, model, TOKENS))
        message = next(o.problem for o in found if o.name == WHERE[where, on_error])
    for leak in ONCE:
        text = f"^{where} {LEAKS[leak]}{_when(on_error)} "
        assert re.search(text, message, re.MULTILINE), (leak, message)


MINE = {"name": "mine", "summary": "Mine", "target": "mine:Mine", "example": "mine:example"}
TYPES = {
    "mistyped": (("lama",), "name 'lama', its example is a 'llama'"),
    "empty": ((), "model_types of adapter 'mine' is empty, its example is a 'llama'"),
    "another family's": (("opt",), "name 'opt', its example is a 'llama'"),
    "one is mistyped": (("llama", "mistrall"), "of type 'mistrall': did you mean 'mistral'"),
    "one is another's": (("llama", "bloom"), "'bloom' is claimed by adapter 'bloom' as well"),
}


@pytest.mark.parametrize(("types", "message"), TYPES.values(), ids=TYPES)
def test_wrong_model_types_are_a_fault(types, message):
    spec = AdapterSpec(**MINE, model_types=types)
    assert message in problem("model_types", LLAMA(), random_model("llama"), spec)


@pytest.mark.parametrize("name", ["llama", "auto"])
def test_correct_model_types_pass(name):
    spec = registry().adapters.get(name)
    assert not problem("model_types", LLAMA(), random_model("llama"), spec)


DECLARED = {
    "left_dense": ("mlp.gate", "left_dense is 'mlp.gate', not a tuple: write ('mlp.gate',)"),
    "inputs": (LLAMA.inputs[0], "inputs is Input('attention', …), not a tuple"),
    "blocks_path": (("model", "layers"), "blocks_path is ('model', 'layers'), not the path"),
    "transposed": (("Conv1D",), "transposed has 'Conv1D', which is not of type type"),
    "enter": (None, "has no 'enter'"),
}


@pytest.mark.parametrize("name", DECLARED)
def test_wrong_declarations_are_caught_with_their_name(name):
    value, message = DECLARED[name]
    adapter = type("Wrong", (LLAMA,), {name: value})()
    assert message in problem("declaration", adapter, random_model("llama"))
