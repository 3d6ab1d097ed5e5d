"""The declaration of an option: a field of a frozen dataclass, with all that is known about it.

A field has a name, a type and a default. `option` adds its help, its range and the rest. From these
follow the flag of the command line, the entry of a TOML file, the check, the entry of the report
and the command that reproduces a run. This room imports no torch: mistakes are reported at once.
"""

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache, wraps
from pathlib import Path
from textwrap import fill
from types import NoneType
from typing import (
    Any,
    ClassVar,
    Literal,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from apt.errors import AptError
from apt.field_types import alternatives, misfit
from apt.locations.paths import expanded, portable

K = TypeVar("K", bound="Options")


@dataclass(frozen=True)
class Option:
    """What is declared about an option, beside the name, the type and the default of its field.

    Attributes:
        help: a sentence for users.
        panel: the heading in the help of a command.
        metavar: the placeholder for its value in the help.
        flag: the flag or the two flags, ``--yes/--no``; by default from the name. Empty for an
            option that programs alone have.
        short: a flag of one letter.
        switches: in place of a flag, one flag without a value for each value, with its help.
        positional: True for an argument of the command.
        within: the interval of a number, such as ``"(0, 1]"``.
        meaning: what the number is, for the error of a number outside.
        used_if: the attribute of a method's spec that is true if the method uses the option.
        needs: the option of the same command without which it has no effect, such as
            ``"quantize"``, or with the value that it needs, ``"mode=search"``.
        needs_in_run: the same, of an option whose value is known once the method is, see
            `Options.check_needed`.
        off: what a run without this option is, for the error of one that needs it.
        read: the value of a text, or of a list of texts.
        text: the inverse of ``read``.
        formerly: the name before the option was renamed. It is accepted with a warning, and it is
            the name in reports, whose entries do not change.
        saved: True if a file of options has it.
        recorded: False if reports do not have it.
        place: True if it may be a local path. Reports then have its last part alone.
        effect: False if the result does not depend on it, but for rounding.
    """

    help: str
    panel: str = ""
    metavar: str | None = None
    flag: str | None = None
    short: str = ""
    switches: tuple[tuple[str, Any, str], ...] = ()
    positional: bool = False
    within: str = ""
    meaning: str = ""
    used_if: str = ""
    needs: str = ""
    needs_in_run: str = ""
    off: str = ""
    read: Callable[[Any], Any] | None = None
    text: Callable[[Any], Any] = str
    formerly: str = ""
    saved: bool = True
    recorded: bool = True
    place: bool = False
    effect: bool = True


def option(
    help: str, *, default: Any = MISSING, default_factory: Any = MISSING, **declared: Any
) -> Any:
    """A field of an options class.

    Args:
        help: a sentence for users.
        default, default_factory: as in `dataclasses.field`.
        declared: other attributes of `Option`.
    """
    metadata = {"option": Option(help, **declared)}
    return field(default=default, default_factory=default_factory, metadata=metadata)


@dataclass(frozen=True)
class Declared:
    """An option of a class: its field, with what is declared about it.

    Attributes:
        name: the name of the field.
        default: its default; `dataclasses.MISSING` if a value must be given.
        kinds: the types that it may have.
        option: the declaration.
    """

    name: str
    default: Any
    kinds: tuple[Any, ...]
    option: Option

    @property
    def words(self) -> str:
        """The name in messages."""
        return self.name.replace("_", " ")

    @property
    def key(self) -> str:
        """The name in reports."""
        return self.option.formerly or self.name

    @property
    def kind(self) -> Any:
        """The type of a value that is not None; of several ones the first."""
        return next(kind for kind in self.kinds if kind is not NoneType)

    @property
    def repeatable(self) -> bool:
        """True if the value consists of several values."""
        return get_origin(self.kind) in (tuple, Mapping)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The possible values; empty for any."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def flags(self) -> tuple[str, str]:
        """The flag, and the flag for no; empty if there is none."""
        flag = f"--{self.name.replace('_', '-')}" if self.option.flag is None else self.option.flag
        yes, _, no = flag.partition("/")
        return yes, no

    @property
    def spelling(self) -> str:
        """The flags, for messages."""
        if self.option.switches:
            return ", ".join(flag for flag, _, _ in self.option.switches)
        return self.name.upper() if self.option.positional else "/".join(filter(None, self.flags))

    def check(self, value: Any) -> None:
        """Raise `AptError` if the value has another type, or is out of range."""
        if value is None and NoneType in self.kinds:
            return
        if self.choices and value not in self.choices:
            known = ", ".join(map(str, self.choices))
            raise self.error(f"{self.words} '{value}' is not one of {known}")
        if fault := misfit(value, self.kinds):
            raise self.error(f"{self.words} {fault}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.option.within and number and not _contains(self.option.within, value):
            fault = f"{self.words} is {value:.12g}; it must be {_in_words(self.option.within)}"
            raise self.error(fault, self.option.meaning)

    def error(self, fault: str, hint: str = "") -> AptError:
        """An error that refers to this option."""
        return AptError(fault, hint, (self.name,))


_INTERVAL = re.compile(r"([\[(])(.+), (.+)([\])])")


@cache
def _interval(text: str) -> tuple[bool, float, float, bool]:
    """The ends of an interval, and whether they belong to it."""
    parts = _INTERVAL.fullmatch(text)
    assert parts is not None, text
    low, high = (math.inf if end == "∞" else float(end) for end in (parts[2], parts[3]))
    return parts[1] == "[", low, high, parts[4] == "]"


def _contains(text: str, value: float) -> bool:
    with_low, low, high, with_high = _interval(text)
    above = low <= value if with_low else low < value
    return above and (value <= high if with_high else value < high)


def _in_words(text: str) -> str:
    with_low, low, high, with_high = _interval(text)
    least = f"at least {low:g}" if with_low else f"above {low:g}"
    if high == math.inf:
        return least
    if with_low and with_high:
        return f"from {low:g} to {high:g}"
    return f"{least} and {'at most' if with_high else 'below'} {high:g}"


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option, field))
def options(kind: type[K]) -> type[K]:
    """Make a frozen dataclass of options, whose fields are given by name.

    A text is accepted for a path, and a list for a tuple. A former name is accepted with a warning.
    """
    made: Any = dataclass(frozen=True, kw_only=True)(kind)
    plain = made.__init__
    made.OPTIONS = tuple(_declared(made))
    renamed = {one.option.formerly: one.name for one in made.OPTIONS if one.option.formerly}
    paths = {one.name for one in made.OPTIONS if Path in one.kinds}

    @wraps(plain)
    def init(self: Any, **given: Any) -> None:
        for old in renamed.keys() & given.keys():
            warn_renamed(old, renamed[old])
            given[renamed[old]] = given.pop(old)
        for name, value in given.items():
            if isinstance(value, str | Path) and name in paths:
                given[name] = expanded(value)
            elif isinstance(value, list):
                given[name] = tuple(value)
        plain(self, **given)

    made.__init__ = init
    made.__doc__ = f"{inspect.getdoc(kind)}\n\nArgs:\n" + "\n".join(map(_entry, made.OPTIONS))
    _classes.append(made)
    return kind


