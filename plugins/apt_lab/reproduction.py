"""The command that reproduces a run, from the options in its report."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from apt.options import Declared, FitRun, PruneRun, ShrinkRun
from apt.plugin.specs import UNIFORM

_NEVER = ("model", "output", "overwrite", "resume", "pattern", "sparsity", "per", "overrides")


def command_of(report: Mapping[str, Any]) -> str:
    """The command of the run that wrote a report; empty if the model needs several commands.

    A model that was trained or fine-tuned after its pruning needs several commands. Local paths
    have only their last part, as in the report.
    """
    options: dict[str, Any] = dict(report.get("options") or {})
    trained = report.get("recovery") or {}
    if (
        report.get("reapplied")
        or (trained and not options.get("minutes"))
        or trained.get("earlier")
    ):
        return ""
    size = options.pop("shrink", None)
    if not options.get("model") or not (options.get("pattern") or size or report.get("fit")):
        return ""
    run_class = FitRun if report.get("fit") else ShrinkRun if size else PruneRun
    command = {FitRun: "fit", ShrinkRun: "shrink", PruneRun: "prune"}[run_class]
    words = ["apt-prune", command, str(options["model"])]
    if size:
        options |= {**size, **size["search"]}
        explicit = size["sizes"] or size["blocks"] is not None or size["drop"]
        options |= {"keep": None, "budget": None} if explicit else {}
        options |= {} if size["mode"] == "search" else {"evaluations": None}
    elif run_class is PruneRun:
        words += _pattern(options)
    for declared in run_class.OPTIONS:
        if declared.name not in _NEVER:
            words += _words(declared, options.get(declared.key))
    return shlex.join([*words, "--output", str(options.get("output") or "out")])


def _words(declared: Declared, value: Any) -> Iterator[str]:
    """The words for an option; none for a default value."""
    yes, negative = declared.flags
    if value in (None, declared.default, []) or (declared.name, value) == ("allocation", UNIFORM):
        return
    if declared.option.switches:
        yield from (flag for flag, meaning, _ in declared.option.switches if meaning == value)
    elif declared.kind is bool:
        yield yes if value else negative
    elif declared.repeatable:
        texts = declared.option.text(value) if declared.option.read else value
        yield from (word for text in texts for word in (yes, str(text)))
    else:
        yield from (yes, f"{value:.12g}" if isinstance(value, float) else str(value))


def _pattern(options: Mapping[str, Any]) -> Iterator[str]:
    pattern = str(options["pattern"])
    if "@" in pattern:
        mixed, _, sparsity = pattern.partition("@")
        yield from ("--pattern", mixed, "--sparsity", sparsity)
    elif ":" in pattern:
        yield from ("--pattern", pattern)
    else:
        yield from ("--sparsity", pattern)
        yield from ("--per", str(options["per"])) if options.get("per") else ()
    for glob, other in (options.get("overrides") or {}).items():
        yield from ("--override", f"{glob}={other}")
