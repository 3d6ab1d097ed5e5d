"""Checks that an adapter leaves model and process unchanged, also after an exception."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Site
from apt.conformance.checks.promise import Fault, Faults, promise
from apt.conformance.checks.recording import first_tensor, near, removed, same
from apt.conformance.checks.subject import Subject
from apt.conformance.snapshot import changes, process, snapshot


class StopError(Exception):
    """An exception that an adapter does not expect."""


@promise("running")
def check_running(subject: Subject) -> Faults:
    """running() leaves nothing behind, even if an exception ends it."""
    adapter, model = subject.adapter, subject.model
    subject.logits()  # the first run may create state in the model itself
    before = snapshot(model)
    with adapter.running(model):
        pass
    yield from _traces("running", before, model)
    before = snapshot(model)
    if _swallows(adapter.running(model)):
        yield "", "running swallows an exception"
    yield from _traces("running", before, model, " when an exception ends it")
    copied = copy.deepcopy(model).float()  # kernels differ more in other dtypes
    logits = subject.logits(copied)
    with adapter.running(copied):
        within = subject.logits(copied)
    if not near(within, logits):
        yield "", "the model gives other logits within running"


@promise("capture")
def check_untouched(subject: Subject) -> Faults:
    """enter, step and capture do not change the logits and leave nothing behind."""
    logits, model = subject.logits(), subject.model
    before = snapshot(model)
    subject.adapter.enter(model, subject.tokens)
    yield from _traces("enter", before, model)
    before = snapshot(model)
    for step in subject.steps():
        around = process()
        subject.step(step)
        yield from _changed("step", changes(around, process()))
    yield from _traces("step", before, model)
    before = snapshot(model)
    for step in subject.steps():
        plain = first_tensor(subject.step(step))
        around = process()
        with subject.adapter.capture(step.block, step.sites, lambda site, rows: None):
            watched = first_tensor(subject.step(step))
        yield from _changed("capture", changes(around, process()))
        if not torch.equal(plain, watched):
            yield step.name, ": capture changes its output"
    yield from _traces("capture", before, model)
    if not torch.equal(subject.logits(), logits):
        yield "", "the model gives other logits after capture"


@promise("capture")
def check_exception(subject: Subject) -> Faults:
    """enter and capture leave nothing behind if an exception ends them."""
    logits, model = subject.logits(), subject.model
    before = snapshot(model)
    _enter_stopped(subject)
    yield from _traces("enter", before, model, " when an exception ends it")
    before = snapshot(model)
    yield from _capture_stopped(subject)
    yield from _traces("capture", before, model, " when an exception ends it")
    if not torch.equal(subject.logits(), logits):
        yield "", "the model gives other logits after an exception"


@promise("step")
def check_repeat(subject: Subject) -> Faults:
    """A repeated step gives the same result, and changes neither its state nor its call."""
    for step in subject.steps():
        before = _tensors_in([step.state, step.call])
        first = first_tensor(subject.step(step)).clone()
        if _tensors_in([step.state, step.call]) != before:
            message = ": a step changes its state or its call: does the call have a cache?"
            yield Fault(step.name, message, "enter")
            continue
        if not same(first_tensor(subject.step(step)), first):
            yield step.name, ": a step gives another result the second time"


def _swallows(context: AbstractContextManager[None]) -> bool:
    """True if an exception that ends the context does not reach the caller."""
    raised = False
    try:
        with context:
            raise StopError
    except StopError:
        raised = True
    return not raised


def _traces(method: str, before: Any, model: nn.Module, when: str = "") -> Iterator[Fault]:
    return _changed(method, changes(before, snapshot(model)), when)


def _changed(method: str, changed: list[str], when: str = "") -> Iterator[Fault]:
    return (Fault("", f"{method} {change}{when}", method) for change in changed)


def _enter_stopped(subject: Subject) -> None:
    """Call enter with a last block that raises an exception when it is called."""

    def stop(module: nn.Module, args: Any) -> None:
        raise StopError

    last = subject.adapter.blocks(subject.model)[-1][1]
    with removed([last.register_forward_pre_hook(stop)]), suppress(StopError):
        subject.adapter.enter(subject.model, subject.tokens)


def _capture_stopped(subject: Subject) -> Faults:
    def stop(site: Site, rows: Tensor) -> None:
        raise StopError

    step = next(subject.steps())
    try:
        with subject.adapter.capture(step.block, step.sites, stop):
            subject.step(step)
    except StopError:
        return
    yield step.name, ": an exception of the sink does not reach the caller"


def _tensors_in(value: Any, depth: int = 8) -> list[tuple[Any, ...]]:
    """The shape, address and version of each tensor in ``value``, at any depth."""
    if isinstance(value, Tensor):
        version = None if value.is_inference() else value._version
        return [(tuple(value.shape), value.data_ptr(), version)]
    if depth == 0 or isinstance(value, nn.Module | type):
        return []
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    return [each for part in parts for each in _tensors_in(part, depth - 1)]
