"""The command that reproduces a run, from the options in its report."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from apt.options import Declared, PruneRun, ShrinkRun
from apt.plugin.specs import UNIFORM

_NEVER = ("model", "output", "overwrite", "resume", "pattern", "sparsity", "per", "overrides")


def command_of(report: Mapping[str, Any]) -> str:
    """The command of the run that wrote a report; empty if one command does not give the model.

    A model that was trained or fine-tuned after its pruning took several. Local paths have only
    their last part, as in the report.
    """
    known: dict[str, Any] = dict(report.get("options") or {})
    trained = report.get("recovery") or {}
    if report.get("reapplied") or (trained and not known.get("minutes")) or trained.get("earlier"):
        return ""
    size = known.pop("shrink", None)
    if not known.get("model") or not (known.get("pattern") or size):
        return ""
    kind = ShrinkRun if size else PruneRun
    words = ["apt-prune", "shrink" if size else "prune", str(known["model"])]
    if size:
        known |= {**size, **size["search"]}
        explicit = size["sizes"] or size["blocks"] is not None or size["drop"]
        known |= {"keep": None, "budget": None} if explicit else {}
        known |= {} if size["mode"] == "search" else {"evaluations": None}
    else:
        words += _pattern(known)
    for one in kind.OPTIONS:
        if one.name not in _NEVER:
            words += _words(one, known.get(one.key))
    return shlex.join([*words, "--output", str(known.get("output") or "out")])


def _words(one: Declared, value: Any) -> Iterator[str]:
    """The words for an option; none for a default that does not depend on others."""
    yes, no = one.flags
    if value in (None, one.default, []) or (one.name, value) == ("allocation", UNIFORM):
        return
    if one.option.switches:
        yield from (flag for flag, meaning, _ in one.option.switches if meaning == value)
    elif one.kind is bool:
        yield yes if value else no
    elif one.repeatable:
        texts = one.option.text(value) if one.option.read else value
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
