"""Each option of each command has the same value from the shell, a file and a program."""

import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.errors import AptError
from apt.options import ConfigOptions, read_options, write_options
from apt.options.declaration import _interval
from tests.helpers.commands import declared, kinds_of, needed_values, taken, words

CLASSES = {kind: name for name, act in declared().items() for kind in kinds_of(act).values()}
KINDS = [pytest.param(kind, name, id=f"{name} {kind.__name__}") for kind, name in CLASSES.items()]
RUNS = [param for param in KINDS if len(param.values[0].OPTIONS) > 2]
NAMES = st.text("abcdefgh0123456789", min_size=1, max_size=6).map("n{}".format)
# Options that have other values than their type says.
VALUES = {
    "sparsity": st.sampled_from(["0.25", "50%"]),
    "pattern": st.sampled_from(["2:4", "auto:8"]),
    "overrides": st.sampled_from([("*.q_proj=0.4",), ("*.a=2:4", "*.b=dense"), ("no pattern",)]),
    "tokens": st.integers(1, 10**7) | st.just("auto"),
    "sizes": st.dictionaries(st.sampled_from(["a", "b"]), st.integers(1, 999), min_size=1),
    "size": st.sampled_from(["73MiB", "1.5GB", "1000000", "5 bananas"]),
    "max_shard_size": st.sampled_from(["5GB", "500MB", "5 bananas"]),
    "scale_group": st.integers(1, 512) | st.just("row"),
}  # fmt: skip


def numbers(one):
    """Numbers in the range of an option, and some out of range."""
    _, low, high, _ = _interval(one.option.within or "(-1000, 1000)")
    if one.kind is int:
        return st.integers(max(int(low), -1000) - 1, int(min(high, 1e6)) + 1)
    return st.floats(max(low, -1e3) - 0.5, min(high, 1e6) + 0.5)


def values(one):
    """Values of an option that a shell can pass."""
    if one.name in VALUES and (one.name != "tokens" or one.option.read):
        return VALUES[one.name]
    if one.option.switches:
        return st.sampled_from([value for _, value, _ in one.option.switches])
    if one.choices:
        return st.sampled_from(one.choices)
    if one.kind is bool:
        flags = zip((True, False), one.flags, strict=True)
        return st.sampled_from([value for value, flag in flags if flag])
    if one.kind in (int, float):
        return numbers(one)
    if one.repeatable:
        item = get_args(one.kind)[0]
        items = st.integers(0, 99) if item is int else NAMES.map(item)
        return st.lists(items, min_size=1, max_size=3).map(tuple)
    return NAMES.map(Path) if one.kind is Path else NAMES


def strategies(kind):
    """The values of each option that the command line has, by name."""
    shown = (one for one in kind.OPTIONS if any(one.flags) or one.option.switches)
    return {one.name: values(one) for one in shown if one.name != "config"}


def outcome(act):
    """The result of a function, or the message, hint and options of its error."""
    try:
        return act()
    except AptError as error:
        return error.message, error.hint, error.options


def checked(kind, given):
    """Checked options, as a program makes them."""
    options = kind(**given)
    options.check()
    return options


def rest(name, but):
    """Arguments for the other required options of a command."""
    others = [kind for kind in kinds_of(declared()[name]).values() if kind is not but]
    return [word for kind in others for word in words(kind, needed_values(kind))]


def check(kind, name, given, folder):
    """Check that command and file give the options of the program, or the same error."""
    options = outcome(lambda: checked(kind, given))
    assert outcome(lambda: taken(name, [*words(kind, given), *rest(name, kind)])[kind]) == options
    saved = {one.name for one in kind.OPTIONS if one.option.saved}
    if isinstance(options, tuple) or not saved:
        return
    assert json.dumps(options.record(), default=str)
    path = folder / "options.toml"
    path.unlink(missing_ok=True)
    write_options(path, options)
    others = {option: value for option, value in given.items() if option not in saved}
    assert kind(**read_options(path, [kind]), **others) == options
    if ConfigOptions in kinds_of(declared()[name]).values():
        line = ["--config", str(path), *words(kind, others), *rest(name, kind)]
        assert taken(name, line)[kind] == options


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_each_option_is_the_same_in_shell_file_and_program(kind, name, tmp_path):
    @settings(max_examples=2, deadline=None)
    @given(st.fixed_dictionaries(strategies(kind)))
    def holds(values):
        for option, value in values.items():
            check(kind, name, needed_values(kind) | {option: value}, tmp_path)

    holds()


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_several_options_are_the_same_in_shell_file_and_program(kind, name, tmp_path):
    others = strategies(kind)
    needed = {option: others.pop(option) for option in needed_values(kind)}

    @settings(max_examples=10, deadline=None)
    @given(st.fixed_dictionaries(needed, optional=others))
    def holds(values):
        check(kind, name, values, tmp_path)

    holds()


def test_each_command_of_apt_is_tested():
    assert set(declared()) >= {
        "prune", "fit", "shrink", "recover", "reapply", "pack", "unpack", "export", "inspect",
        "verify", "check", "convert", "eval", "compare", "bench", "report", "law",
    }  # fmt: skip
