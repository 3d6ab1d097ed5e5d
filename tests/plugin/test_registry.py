"""Loading plugins: one by one, and with errors that name the distribution."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any

import pytest

from apt.errors import AptError
from apt.hookspecs import API, OLDEST_API, AdapterSpec, EvaluatorSpec, MethodSpec, hookimpl
from apt.plugin.registry import load_registry, registry


def adapters(*names):
    return lambda: [AdapterSpec(name, "", "x:y", model_types=(name,)) for name in names]


def test_builtins_come_through_entry_points():
    assert set(registry().adapters.specs) >= {"llama", "opt", "bloom", "mamba"}
    assert set(registry().methods.specs) >= {"ss", "sm", "ms", "mm", "magnitude", "wanda"}
    assert registry().adapters.origins["llama"].distribution.startswith("apt-prune ")


def test_every_target_imports():
    installed = registry()
    for group in (installed.adapters, installed.methods, installed.calibrations):
        for spec in group.specs.values():
            assert callable(spec.load())


def test_a_plugin_adds_to_the_builtins(entry):
    found = load_registry(
        [*entry_points(group="apt"), entry("mine", apt_adapters=adapters("mine"))]
    )
    assert found.adapters.get("MINE").name == "mine"
    assert found.adapters.origins["mine"].distribution == "mine 1.2"
    assert "llama" in found.adapters.specs


def test_a_broken_plugin_is_a_warning_and_the_rest_works(entry):
    broken = entry("broken", error=True)
    with pytest.warns(UserWarning, match=r"broken 1\.2: ModuleNotFoundError"):
        found = load_registry([broken, entry("mine", apt_adapters=adapters("mine"))])
    assert found.adapters.get("mine")
    with pytest.raises(AptError, match=r"no adapter 'theirs'.*failed to load: broken 1\.2"):
        found.adapters.get("theirs")


def test_a_hook_that_raises_or_returns_rubbish_is_a_warning(entry):
    def rubbish():
        return ["llama"]

    def raising():
        raise OSError("no such thing")

    with pytest.warns(UserWarning, match="failed to load") as caught:
        load_registry([entry("a", apt_adapters=rubbish), entry("b", apt_methods=raising)])
    assert {str(w.message) for w in caught} == {
        "plugin failed to load: a 1.2: TypeError: 'llama' is not of type AdapterSpec",
        "plugin failed to load: b 1.2: OSError: no such thing",
    }


WRONG_SPECS = {
    "no comma": (
        lambda: AdapterSpec("mine", "", "x:y", model_types="xllama"),
        "AdapterSpec 'mine': model_types is 'xllama', not a tuple: write ('xllama',)",
    ),
    "no types": (
        lambda: AdapterSpec("mine", "", "x:y", model_types=None), "model_types is None, not a tuple"
    ),
    "no name": (lambda: AdapterSpec(None, "", "x:y"), "AdapterSpec None: name is None, not str"),
    "a number": (
        lambda: AdapterSpec("mine", "", "x:y", model_types=("t", 3)), "has 3, which is not str"
    ),
    "a choice": (
        lambda: EvaluatorSpec("m", "", "x:y", mean="any"),
        "mean is 'any', not 'arithmetic' or 'geometric' or None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_SPECS)
def test_a_spec_of_wrong_types_is_a_warning_and_the_rest_works(name, entry):
    make, said = WRONG_SPECS[name]
    wrong, mine = entry("wrong", apt_adapters=lambda: [make()]), adapters("mine")
    with pytest.warns(UserWarning, match=re.escape(said)):
        found = load_registry([wrong, entry("good", apt_adapters=mine)])
    assert found.adapter_for("mine").name == "mine"


def test_a_plugin_that_exits_is_a_warning_and_the_rest_works(entry, monkeypatch, tmp_path):
    def leave():
        raise SystemExit("no licence")

    (tmp_path / "plugin_script.py").write_text("raise SystemExit('usage: script FILE')")
    monkeypatch.syspath_prepend(tmp_path)
    found = [entry("script", error=True), entry("leaving", apt_adapters=leave)]
    with pytest.warns(UserWarning, match="failed to load") as caught:
        registry = load_registry([*found, entry("good", apt_adapters=adapters("mine"))])
    assert {str(w.message).partition(": ")[2] for w in caught} == {
        "script 1.2: SystemExit: usage: script FILE",
        "leaving 1.2: SystemExit: no licence",
    }
    assert list(registry.adapters.specs) == ["mine"]


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (lambda spec: spec.make(), "nowhere.at.all:Mine of 'mine' does not load: No module named"),
        (lambda spec: spec.zoo_path(), "nowhere:zoo of 'mine' does not load: No module named"),
        (lambda spec: replace(spec, target="pathlib:Pat").make(), "has no attribute 'Pat'"),
        (lambda spec: replace(spec, target="builtins:memoryview").make(), "TypeError: memoryview"),
    ],
)  # fmt: skip
def test_a_target_that_does_not_load_is_one_line(load, said):
    spec = AdapterSpec("mine", "", "nowhere.at.all:Mine", zoo="nowhere:zoo")
    with pytest.raises(AptError, match=re.escape(said)) as caught:
        load(spec)
    assert caught.value.hint == "reinstall or upgrade its package"


@pytest.mark.parametrize("names", [("mine", "mine"), ("mine", "Mine"), ("Mine", "mine")])
def test_two_plugins_with_one_name_are_an_error_that_names_both(entry, names):
    twice = [
        entry(distribution, apt_adapters=adapters(name))
        for distribution, name in zip(("one", "two"), names, strict=True)
    ]
    with pytest.raises(AptError, match=rf"adapter '{names[1]}' comes from one 1\.2 and two 1\.2"):
        load_registry(twice)


def test_a_misspelled_hook_is_an_error(entry):
    with pytest.raises(AptError, match=r"^plugin mine 1\.2: unknown hook 'apt_adaptors';"):
        load_registry([entry("mine", apt_adaptors=adapters("mine"))])


def test_two_adapters_for_one_type_must_be_chosen_from(entry):
    def both():
        return [AdapterSpec(name, "", "x:y", model_types=("t",)) for name in ("one", "two")]

    found = load_registry([entry("mine", apt_adapters=both)])
    with pytest.raises(AptError, match=r"'one' and 'two' all serve 't'; choose one"):
        found.adapter_for("t")
    with pytest.raises(AptError, match="no adapter serves models of type 'other'"):
        found.adapter_for("other")


def test_the_default_method_is_the_highest_ranked_of_apts_own(entry):
    def methods():
        return [MethodSpec("best", "", "x:y", rank=1000), MethodSpec("worst", "", "x:y", rank=1)]

    mine = entry("mine", apt_methods=methods)
    assert load_registry([*entry_points(group="apt"), mine]).default_method().name == "admm"
    assert load_registry([mine]).default_method().name == "best"


def test_a_hook_that_wraps_others_is_refused_by_name(entry):
    point = entry("mine", apt_adapters=adapters("mine"))
    module = sys.modules[point.module]

    def apt_site_pruned(event):
        yield

    module.apt_site_pruned = hookimpl(wrapper=True)(apt_site_pruned)
    with pytest.warns(UserWarning, match=r"mine 1\.2: .*apt_site_pruned cannot be a wrapper"):
        found = load_registry([point])
    assert not found.observers
    assert not found.adapters.specs


def test_all_problems_are_told_whichever_hook_they_came_from(entry):
    def raising():
        raise OSError("no such thing")

    with pytest.warns(UserWarning, match="failed to load"):
        found = load_registry([entry("late", apt_calibrations=raising)])
    with pytest.raises(
        AptError, match=r"no adapter 'x'.*failed to load: late 1\.2: OSError: no such"
    ):
        found.adapters.get("x")


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (API + 1, rf"needs version {API + 1} of the hooks, this APT has {API}: upgrade apt-prune"),
        (OLDEST_API - 1, rf"has {OLDEST_API} and later: upgrade the plugin"),
        ("1", "APT_API is '1', not a whole number"),
    ],
)
def test_a_plugin_for_other_hooks_is_a_warning_that_says_what_to_upgrade(entry, version, said):
    other = entry("other", apt_adapters=adapters("other"))
    sys.modules["plugin_other"].APT_API = version
    with pytest.warns(UserWarning, match=rf"other 1\.2: \w+: .*{said}"):
        found = load_registry([other, entry("mine", apt_adapters=adapters("mine"))])
    assert list(found.adapters.specs) == ["mine"]


def test_a_plugin_may_say_for_which_hooks_it_is(entry):
    mine = entry("mine", apt_adapters=adapters("mine"))
    sys.modules["plugin_mine"].APT_API = API
    assert load_registry([mine]).adapters.get("mine")


@pytest.mark.parametrize("disable", ["mine", "other, MINE", "main", "*"])
def test_plugins_can_be_left_out(entry, disable):
    mine = entry("mine", apt_adapters=adapters("mine"))
    broken = entry("broken", error=True)
    ours = [point for point in entry_points(group="apt") if point.dist.name == "apt-prune"]
    found = load_registry([*ours, mine, broken], f"broken {disable}")
    assert "llama" in found.adapters.specs
    assert [p.distribution for p in found.plugins.values() if p.disabled] == [
        "mine 1.2",
        "broken 1.2",
    ]
    with pytest.raises(AptError, match=r"APT_DISABLE_PLUGINS leaves out mine 1\.2, broken 1\.2"):
        found.adapters.get("mine")


def test_without_any_method_the_default_one_is_an_error(entry):
    broken = entry("broken", error=True)
    found = load_registry([broken], "broken")
    with pytest.raises(AptError, match="no method is installed"):
        found.default_method()


def test_what_a_plugin_offers(entry):
    found = load_registry(
        [entry("mine", apt_adapters=adapters("a", "b"), apt_site_pruned=lambda event: None)]
    )
    (plugin,) = found.plugins.values()
    assert found.offers(plugin) == ["a", "b", "an observer"]


def test_observers_are_told_and_one_that_raises_is_left_out(entry):
    seen = []

    def good(event):
        seen.append(event)

    def careless():
        seen.append("told")

    def bad(event):
        raise KeyError(event)

    found = load_registry(
        [
            entry("bad", apt_site_pruned=bad),
            entry("good", apt_site_pruned=good),
            entry("careless", apt_site_pruned=careless),
        ]
    )
    with pytest.warns(
        UserWarning, match=r"observer failed and is left out: bad 1\.2:main: KeyError"
    ):
        found.site_pruned(1)
    found.site_pruned(2)
    assert [x for x in seen if x != "told"] == [1, 2]
    assert seen.count("told") == 2


def test_fields_that_a_subclass_adds_are_its_own_concern():
    @dataclass(frozen=True)
    class Larger(AdapterSpec):
        notes: dict[str, Any] = field(default_factory=dict)
        made: Callable[[], Any] | None = None

    assert Larger("mine", "", "x:y", made=dict).notes == {}
    with pytest.raises(TypeError, match="AdapterSpec 'mine': zoo is 1, not str or None"):
        Larger("mine", "", "x:y", zoo=1)


class Sudden(BaseException):
    pass


def suddenly(*arguments):
    raise Sudden("at once")


def test_no_exception_of_a_plugin_ends_the_program(entry):
    with pytest.warns(UserWarning, match=r"bad 1\.2: Sudden: at once"):
        found = load_registry([entry("good", apt_adapters=adapters("a")),
                               entry("bad", apt_adapters=suddenly)])  # fmt: skip
    assert set(found.adapters.specs) == {"a"}
    point = entry("worse")
    vars(point)["load"] = suddenly
    with pytest.warns(UserWarning, match=r"worse 1\.2: Sudden: at once"):
        assert load_registry([point]).plugins["worse 1.2:main"].problem == "Sudden: at once"


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_ctrl_c_while_plugins_load_is_none_of_their_exceptions(entry):
    with pytest.raises(KeyboardInterrupt):
        load_registry([entry("slow", apt_adapters=interrupt)])
