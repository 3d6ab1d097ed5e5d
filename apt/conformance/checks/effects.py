"""A check of the statistics by which extras are pruned."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from apt.adapter import Extra
from apt.conformance.checks.predictions import Predictions
from apt.conformance.checks.promise import Fault, Faults, promise
from apt.conformance.checks.recording import near
from apt.conformance.checks.removals import Removals
from apt.conformance.checks.subject import Step, Subject
from apt.conformance.snapshot import changes, snapshot
from apt.errors import AptError

_ROUNDING = 1e-4  # of the largest eigenvalue
_CHANNELS = 32  # of each kind, compared with the effects of removals


@promise("effects")
def check_effects(subject: Subject) -> Faults:
    """A Gram matrix and an energy of every extra; they predict the changes by removed weights."""
    subject.logits()  # the first run may create state in the model itself
    before, faults, refused = snapshot(subject.model), list[Fault | tuple[str, str]](), False
    for step in subject.steps():
        extras = subject.adapter.extras(step.block)
        try:
            faults += _faults(subject, step, extras) if extras else ()
        except AptError:  # the adapter refuses, for instance an older transformers, as in a run
            refused = True
    faults += [("", f"effects {change}") for change in changes(before, snapshot(subject.model))]
    yield from faults
    if not faults and not refused:
        yield from _unlike_removals(subject)


def _faults(subject: Subject, step: Step, extras: Sequence[Extra]) -> Faults:
    for extra, reports in _reported(subject, step, extras).items():
        channels, width = extra.weight(step.block).shape
        if not reports:
            yield step.name, f".{extra.name} is an extra, but has no effects"
        for gram, energy in reports:
            if problem := _wrong(gram, energy, (channels, width, width)):
                yield step.name, f".{extra.name}: its effects have {problem}"


def _reported(
    subject: Subject, step: Step, extras: Sequence[Extra]
) -> dict[Extra, list[tuple[Tensor, float]]]:
    """The Gram matrices and energies that the adapter reports for each extra in one step."""
    reports: dict[Extra, list[tuple[Tensor, float]]] = {extra: [] for extra in extras}

    def take(extra: Extra, gram: Tensor, energy: float) -> None:
        reports[extra].append((gram, energy))

    with subject.adapter.effects(step.block, extras, take):
        subject.step(step)
    return reports


def _wrong(gram: Tensor, energy: float, shape: tuple[int, ...]) -> str:
    """The fault of one report; empty without a fault."""
    if tuple(gram.shape) != shape:
        return f"a Gram matrix of shape {tuple(gram.shape)}, not {shape}"
    if not gram.isfinite().all() or not near(gram, gram.mT):
        return "a Gram matrix that is not symmetric, or not finite"
    values = torch.linalg.eigvalsh(gram.double())
    if values.min() < -_ROUNDING * values.max():
        return "a Gram matrix with negative eigenvalues"
    return "" if 0 < energy < float("inf") else f"the energy {energy}"


@torch.no_grad()
def _unlike_removals(subject: Subject) -> Iterator[Fault]:
    """Faults of effects that do not predict the changes when single weights are zero."""
    blocks = subject.adapter.blocks(subject.model)
    if not any(subject.adapter.extras(block) for _, block in blocks):
        return
    model = copy.deepcopy(subject.model).float()
    subject = Subject(subject.adapter, model, subject.tokens[:2])
    steps = [step for step in subject.steps() if subject.adapter.extras(step.block)]
    kinds: dict[str, tuple[Step, Extra, Predictions]] = {}
    for step in steps:
        removals, extras = Removals(subject, step), subject.adapter.extras(step.block)
        for extra, reports in _reported(subject, step, extras).items():
            first = (step, extra, Predictions(extra.removal))
            _, _, predictions = kinds.setdefault(extra.kind, first)
            gram = torch.stack([gram for gram, _ in reports]).sum(0)
            energy = sum(energy for _, energy in reports)
            predictions.compare(removals, extra, gram, energy, max(2, _CHANNELS // len(steps)))
    for step, extra, predictions in kinds.values():
        if (problem := predictions.fault()) is not None:
            message, method = problem
            yield Fault(step.name, f".{extra.name}: {message}", method)
