"""Writes the reference pages from the code: cli.md, hooks.md, api.md and report.md."""

import inspect
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from typer.main import get_command

import apt
from apt import adapter, console, events, extending, hookspecs, runtime, solver, testing
from apt import options as apt_options
from apt.cli import app
from apt.distributed.ranks import Work
from apt.plugin import hookspecs as hooks

FOLDER = Path(__file__).parent
SPECS = (
    hookspecs.AdapterSpec, hookspecs.FormatSpec, hookspecs.ExportSpec, hookspecs.MethodSpec,
    hookspecs.PatternSpec,
    hookspecs.ShrinkMethodSpec, hookspecs.AllocationSpec, hookspecs.RecoverySpec,
    hookspecs.CalibrationSpec, hookspecs.EvaluatorSpec, hookspecs.CommandSpec,
)  # fmt: skip
DECLARED = (
    adapter.Site, adapter.Input, adapter.Extra, adapter.Call, adapter.Groups, adapter.Part,
    adapter.Permutable,
)  # fmt: skip
HELPERS = (
    adapter.Experts, adapter.one_by_one, adapter.WeightTap, adapter.record_calls,
    adapter.stubbed, adapter.rows, adapter.columns, adapter.mlp_channels, adapter.attention_heads,
    adapter.attention_values, adapter.permutable_channels, adapter.routings, adapter.Routing,
    adapter.Unrouted,
)  # fmt: skip
METHODS = (extending.Method,)
CHOICES = (
    extending.GroupScores, extending.BlockChoice, extending.ExpertChoice, extending.RoutedExperts,
    extending.loss_without,
)  # fmt: skip
ALLOCATIONS = (
    extending.Allocation, extending.Unallocated, extending.Plan, extending.PlannedBlock,
    extending.PlannedSite, extending.unstructured, extending.sparsity_of,
)  # fmt: skip
RECOVERIES = (
    extending.Recovery, extending.Unrecovered, extending.Trainable, extending.train_only,
    extending.next_token_loss, extending.Teacher, extending.divergence, extending.relative_error,
)  # fmt: skip
TEXTS = (extending.read_file, extending.hub_documents)
RUNNING = (extending.eval_mode, extending.enter, extending.Batch)
OPENING = (
    extending.registry, extending.Registry, extending.Source, extending.Opened,
    extending.open_skeleton, extending.load, extending.load_tokenizer, extending.choose_device,
    extending.read_dtype, extending.capped, extending.check_vocabulary,
    extending.check_same_vocabulary,
)  # fmt: skip
OPTIONS = (apt_options.option, apt_options.Option, apt_options.options, apt_options.Options)
SHARED = (
    apt_options.AdapterOptions, apt_options.TokenizerOptions, apt_options.RemoteOptions,
    apt_options.DeviceOptions, apt_options.DtypeOptions, apt_options.PrintingOptions,
)  # fmt: skip
EXPORTS = (extending.Export, extending.Exportable, extending.Exported)
FORMATS = (extending.Checkpoint, extending.find_file, extending.Finding, extending.try_import)
EVENTS = (events.BlockStarted, events.Working, events.SitePruned, events.BlockTuned)
_MODULES = re.compile(r"\b(?:[a-z_]+\.)+(?=[A-Za-z_])")
_FUNCTIONS = re.compile(r"<\w+ [\w.<> ]*?at 0x[0-9a-f]+>")
_UNPACKED = re.compile(r"\*<class '(?:\w+\.)*(\w+)'>")
_WIDTH = 96
_COMPLETION = ("install_completion", "show_completion")  # typer's own
_PLACEHOLDERS = {"int": "N", "float": "X", "Path": "PATH"}


def entry(thing: Any, level: str = "###", name: str | None = None) -> str:
    """A heading, the signature, and the docstring as it is written."""
    name = name or thing.__name__
    signature = "" if _has_no_signature(thing) else _signature(thing)
    return _entry(level, name, _head(name, signature), inspect.getdoc(thing))


def interface(kind: Any) -> str:
    """The entry of a protocol: of a function with one signature, or of an object with members."""
    if "__call__" not in vars(kind):
        return "\n".join([entry(kind), *members(kind)])
    head = _head("function", _signature(kind.__call__).replace("self, ", "", 1))
    said = f"{inspect.getdoc(kind)}\n\n{inspect.getdoc(kind.__call__)}"
    return _entry("###", kind.__name__, head, said)


def whole(thing: Any) -> str:
    """The entry of anything, with the members of a class."""
    if _is_interface(thing):
        return interface(thing)
    return "\n".join([entry(thing), *(members(thing) if isinstance(thing, type) else ())])


