"""Running of checks: the outcome of each check, with one line for each distinct fault."""

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from torch import Tensor, nn

from apt.adapter import Adapter
from apt.adapter.recording import eval_mode
from apt.conformance.checks import ALONE, CHECKS, Check, Nonconformance, Subject
from apt.conformance.error_location import explained, place_of
from apt.conformance.snapshot import preserved
from apt.plugin.registry import registry
from apt.plugin.specs import AdapterSpec


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check.

    Attributes:
        name: the name of the check.
        summary: its meaning in one line.
        problem: the faults, one in each line; empty if there are none.
        kept_by: an earlier check with the same faults, which prevented this check from running.
    """

    name: str
    summary: str
    problem: str = ""
    kept_by: str = ""


def check_adapter(
    adapter: Adapter, model: nn.Module, tokens: Tensor, spec: AdapterSpec | None = None
) -> list[Outcome]:
    """Run all checks, also after a check has failed.

    Args:
        adapter: the adapter.
        model: a model of its family; see `Subject`.
        tokens: token ids (samples, seqlen).
        spec: the adapter's spec; by default the installed spec that names its class.
    """
    subject = Subject(adapter, model, tokens, spec or spec_of(adapter))
    return list(outcomes(subject))


def outcomes(subject: Subject) -> Iterator[Outcome]:
    """The outcomes of all checks, one after the other."""
    seen: dict[str, str] = {}
    for name in CHECKS:
        yield without_known_faults(outcome(name, subject), seen)


def without_known_faults(result: Outcome, seen: dict[str, str]) -> Outcome:
    """The outcome, with `Outcome.kept_by` set if all its faults are in ``seen``."""
    lines = [_without_place(line) for line in result.problem.splitlines()]
    if lines and all(line in seen for line in lines):
        return replace(result, kept_by=seen[lines[0]])
    for line in lines:
        seen.setdefault(line, result.name)
    return result


def _without_place(line: str) -> str:
    return re.sub(r" \([^()]*:\d+\)$", "", line)


def fault_lines(results: Sequence[Outcome]) -> list[str]:
    """A line for each fault, with the check that found it and the checks that could not run."""
    lines = []
    for result in results:
        if result.problem and not result.kept_by:
            prevented = ", ".join(later.name for later in results if later.kept_by == result.name)
            first, *rest = result.problem.splitlines()
            first += f"; prevents: {prevented}" if prevented else ""
            lines += [f"{result.name}: {line}" for line in (first, *rest)]
    return lines


def outcome(name: str, subject: Subject) -> Outcome:
    """The outcome of the check of that name. An exception counts as a fault."""
    check = CHECKS[name]
    result = Outcome(name, (check.__doc__ or "").splitlines()[0])
    try:
        run(check, subject)
    except Nonconformance as error:
        lines = [line + place_of(subject.adapter, method) for line, method in error.lines]
        return replace(result, problem="\n".join(lines))
    except Exception as error:  # a fault of the adapter may cause any exception
        return replace(result, problem=explained(error, subject.adapter))
    return result


def run(check: Check, subject: Subject) -> None:
    """Run a check in eval mode, within `Adapter.running`; the state of the process is restored."""
    with preserved(), eval_mode(subject.model):
        context = nullcontext() if check in ALONE else subject.adapter.running(subject.model)
        with context:
            check(subject)


def spec_of(adapter: Adapter) -> AdapterSpec | None:
    """The spec of an adapter's class in the installed plugins; None if it is not unique."""
    target = f"{type(adapter).__module__}:{type(adapter).__qualname__}"
    specs = [spec for spec in registry().adapters.specs.values() if spec.target == target]
    return specs[0] if len(specs) == 1 else None
