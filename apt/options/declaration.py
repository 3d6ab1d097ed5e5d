"""The declaration of an option, as a field of a frozen dataclass.

A field has a name, a type and a default. `option` adds its help, its range and other attributes.
The flag of the command line, the entry of a TOML file, the check, the entry of the report and the
command that reproduces a run follow from them. This package does not import torch, so that a
mistake is reported at once.
"""

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
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
    """The declaration of an option, without the name, the type and the default of its field.

    Attributes:
        help: a sentence for users.
        panel: the heading in the help of a command.
        metavar: the placeholder for its value in the help.
        flag: the flag or the two flags, ``--yes/--no``; by default from the name. Empty for an
            option without a flag, for programs alone.
        short: a flag of one letter.
        switches: a flag without a value for each possible value, as (flag, value, help).
        positional: True for an argument of the command.
        within: the interval of a number, such as ``"(0, 1]"``.
        meaning: the meaning of the number, for the error of a number out of range.
        used_if: the attribute of a method's spec that is true if the method uses the option.
        needs: another option of the same command, without which this option has no effect, such as
            ``"quantize"``, or with the needed value, ``"mode=search"``.
        needs_in_run: as ``needs``, for an option whose default depends on the method, see
            `Options.check_needed`.
        off: the words for a run without this option, for the error of an option that needs it.
        read: a function from a text, or from a list of texts, to the value.
        text: the inverse of ``read``.
        formerly: the former name of a renamed option. It is accepted with a warning, and it stays
            the name in reports, whose entries do not change.
        saved: True if files of options contain it.
        recorded: False if reports do not contain it.
        place: True if it may be a local path. Reports then contain its last part alone.
        effect: False if the result does not depend on it, except for rounding.
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
    help: str, *, default: Any = MISSING, default_factory: Any = MISSING, **attributes: Any
) -> Any:
    """A field of an options class.

    Args:
        help: a sentence for users.
        default, default_factory: as in `dataclasses.field`.
        attributes: other attributes of `Option`.
    """
    metadata = {"option": Option(help, **attributes)}
    return field(default=default, default_factory=default_factory, metadata=metadata)


@dataclass(frozen=True)
class Declared:
    """An option of a class: its field and its declaration.

    Attributes:
        name: the name of the field.
        default: its default; `dataclasses.MISSING` if a value must be given.
        kinds: the possible types of the value.
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
        """The first type beside None."""
        return next(kind for kind in self.kinds if kind is not NoneType)

    @property
    def repeatable(self) -> bool:
        """True if the value consists of several values."""
        return get_origin(self.kind) in (tuple, Mapping)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The possible values; empty if any value is possible."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def flags(self) -> tuple[str, str]:
        """The flag, and the flag for no; each is empty if there is none."""
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
            choices = ", ".join(map(str, self.choices))
            raise self.error(f"{self.words} '{value}' is not one of {choices}")
        if problem := misfit(value, self.kinds):
            raise self.error(f"{self.words} {problem}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.option.within and number and not _contains(self.option.within, value):
            problem = f"{self.words} is {value:.12g}; it must be {_in_words(self.option.within)}"
            raise self.error(problem, self.option.meaning)

    def error(self, message: str, hint: str = "") -> AptError:
        """An error that refers to this option."""
        return AptError(message, hint, (self.name,))


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
    """A decorator: make a frozen dataclass of options, whose fields are keyword arguments.

    A path may be a text, and a tuple may be a list. A former name is accepted with a warning.
    """
    cls: Any = dataclass(frozen=True, kw_only=True)(kind)
    plain_init = cls.__init__
    cls.OPTIONS = tuple(_declarations(cls))
    renamed = {
        declared.option.formerly: declared.name
        for declared in cls.OPTIONS
        if declared.option.formerly
    }
    paths = {declared.name for declared in cls.OPTIONS if Path in declared.kinds}

    @wraps(plain_init)
    def init(self: Any, **values: Any) -> None:
        for former in renamed.keys() & values.keys():
            warn_renamed(former, renamed[former])
            values[renamed[former]] = values.pop(former)
        for name, value in values.items():
            if isinstance(value, str | Path) and name in paths:
                values[name] = expanded(value)
            elif isinstance(value, list):
                values[name] = tuple(value)
        plain_init(self, **values)

    cls.__init__ = init
    cls.__doc__ = f"{inspect.getdoc(kind)}\n\nArgs:\n" + "\n".join(
        map(_docstring_entry, cls.OPTIONS)
    )
    _classes.append(cls)
    return kind


_classes: list[type["Options"]] = []


def flags_of(names: Iterable[str]) -> str:
    """The flags of options, such as `` (--samples, --seqlen)``; empty without names."""
    spellings = {declared.name: declared.spelling for kind in _classes for declared in kind.OPTIONS}
    flags = [spellings.get(name, f"--{name.replace('_', '-')}") for name in names]
    return f" ({', '.join(flags)})" if flags else ""


def _docstring_entry(declared: Declared) -> str:
    """The entry of an option in the docstring of its class, with names in place of flags."""
    text = re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), declared.option.help)
    return fill(
        f"{declared.name}: {text}", 96, initial_indent=" " * 4, subsequent_indent=" " * 8,
        break_on_hyphens=False,
    )  # fmt: skip


