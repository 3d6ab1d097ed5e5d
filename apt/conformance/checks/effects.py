"""A check of the statistics by which extras are pruned."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from apt.adapter import Extra
from apt.conformance.checks.promise import Fault, promise
from apt.conformance.checks.subject import Step, Subject
from apt.conformance.checks.tensors import near
from apt.conformance.snapshot import changes, snapshot
from apt.errors import AptError

_ROUNDING = 1e-4  # of the largest eigenvalue


@promise
def check_effects(subject: Subject) -> Iterator[Fault]:
    """A Gram matrix for each channel, and an energy, is reported of every extra."""
    subject.logits()  # the first run may create state in the model itself
    before = snapshot(subject.model)
    for step in subject.steps():
        extras = subject.adapter.extras(step.block)
        try:
            yield from _faults(subject, step, extras) if extras else ()
        except AptError:  # it refuses, for instance an older transformers, as it would in a run
            continue
    for change in changes(before, snapshot(subject.model)):
        yield Fault("", f"effects {change}", "effects")


def _faults(subject: Subject, step: Step, extras: Sequence[Extra]) -> Iterator[Fault]:
    found: dict[Extra, list[tuple[Tensor, float]]] = {extra: [] for extra in extras}

    def take(extra: Extra, gram: Tensor, energy: float) -> None:
        found[extra].append((gram, energy))

    with subject.adapter.effects(step.block, extras, take):
        subject.step(step)
    for extra, reports in found.items():
        channels, width = extra.weight(step.block).shape
        if not reports:
            yield Fault(step.name, f".{extra.name} is an extra, but has no effects", "effects")
        for gram, energy in reports:
            if wrong := _wrong(gram, energy, (channels, width, width)):
                said = f".{extra.name}: its effects have {wrong}"
                yield Fault(step.name, said, "effects")


def _wrong(gram: Tensor, energy: float, shape: tuple[int, ...]) -> str:
    """The fault of one report; empty if it has none."""
    if tuple(gram.shape) != shape:
        return f"a Gram matrix of shape {tuple(gram.shape)}, not {shape}"
    if not gram.isfinite().all() or not near(gram, gram.mT):
        return "a Gram matrix that is not symmetric, or not finite"
    values = torch.linalg.eigvalsh(gram.double())
    if values.min() < -_ROUNDING * values.max():
        return "a Gram matrix with negative eigenvalues"
    return "" if 0 < energy < float("inf") else f"the energy {energy}"
