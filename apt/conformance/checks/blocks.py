"""Blocks chained by the adapter are the model, on every batch, for every block."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from apt.conformance.checks.promise import Fault, promise
from apt.conformance.checks.recording import Passed, record
from apt.conformance.checks.subject import Subject
from apt.conformance.checks.tensors import first_tensor
from apt.errors import first_line


@promise
def check_blocks(subject: Subject) -> Iterator[Fault]:
    """Blocks chained by the adapter are the model: the same inputs, bit for bit, and outputs."""
    yield from chained(subject, subject.tokens)


@promise
def check_batches(subject: Subject) -> Iterator[Fault]:
    """So they are on a second batch, and on another length, entered after the first."""
    if wrong := list(chained(subject, subject.tokens)):
        yield from wrong  # which says all
        return
    for which, tokens in subject.others().items():
        if not takes(subject, tokens):
            limit = subject.adapter.positions(getattr(subject.model, "config", None))
            said = f"the model does not take {tokens.shape[1]} tokens, but positions() is {limit}"
            yield Fault("", said, "positions")
            continue
        place = ""
        try:
            for place, fault in _compared(subject, tokens):
                if fault is not None:
                    yield Fault(place, f"{fault.said}, {which}", fault.method)
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            said = f"{': ' if place else ''}{which}, {what}"
            yield Fault(place, said, "step" if place else "enter")


def takes(subject: Subject, tokens: Tensor) -> bool:
    """Whether the model itself runs on ``tokens``."""
    try:
        replace(subject, tokens=tokens).logits()
    except Exception:
        return False
    return True


def chained(subject: Subject, tokens: Tensor) -> Iterator[Fault]:
    """Where the states between the blocks differ, first of all, from the model's own."""
    return (fault for _, fault in _compared(subject, tokens) if fault is not None)


@torch.no_grad()
def _compared(subject: Subject, tokens: Tensor) -> Iterator[tuple[str, Fault | None]]:
    """Every block's name before it is run; then what is wrong of it, which is the end."""
    adapter, blocks = subject.adapter, subject.blocks()
    seen = record(subject.model, [block for _, block, _ in blocks], tokens)
    state, calls = adapter.enter(subject.model, tokens)
    for index, (name, block, _) in enumerate(blocks):
        yield name, None
        if (wrong := _differs(first_tensor(state), seen.inputs[index])) is not None:
            said = f": the state before it is not what the model gives it{wrong}"
            yield name, Fault(name, said, "step" if index else "enter")
            return
        state = adapter.step(block, state, calls[index])
        if (wrong := _differs(first_tensor(state), seen.outputs[index])) is not None:
            said = f": the state after it is not what it gives in the model{wrong}"
            yield name, Fault(name, said, "step")
            return


def _differs(found: Tensor, expected: Passed) -> str | None:
    """None where a state is what passes in the model; else what there is to add to that."""
    if expected.is_stream(found):
        return None
    if found.shape == expected.first.shape:
        return ""
    return f": its shape is {tuple(found.shape)}, not {tuple(expected.first.shape)}"


@promise
def check_stream(subject: Subject) -> Iterator[Fault]:
    """The adapter's residual stream is what enters the next block: (samples, seqlen, hidden)."""
    blocks = subject.blocks()
    seen = record(subject.model, [block for _, block, _ in blocks], subject.tokens)
    for step in subject.steps():
        expected, found = seen.inputs[step.index], subject.adapter.residual(step.state)
        if found.shape != expected.first.shape:
            what = f"of shape {tuple(found.shape)}, not {tuple(expected.first.shape)}"
            yield Fault(step.name, f": residual() is {what}", "residual")
        elif not expected.is_stream(found):
            yield Fault(
                step.name, ": residual() is not the stream that the model gives it", "residual"
            )