def warn_renamed(old: str, new: str) -> None:
    """Warn of a former name of an option."""
    warnings.warn(f"{old} is now {new}; the old name goes in the next release", stacklevel=3)


def _declarations(kind: Any) -> Iterator[Declared]:
    """The options of a class; the options of its first base class come first."""
    hints, by_name = get_type_hints(kind), {field_.name: field_ for field_ in fields(kind)}
    for name in dict.fromkeys(_field_names(kind)):
        field_ = by_name[name]
        if "option" in field_.metadata:
            factory, declaration = field_.default_factory, field_.metadata["option"]
            default = field_.default if factory is MISSING else factory()
            yield Declared(name, default, alternatives(hints[name]), declaration)


def _field_names(kind: type) -> Iterator[str]:
    """The names of the fields; the fields of the first base class come first."""
    for base in kind.__bases__:
        yield from _field_names(base)
    yield from (name for name in inspect.get_annotations(kind) if name != "OPTIONS")


class Options:
    """The base of all classes of options."""

    OPTIONS: ClassVar[tuple[Declared, ...]] = ()

    def check(self) -> None:
        """Raise `AptError` if an option is out of range, or options contradict each other."""
        for declared in self.OPTIONS:
            declared.check(getattr(self, declared.name))
        self._check_needs(vars(self), lambda declaration: declaration.needs)

    def check_needed(self, settings: Mapping[str, Any]) -> None:
        """Raise for an option that has no effect with the final settings of a run.

        Args:
            settings: the values of the options whose default depends on the method.

        Raises:
            AptError: an option is on, and the option that it needs is off.
        """
        self._check_needs(settings, lambda declaration: declaration.needs_in_run)

    def _check_needs(self, values: Mapping[str, Any], needs_of: Callable[[Option], str]) -> None:
        by_name = {declared.name: declared for declared in self.OPTIONS}
        for declared in self.OPTIONS:
            needed, _, needed_value = needs_of(declared.option).partition("=")
            value = getattr(self, declared.name)
            if not needed or not value or value == declared.default:
                continue
            if values[needed] == needed_value if needed_value else values[needed]:
                continue
            needed_option = by_name[needed]
            without = needed_option.option.off or f"without {needed_value or needed_option.words}"
            raise AptError(
                f"{declared.words} has no effect {without}",
                f"leave it out, or add {needed_value or needed_option.words}",
                (declared.name, needed),
            )

    def check_used(self, spec: Any, specs: Iterable[Any], what: str) -> None:
        """Raise for an option that a method does not use.

        Args:
            spec: the spec of the method.
            specs: the specs of all methods, to name the methods that use the option.
            what: the word for a method, such as ``"recovery"``.

        Raises:
            AptError: an option has another value than its default, and ``spec`` does not use it.
        """
        for declared in self.OPTIONS:
            if getattr(self, declared.name) != declared.default and not _uses(spec, declared):
                users = ", ".join(user.name for user in specs if _uses(user, declared))
                hint = f"those that use it: {users}" if users else "leave it out"
                raise declared.error(f"{what} {spec.name} does not use {declared.words}", hint)

    def record(self) -> dict[str, Any]:
        """The options as values for JSON, by their names in reports."""
        return {
            declared.key: _json_value(declared, getattr(self, declared.name))
            for declared in self.OPTIONS
            if declared.option.recorded
        }


def _uses(spec: Any, declared: Declared) -> bool:
    """True if a spec says that its method uses an option, by an attribute or a list of options."""
    if declared.option.used_if != "options":
        return not declared.option.used_if or bool(getattr(spec, declared.option.used_if))
    return spec.options is None or declared.name in spec.options


def _json_value(declared: Declared, value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    if declared.option.place and isinstance(value, str):
        return portable(value)
    return dict(value) if isinstance(value, Mapping) else value
