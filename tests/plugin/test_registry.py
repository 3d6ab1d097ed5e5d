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


def test_builtin_specs_come_from_entry_points():
    assert set(registry().adapters.specs) >= {"llama", "opt", "bloom", "mamba"}
    assert set(registry().methods.specs) >= {"ss", "sm", "ms", "mm", "magnitude", "wanda"}
    assert registry().adapters.origins["llama"].distribution.startswith("apt-prune ")


def test_all_targets_import():
    installed = registry()
    for group in (installed.adapters, installed.methods, installed.calibrations):
        for spec in group.specs.values():
            assert callable(spec.load())


def test_plugin_adds_to_the_builtin_specs(entry):
    found = load_registry(
        [*entry_points(group="apt"), entry("mine", apt_adapters=adapters("mine"))]
    )
    assert found.adapters.get("MINE").name == "mine"
    assert found.adapters.origins["mine"].distribution == "mine 1.2"
    assert "llama" in found.adapters.specs


def test_broken_plugin_is_a_warning(entry):
    broken = entry("broken", error=True)
    with pytest.warns(UserWarning, match=r"broken 1\.2: ModuleNotFoundError"):
        found = load_registry([broken, entry("mine", apt_adapters=adapters("mine"))])
    assert found.adapters.get("mine")
    with pytest.raises(AptError, match=r"no adapter 'theirs'.*failed to load: broken 1\.2"):
        found.adapters.get("theirs")


def test_hook_that_raises_or_returns_invalid_specs_is_a_warning(entry):
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
def test_spec_with_wrong_types_is_a_warning(name, entry):
    make, expected = WRONG_SPECS[name]
    wrong, mine = entry("wrong", apt_adapters=lambda: [make()]), adapters("mine")
    with pytest.warns(UserWarning, match=re.escape(expected)):
        found = load_registry([wrong, entry("good", apt_adapters=mine)])
    assert found.adapter_for("mine").name == "mine"


def test_plugin_that_exits_is_a_warning(entry, monkeypatch, tmp_path):
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
    ("load", "expected"),
    [
        (lambda spec: spec.make(), "nowhere.at.all:Mine of 'mine' does not load: No module named"),
        (lambda spec: spec.zoo_path(), "nowhere:zoo of 'mine' does not load: No module named"),
        (lambda spec: replace(spec, target="pathlib:Pat").make(), "has no attribute 'Pat'"),
        (lambda spec: replace(spec, target="builtins:memoryview").make(), "TypeError: memoryview"),
    ],
)  # fmt: skip
def test_target_that_does_not_load_is_an_error_of_one_line(load, expected):
    spec = AdapterSpec("mine", "", "nowhere.at.all:Mine", zoo="nowhere:zoo")
    with pytest.raises(AptError, match=re.escape(expected)) as caught:
        load(spec)
    assert caught.value.hint == "reinstall or upgrade its package"


@pytest.mark.parametrize("names", [("mine", "mine"), ("mine", "Mine"), ("Mine", "mine")])
def test_two_plugins_with_one_name_are_an_error_with_both_names(entry, names):
    twice = [
        entry(distribution, apt_adapters=adapters(name))
        for distribution, name in zip(("one", "two"), names, strict=True)
    ]
    with pytest.raises(AptError, match=rf"adapter '{names[1]}' comes from one 1\.2 and two 1\.2"):
        load_registry(twice)


def test_misspelled_hook_is_an_error(entry):
    with pytest.raises(AptError, match=r"^plugin mine 1\.2: unknown hook 'apt_adaptors';"):
        load_registry([entry("mine", apt_adaptors=adapters("mine"))])


def test_two_adapters_for_one_type_are_an_error(entry):
    def both():
        return [AdapterSpec(name, "", "x:y", model_types=("t",)) for name in ("one", "two")]

    found = load_registry([entry("mine", apt_adapters=both)])
    with pytest.raises(AptError, match=r"'one' and 'two' all serve 't'; choose one"):
        found.adapter_for("t")
    with pytest.raises(AptError, match="no adapter serves models of type 'other'"):
        found.adapter_for("other")


def test_default_method_has_the_highest_rank_of_apt(entry):
    def methods():
        return [MethodSpec("best", "", "x:y", rank=1000), MethodSpec("worst", "", "x:y", rank=1)]

    mine = entry("mine", apt_methods=methods)
    assert load_registry([*entry_points(group="apt"), mine]).default_method().name == "admm"
    assert load_registry([mine]).default_method().name == "best"


def test_wrapper_hook_is_refused_with_its_name(entry):
    point = entry("mine", apt_adapters=adapters("mine"))
    module = sys.modules[point.module]

    def apt_site_pruned(event):
        yield

    module.apt_site_pruned = hookimpl(wrapper=True)(apt_site_pruned)
    with pytest.warns(UserWarning, match=r"mine 1\.2: .*apt_site_pruned cannot be a wrapper"):
        found = load_registry([point])
    assert not found.observers
    assert not found.adapters.specs


def test_unknown_names_list_the_problems_of_all_hooks(entry):
    def raising():
        raise OSError("no such thing")

    with pytest.warns(UserWarning, match="failed to load"):
        found = load_registry([entry("late", apt_calibrations=raising)])
    with pytest.raises(
        AptError, match=r"no adapter 'x'.*failed to load: late 1\.2: OSError: no such"
    ):
        found.adapters.get("x")


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (API + 1, rf"needs version {API + 1} of the hooks, this APT has {API}: upgrade apt-prune"),
        (OLDEST_API - 1, rf"has {OLDEST_API} and later: upgrade the plugin"),
        ("1", "APT_API is '1', not a whole number"),
    ],
)
def test_unsupported_hook_version_is_a_warning_with_a_remedy(entry, version, expected):
    other = entry("other", apt_adapters=adapters("other"))
    sys.modules["plugin_other"].APT_API = version
    with pytest.warns(UserWarning, match=rf"other 1\.2: \w+: .*{expected}"):
        found = load_registry([other, entry("mine", apt_adapters=adapters("mine"))])
    assert list(found.adapters.specs) == ["mine"]


def test_supported_hook_version_is_accepted(entry):
    mine = entry("mine", apt_adapters=adapters("mine"))
    sys.modules["plugin_mine"].APT_API = API
    assert load_registry([mine]).adapters.get("mine")


@pytest.mark.parametrize("disable", ["mine", "other, MINE", "main", "*"])
def test_disabled_plugins_are_not_loaded(entry, disable):
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


def test_default_method_without_methods_is_an_error(entry):
    broken = entry("broken", error=True)
    found = load_registry([broken], "broken")
    with pytest.raises(AptError, match="no method is installed"):
        found.default_method()


def test_offers_lists_specs_and_observers(entry):
    found = load_registry(
        [entry("mine", apt_adapters=adapters("a", "b"), apt_site_pruned=lambda event: None)]
    )
    (plugin,) = found.plugins.values()
    assert found.offers(plugin) == ["a", "b", "an observer"]


def test_observer_that_raises_is_not_called_again(entry):
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


def test_fields_of_a_subclass_of_a_spec_are_not_checked():
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


def test_exceptions_of_plugins_do_not_end_the_program(entry):
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


def test_keyboard_interrupt_while_plugins_load_is_raised(entry):
    with pytest.raises(KeyboardInterrupt):
        load_registry([entry("slow", apt_adapters=interrupt)])
