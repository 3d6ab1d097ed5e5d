"""Running checks: what each comes to, every fault in a line, and each fault told of once."""

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from torch import Tensor, nn

from apt.adapter import Adapter
from apt.adapter.eval_mode import eval_mode
from apt.conformance.checks import ALONE, CHECKS, Check, Nonconformance, Subject
from apt.conformance.error_location import explained, place_of
from apt.conformance.snapshot import preserved
from apt.plugin.registry import registry
from apt.plugin.specs import AdapterSpec


@dataclass(frozen=True)
class Outcome:
    """What came of one check.

    Attributes:
        name: its name.
        summary: what it looks at.
        problem: what is wrong, if anything, a line for each fault.
        kept_by: the check that found the same before; this one could not be run for it.
    """

    name: str
    summary: str
    problem: str = ""
    kept_by: str = ""


def check_adapter(
    adapter: Adapter, model: nn.Module, tokens: Tensor, spec: AdapterSpec | None = None
) -> list[Outcome]:
    """Run all checks; none keeps another from running.

    Args:
        adapter: the adapter.
        model: a model of its family; see `Subject`.
        tokens: token ids (samples, seqlen).
        spec: what a plugin declares of the adapter; by default the one that names its class.
    """
    subject = Subject(adapter, model, tokens, spec or spec_of(adapter))
    return list(outcomes(subject))


def outcomes(subject: Subject) -> Iterator[Outcome]:
    """What comes of one check after the other."""
    seen: dict[str, str] = {}
    for name in CHECKS:
        yield once(outcome(name, subject), seen)


def once(found: Outcome, seen: dict[str, str]) -> Outcome:
    """An outcome, or where its faults are all known, by which check.

    Args:
        found: the outcome.
        seen: every fault so far with the check that found it; those of this one are added.
    """
    lines = [_without_place(line) for line in found.problem.splitlines()]
    if lines and all(line in seen for line in lines):
        return replace(found, kept_by=seen[lines[0]])
    for line in lines:
        seen.setdefault(line, found.name)
    return found


def _without_place(line: str) -> str:
    return re.sub(r" \([^()]*:\d+\)$", "", line)


def told(found: Sequence[Outcome]) -> list[str]:
    """Every fault in a line, with the check that found it and those that it keeps from running."""
    lines = []
    for one in found:
        if one.problem and not one.kept_by:
            kept = ", ".join(other.name for other in found if other.kept_by == one.name)
            first, *rest = one.problem.splitlines()
            first += f"; keeps from running: {kept}" if kept else ""
            lines += [f"{one.name}: {line}" for line in (first, *rest)]
    return lines


def outcome(name: str, subject: Subject) -> Outcome:
    """What comes of the check of that name, be what it finds a fault or an exception."""
    check = CHECKS[name]
    found = Outcome(name, (check.__doc__ or "").splitlines()[0])
    try:
        run(check, subject)
    except Nonconformance as error:
        lines = [line + place_of(subject.adapter, method) for line, method in error.lines]
        return replace(found, problem="\n".join(lines))
    except Exception as error:  # a fault of the adapter shows in any way
        return replace(found, problem=explained(error, subject.adapter))
    return found


def run(check: Check, subject: Subject) -> None:
    """Run a check on a model in eval mode and, as runs do, within `Adapter.running`.

    What it leaves behind in the process, be it found or not, is put back for the next.
    """
    with preserved(), eval_mode(subject.model):
        within = nullcontext() if check in ALONE else subject.adapter.running(subject.model)
        with within:
            check(subject)


def spec_of(adapter: Adapter) -> AdapterSpec | None:
    """What the installed plugins declare of an adapter's class, where that is one thing."""
    target = f"{type(adapter).__module__}:{type(adapter).__qualname__}"
    found = [spec for spec in registry().adapters.specs.values() if spec.target == target]
    return found[0] if len(found) == 1 else None
