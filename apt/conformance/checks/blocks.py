"""Checks that the blocks chained by the adapter compute the same as the model."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from apt.adapter.text_config import text_config
from apt.conformance.checks.promise import Fault, Faults, promise
from apt.conformance.checks.recording import Passed, first_tensor, record
from apt.conformance.checks.subject import Subject
from apt.errors import first_line


@promise()
def check_blocks(subject: Subject) -> Faults:
    """Chained blocks have the same inputs and outputs as in the model, bit for bit."""
    yield from chained(subject, subject.tokens)


@promise("positions")
def check_batches(subject: Subject) -> Faults:
    """The same holds on a second batch and on other lengths, entered after the first batch."""
    if wrong := list(chained(subject, subject.tokens)):
        yield from wrong  # the other batches would repeat it
        return
    limit, length = subject.positions(), subject.tokens.shape[1]
    config = text_config(getattr(subject.model, "config", None))
    configured = getattr(config, "max_position_embeddings", None)
    if limit is not None and limit < length and limit != configured:  # rotary ones can go on
        yield "", f"the model accepts {length} tokens, but positions() is {limit}"
    for which, tokens in (subject.others() | subject.long()).items():
        if not accepts(subject, tokens):
            said = f"the model does not accept {tokens.shape[1]} tokens"
            yield "", f"{said}, but positions() is {limit}"
            continue
        place = ""
        try:
            for place, fault in _compared(subject, tokens):
                if fault is not None:
                    yield Fault(place, f"{fault.said}, {which}", fault.method)
        except Exception as error:
            raised = f"{type(error).__name__}: {first_line(error)}"
            said = f"{': ' if place else ''}{which}, {raised}"
            yield Fault(place, said, "step" if place else "enter")


def accepts(subject: Subject, tokens: Tensor) -> bool:
    """True if the model itself runs on ``tokens``."""
    try:
        replace(subject, tokens=tokens).logits()
    except Exception:
        return False
    return True


def chained(subject: Subject, tokens: Tensor) -> Iterator[Fault]:
    """The first difference between the states of the chained blocks and those of the model."""
    return (fault for _, fault in _compared(subject, tokens) if fault is not None)


@torch.no_grad()
def _compared(subject: Subject, tokens: Tensor) -> Iterator[tuple[str, Fault | None]]:
    """The name of each block before it runs; then its fault, if it has one, as the last item."""
    adapter, blocks = subject.adapter, subject.blocks()
    seen = record(subject.model, [block for _, block, _ in blocks], tokens)
    if len(seen.inputs) != len(blocks):
        said = f"the model calls its {len(blocks)} blocks {len(seen.inputs)} times, not once each"
        yield "", Fault("", said, "blocks")
        return
    state, calls = adapter.enter(subject.model, tokens)
    for index, (name, block, _) in enumerate(blocks):
        yield name, None
        if (wrong := _differs(first_tensor(state), seen.inputs[index])) is not None:
            said = f": the state before it differs from its input in the model{wrong}"
            yield name, Fault(name, said, "step" if index else "enter")
            return
        state = adapter.step(block, state, calls[index])
        if (wrong := _differs(first_tensor(state), seen.outputs[index])) is not None:
            said = f": the state after it differs from its output in the model{wrong}"
            yield name, Fault(name, said, "step")
            return


def _differs(state: Tensor, expected: Passed) -> str | None:
    """None if a state equals that of the model; else a description of the difference or ""."""
    if expected.is_stream(state):
        return None
    if state.shape == expected.first.shape:
        return ""
    return f": its shape is {tuple(state.shape)}, not {tuple(expected.first.shape)}"


@promise("residual")
def check_stream(subject: Subject) -> Faults:
    """residual() returns the input of the next block: (samples, seqlen, hidden)."""
    blocks = subject.blocks()
    seen = record(subject.model, [block for _, block, _ in blocks], subject.tokens)
    for step in subject.steps():
        expected, stream = seen.inputs[step.index], subject.adapter.residual(step.state)
        if stream.shape != expected.first.shape:
            shapes = f"of shape {tuple(stream.shape)}, not {tuple(expected.first.shape)}"
            yield step.name, f": residual() is {shapes}"
        elif not expected.is_stream(stream):
            yield step.name, ": residual() is not the stream that enters it in the model"