def members(thing: type) -> Iterator[str]:
    """The public methods and properties of a class."""
    for name, value in vars(thing).items():
        if name.startswith("_") or any(name in vars(base) for base in thing.__mro__[1:]):
            continue  # the entry of the base class has it
        if isinstance(value, property | cached_property):
            function: Any = value.fget if isinstance(value, property) else value.func
            kind = _plain(inspect.formatannotation(function.__annotations__["return"]))
            yield _entry("####", name, f"{name}: {kind}", inspect.getdoc(value))
        function = getattr(value, "__func__", value)  # of a class method
        own = getattr(function, "__qualname__", "") == f"{thing.__qualname__}.{name}"
        if inspect.isfunction(function) and own:  # not the default of a field
            yield entry(function, "####")


def _entry(level: str, name: str, head: str, said: str | None) -> str:
    return f"{level} `{name}`\n\n```text\n{head}\n\n{said or ''}\n```\n"


def _head(name: str, signature: str) -> str:
    return name + (signature if len(name + signature) <= _WIDTH else _wrapped(signature))


def _signature(thing: Any) -> str:
    """The signature without the modules of its types."""
    return _plain(str(inspect.signature(thing)))


def _plain(text: str) -> str:
    text = _UNPACKED.sub(r"Unpack[\1]", text)
    return _FUNCTIONS.sub("...", _MODULES.sub("", text).replace("~", ""))


def _wrapped(signature: str) -> str:
    """A signature with a line for each parameter."""
    inside, _, result = signature[1:].rpartition(")")
    lines, depth = [""], 0
    for letter in inside:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            lines.append("")
        else:
            lines[-1] += letter
    return "(\n" + "".join(f"    {line.strip()},\n" for line in lines) + f"){result}"


def _has_no_signature(thing: Any) -> bool:
    error = isinstance(thing, type) and _is_error(thing)
    return error or not callable(thing) or _is_interface(thing)


def _is_interface(thing: Any) -> bool:
    return bool(getattr(thing, "_is_protocol", False))


def _is_error(thing: type) -> bool:
    return issubclass(thing, BaseException) and "__init__" not in vars(thing)


def page(title: str, *parts: str | Iterable[str]) -> str:
    """A page: text as it is, entries one after the other."""
    made = [f"# {title}\n", "Made from the code by `python docs/make_reference.py`; do not edit.\n"]
    for part in parts:
        made += [part] if isinstance(part, str) else list(part)
    return "\n".join(made)


def hooks_page() -> str:
    """The plugin surface."""
    return page(
        "Hooks",
        f"Version {hooks.API} of the surface; versions from {hooks.OLDEST_API} on are served.\n"
        "A plugin is a module named by an entry point of group `apt`. It imports the hook marker\n"
        "and the specs from `apt.hookspecs`, and what an adapter needs from `apt.adapter`.\n"
        "Everything from *Methods* on is in `apt.extending`. What works on plain tensors is in\n"
        "[`apt.solver`](api.md#aptsolver). [plugins.md](plugins.md) has an example of each kind.\n",
        "## Hooks that a plugin may implement\n",
        (entry(value) for name, value in vars(hooks).items() if name.startswith("apt_")),
        "## Specs that the hooks return\n",
        map(entry, SPECS),
        "## Adapters\n",
        [entry(adapter.Adapter), *members(adapter.Adapter)],
        map(whole, DECLARED),
        [entry(adapter.DecoderAdapter), *members(adapter.DecoderAdapter)],
        "## Helpers for adapters\n",
        map(entry, HELPERS),
        "## Methods\n",
        map(whole, METHODS),
        "## Choices of what to remove\n",
        "For the columns of one weight: [`apt.solver.GroupChoice`](api.md#groupchoice).\n",
        map(whole, CHOICES),
        "## Allocations\n",
        map(whole, ALLOCATIONS),
        "## Recoveries\n",
        map(whole, RECOVERIES),
        "## Texts\n",
        map(whole, TEXTS),
        "## Running a model\n",
        map(whole, RUNNING),
        "## Formats, and findings of the doctor\n",
        map(whole, FORMATS),
        "## Exports\n",
        map(whole, EXPORTS),
        "## Commands\n",
        "The parameters of a command are classes of options, which `apt.options` declares. Their\n"
        "base classes have the options that several commands share.\n",
        map(whole, OPTIONS),
        (entry(shared) for shared in SHARED),
        "What opens a model is in `apt.extending`:\n",
        map(entry, OPENING),
        "## What a command prints with\n",
        "`apt.console`: results go to standard output, the rest to standard error.\n",
        (whole(getattr(console, name)) for name in console.__all__),
        "## Events\n",
        "`apt.events`: `apt.prune(observe=…)` is called with all of them, the hook\n"
        "`apt_site_pruned` with `SitePruned`.\n",
        map(entry, EVENTS),
    )


