"""The protocol of patterns, and kinds of patterns that other packages add."""

from dataclasses import dataclass
from importlib.metadata import entry_points

import pytest
import torch

import apt as library
from apt.errors import AptError
from apt.hookspecs import MethodSpec, PatternSpec
from apt.patterns import NM, ColumnGroups, MixedNM, Pattern, Unstructured
from apt.planning.plan import Selection, read_pattern
from apt.plugin.registry import load_registry, registry
from apt.testing import check_pattern
from tests.helpers.families import random_model, random_tokens
from tests.plugin.conftest import entry

__all__ = ["entry"]  # the fixture


@dataclass(frozen=True)
class Columns(Pattern):
    """A kind with the required methods alone: the first columns are pruned for all scores."""

    count: int
    kind = "first"

    @classmethod
    def parse(cls, text):
        return cls(int(text.removeprefix("first-"))) if text.startswith("first-") else None

    def __str__(self):
        return f"first-{self.count}"

    @property
    def sparsity(self):
        return 0.5

    def required(self, shape):
        return shape[0] * self.count

    def shortfall(self, weight):
        return "the first columns are not zero" if weight[:, : self.count].any() else ""

    def lowest(self, scores, per="layer", offset=0):
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[:, : max(0, self.count - offset)] = True
        return mask


@pytest.fixture
def added(entry, monkeypatch):
    """A function that adds a plugin with the kind `Columns`, or another, to the registry."""

    def add(target="tests.patterns.test_protocol:Columns", methods=()):
        spec = PatternSpec("first", "the first columns", target, "first-8")
        hooks = {"apt_patterns": lambda: [spec], "apt_methods": lambda: methods}
        result = load_registry([*entry_points(group="apt"), entry("columns", **hooks)])
        monkeypatch.setattr("apt.planning.plan.registry", lambda: result)
        monkeypatch.setattr("apt.engine.api.registry", lambda: result)
        monkeypatch.setattr("apt.engine.caller_model.registry", lambda: result)
        monkeypatch.setattr("apt.engine.pruning_plan.registry", lambda: result)
        return result

    return add


def test_kinds_that_ship_are_registered_by_the_hook():
    known = registry().patterns
    assert [spec.load() for spec in known.specs.values() if known.is_own(spec)] == [
        Unstructured, NM, MixedNM
    ]  # fmt: skip
    assert all(spec.load().kind == spec.name for spec in known.specs.values())


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5), Unstructured(0.37), NM(2, 4), NM(5, 8), NM(1, 3)], ids=str
)
def test_kinds_that_ship_pass_check_pattern(pattern):
    check_pattern(pattern, (20, 48))


def test_minimal_kind_of_a_plugin_passes_check_pattern(added):
    added()
    check_pattern(Columns(8), (20, 48))


def test_check_pattern_refuses_a_mask_of_a_wrong_count(added, monkeypatch):
    added()
    right = Columns.lowest
    monkeypatch.setattr(Columns, "lowest", lambda *given, **more: ~right(*given, **more))
    with pytest.raises(
        AssertionError, match="first-8 of 20 × 48 weights, not kept: the mask of lowest"
    ):
        check_pattern(Columns(8), (20, 48))


def test_check_pattern_refuses_a_text_of_another_kind(monkeypatch):
    monkeypatch.setattr(NM, "__str__", lambda self: str(self.sparsity))
    with pytest.raises(AssertionError, match="not kept: its text is read as of the kind n:m"):
        check_pattern(NM(2, 4), (20, 48))


def test_model_is_pruned_to_a_pattern_of_a_plugin(added):
    added()
    model = random_model("llama")
    report = library.prune(model, random_tokens(), pattern="first-8", method="wanda")
    for site in report.sites:
        weight = model.get_parameter(f"{site.name}.weight")
        assert not weight[:, :8].any()
        assert weight[:, 8:].all()
        assert site.pattern == "first-8"


def test_override_may_have_a_pattern_of_a_plugin(added):
    added()
    model = random_model("llama")
    chosen = Selection(overrides=(("*.q_proj", "first-8"),))
    report = library.prune(
        model, random_tokens(), pattern=0.5, method="magnitude", selection=chosen
    )
    kinds = {site.name.rpartition(".")[2]: site.pattern for site in report.sites}
    assert (kinds["q_proj"], kinds["k_proj"]) == ("first-8", "0.5")


def test_method_refuses_patterns_that_its_spec_does_not_name(added):
    own = [MethodSpec("only24", "", "apt.solver:ss", patterns=("n:m",))]
    added(methods=own)
    model, tokens = random_model("llama"), random_tokens()
    for method, pattern in (("dsnot", "first-8"), ("mm", "first-8"), ("only24", "0.5")):
        with pytest.raises(AptError, match=f"{method} does not prune to {pattern}") as refused:
            library.prune(model, tokens, pattern=pattern, method=method)
        names = refused.value.hint.removeprefix("choose one of ").split(", ")
        assert "wanda" in names
        assert method not in names
    library.prune(model, tokens, pattern="2:4", method="only24")


def test_function_as_method_prunes_to_all_patterns(added):
    added()
    magnitude = registry().methods.get("magnitude").load()
    report = library.prune(random_model("llama"), random_tokens(), pattern="first-8",
                           method=magnitude)  # fmt: skip
    assert report.sites[0].pattern == "first-8"


def test_error_of_an_unreadable_pattern_names_the_forms_of_plugins(added):
    added()
    with pytest.raises(AptError, match=r"'half' is neither .* such as 2:4 or .*first-8"):
        read_pattern("half")


def test_kind_that_does_not_load_leaves_other_kinds_usable(added):
    added("no_such_module:Columns")
    assert read_pattern("2:4") == NM(2, 4)
    assert read_pattern("50%") == Unstructured(0.5)
    with pytest.raises(AptError, match="no_such_module:Columns of 'first' does not load"):
        read_pattern("first-8")


def test_kind_that_returns_no_pattern_is_refused_in_one_line(added, monkeypatch):
    added()
    monkeypatch.setattr(Columns, "parse", lambda text: 0.5)
    with pytest.raises(AptError, match="pattern 'first-8' is read as float, not as an apt.solver"):
        read_pattern("first-8")


def test_column_groups_count_groups_and_weights():
    groups, weight = ColumnGroups(4, 3), torch.ones(5, 8)
    assert groups.required((5, 8)) == 10
    assert groups.shortfall(weight) == "too few of its 4 groups are zero: 3 of 4 groups are kept"
    weight[:, 2:4] = 0
    assert not groups.shortfall(weight)
    weight[:, 6:] = 0
    assert groups.surplus(weight, torch.ones(5, 8)) == 1