_classes: list[type["Options"]] = []


def flags_of(names: Iterable[str]) -> str:
    """`` (--samples, --seqlen)`` for options of these names; empty if there are none."""
    known = {one.name: one.spelling for kind in _classes for one in kind.OPTIONS}
    flags = [known.get(name, f"--{name.replace('_', '-')}") for name in names]
    return f" ({', '.join(flags)})" if flags else ""


def _entry(one: Declared) -> str:
    """The entry of an option in the docstring of its class, with names in place of flags."""
    said = re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), one.option.help)
    return fill(
        f"{one.name}: {said}", 96, initial_indent=" " * 4, subsequent_indent=" " * 8,
        break_on_hyphens=False,
    )  # fmt: skip


def warn_renamed(old: str, new: str) -> None:
    """Warn of a former name of an option."""
    warnings.warn(f"{old} is now {new}; the old name goes in the next release", stacklevel=3)


def _declared(kind: Any) -> Iterator[Declared]:
    """The options of a class; those of its first base class come first."""
    hints, known = get_type_hints(kind), {one.name: one for one in fields(kind)}
    for name in dict.fromkeys(_names(kind)):
        if "option" in known[name].metadata:
            made = known[name].metadata["option"]
            yield Declared(name, _default(known[name]), alternatives(hints[name]), made)


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _names(kind: type) -> Iterator[str]:
    """The names of the fields: those of the first base class first."""
    for base in kind.__bases__:
        yield from _names(base)
    yield from (name for name in inspect.get_annotations(kind) if name != "OPTIONS")


class Options:
    """The base of all classes of options."""

    OPTIONS: ClassVar[tuple[Declared, ...]] = ()

    def check(self) -> None:
        """Raise `AptError` if an option is out of range, or options contradict each other."""
        for one in self.OPTIONS:
            one.check(getattr(self, one.name))
        self._check_needs(vars(self), lambda declared: declared.needs)

    def check_needed(self, settings: Mapping[str, Any]) -> None:
        """Raise for an option that has no effect with the settings that a run has come to.

        Args:
            settings: the values of the options whose default depends on the method.

        Raises:
            AptError: an option that is on needs one that is off.
        """
        self._check_needs(settings, lambda declared: declared.needs_in_run)

    def _check_needs(self, values: Mapping[str, Any], needs_of: Callable[[Option], str]) -> None:
        known = {one.name: one for one in self.OPTIONS}
        for one in self.OPTIONS:
            name, _, wanted = needs_of(one.option).partition("=")
            value = getattr(self, one.name)
            if not name or not value or value == one.default:
                continue
            if values[name] == wanted if wanted else values[name]:
                continue
            other = known[name]
            without = other.option.off or f"without {wanted or other.words}"
            raise AptError(
                f"{one.words} has no effect {without}",
                f"leave it out, or add {wanted or other.words}",
                (one.name, name),
            )

    def check_used(self, spec: Any, known: Iterable[Any], what: str) -> None:
        """Raise for an option that a method does not use.

        Args:
            spec: the spec of the method.
            known: the specs of all methods, to name those that use the option.
            what: the word for a method, such as ``"recovery"``.

        Raises:
            AptError: an option has another value than its default, and ``spec`` does not use it.
        """
        for one in self.OPTIONS:
            if getattr(self, one.name) != one.default and not _uses(spec, one):
                others = ", ".join(other.name for other in known if _uses(other, one))
                hint = f"those that use it: {others}" if others else "leave it out"
                raise one.error(f"{what} {spec.name} does not use {one.words}", hint)

    def record(self) -> dict[str, Any]:
        """The options as values for JSON, by their names in reports."""
        return {
            one.key: _plain(one, getattr(self, one.name))
            for one in self.OPTIONS
            if one.option.recorded
        }


def _uses(spec: Any, one: Declared) -> bool:
    """True if the method of a spec uses an option: by an attribute, or by its list of options."""
    if one.option.used_if != "options":
        return not one.option.used_if or bool(getattr(spec, one.option.used_if))
    return spec.options is None or one.name in spec.options


def _plain(one: Declared, value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    if one.option.place and isinstance(value, str):
        return portable(value)
    return dict(value) if isinstance(value, Mapping) else value