def api_page() -> str:
    """The public names of the packages that programs import."""
    return page(
        "API",
        "The names below are the public surface: they keep their meaning within a version of the\n"
        "hooks. What plugins import is in [hooks.md](hooks.md). Everything else is internal.\n",
        *(part for module in (apt, solver, runtime, testing) for part in _module(module)),
    )


def _module(module: ModuleType) -> Iterator[str | list[str]]:
    yield f"## `{module.__name__}`\n"
    yield f"```text\n{inspect.getdoc(module)}\n```\n"
    things = [(name, getattr(module, name)) for name in module.__all__]
    shown = [(name, thing) for name, thing in things if inspect.getdoc(thing) and _own(thing)]
    yield [whole(thing) if module is solver else entry(thing, name=name) for name, thing in shown]


def _own(thing: Any) -> bool:
    return getattr(thing, "__module__", "").startswith("apt.")


def report_page() -> str:
    """The schema of the report."""
    return page(
        "Report",
        "A run writes its record beside the pruned model, as `apt_report.json`, and `apt.prune`\n"
        "returns it. The entries of the file and the attributes in Python have the same names;\n"
        "`apt.Report.read(DIRECTORY)` reads the file. A number that is not finite is one of the\n"
        'strings `"NaN"`, `"Infinity"` and `"-Infinity"` in the file. `sparsity` and\n'
        "`relative_layer_error` are over all pruned sites; `options` has the options of the run\n"
        "with all defaults filled in, by their names in `apt.PruneOptions`, except `alpha`\n"
        "(`input_correction`), `beta` (`drift_correction`) and `group` (`scale_group`).\n",
        "## Entries\n",
        entry(apt.Report),
        "## An entry of `sites`\n",
        "With `sparsity`, the share of zeros, beside these:\n",
        entry(events.SitePruned),
        "## An entry of `ranks`\n",
        entry(Work),
    )


def cli_page() -> str:
    """The commands and their options."""
    program: Any = get_command(app)
    return page(
        "Commands",
        "`apt-prune --help` and `apt-prune COMMAND --help` show the same at the shell. `apt` is\n"
        "another name of the program, for systems without the package manager of this name.\n",
        "## All commands\n",
        _options(program),
        *(
            f"## `{name}`\n\n{inspect.cleandoc(command.help)}\n\n{_usage(name, command)}"
            f"\n{_options(command)}"
            for name in program.list_commands(None)
            for command in [program.get_command(None, name)]
        ),
    )


def _usage(name: str, command: Any) -> str:
    """The line with the arguments of a command."""
    places = (p for p in command.params if p.param_type_name == "argument")
    words = (f"{p.name.upper()}{'…' if p.nargs < 0 else ''}" for p in places)
    return f"```text\n{' '.join(['apt-prune', name, *words, '[OPTIONS]'])}\n```\n"


def _options(command: Any) -> str:
    """The tables of options, one for each panel of the help."""
    panels: dict[str, list[str]] = {}
    types = {name: str(kind) for name, kind in command.callback.__annotations__.items()}
    for option in command.params:
        given = option.param_type_name == "option"
        if option.name in _COMPLETION:
            continue
        flags = [*option.opts, *option.secondary_opts] if given else [option.name.upper()]
        plain = not given or option.is_flag
        value = "" if plain else _value(option, types.get(option.name, ""))
        cells = [", ".join(f"`{flag}{value}`" for flag in flags), option.help or "", _usual(option)]
        line = " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells)
        panels.setdefault(getattr(option, "rich_help_panel", None) or "", []).append(f"| {line} |")
    tables = []
    for title, lines in panels.items():
        head = f"**{title}**\n\n" if title else ""
        tables.append(
            head + "| option | | default |\n| --- | --- | --- |\n" + "\n".join(lines) + "\n"
        )
    return "\n".join(tables)


def _value(option: Any, annotation: str) -> str:
    """The placeholder of the value: the one that is declared, or one for the type."""
    found = (name for kind, name in _PLACEHOLDERS.items() if kind in annotation)
    return f" {option.metavar or next(found, 'TEXT')}"


def _usual(option: Any) -> str:
    """The default, if the help does not say it."""
    usual = option.default
    empty = usual is None or isinstance(usual, bool) or usual in ([], (), "")
    if option.required or empty or callable(usual):
        return "required" if option.required else ""
    words = usual if isinstance(usual, list | tuple) else [usual]
    return ", ".join(f"`{word}`" for word in words)


PAGES = {"cli.md": cli_page, "hooks.md": hooks_page, "api.md": api_page, "report.md": report_page}


def main() -> None:
    """Write all pages."""
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
