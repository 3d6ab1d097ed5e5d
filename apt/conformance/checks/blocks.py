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
    if faults := list(chained(subject, subject.tokens)):
        yield from faults  # the other batches would repeat it
        return
    limit, length = subject.positions(), subject.tokens.shape[1]
    config = text_config(getattr(subject.model, "config", None))
    configured = getattr(config, "max_position_embeddings", None)
    if limit is not None and limit < length and limit != configured:  # rotary ones are unlimited
        yield "", f"the model accepts {length} tokens, but positions() is {limit}"
    for description, tokens in (subject.others() | subject.long()).items():
        if not accepts(subject, tokens):
            message = f"the model does not accept {tokens.shape[1]} tokens"
            yield "", f"{message}, but positions() is {limit}"
            continue
        block = ""
        try:
            for block, fault in _compared(subject, tokens):
                if fault is not None:
                    yield Fault(block, f"{fault.message}, {description}", fault.method)
        except Exception as error:
            raised = f"{type(error).__name__}: {first_line(error)}"
            message = f"{': ' if block else ''}{description}, {raised}"
            yield Fault(block, message, "step" if block else "enter")


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
    """The name of each block, yielded before it runs; the last item has the first fault."""
    adapter, blocks = subject.adapter, subject.blocks()
    recorded = record(subject.model, [block for _, block, _ in blocks], tokens)
    if len(recorded.inputs) != len(blocks):
        message = (
            f"the model calls its {len(blocks)} blocks {len(recorded.inputs)} times, not once each"
        )
        yield "", Fault("", message, "blocks")
        return
    state, calls = adapter.enter(subject.model, tokens)
    for index, (name, block, _) in enumerate(blocks):
        yield name, None
        if (difference := _differs(first_tensor(state), recorded.inputs[index])) is not None:
            message = f": the state before it differs from its input in the model{difference}"
            yield name, Fault(name, message, "step" if index else "enter")
            return
        state = adapter.step(block, state, calls[index])
        if (difference := _differs(first_tensor(state), recorded.outputs[index])) is not None:
            message = f": the state after it differs from its output in the model{difference}"
            yield name, Fault(name, message, "step")
            return


def _differs(state: Tensor, expected: Passed) -> str | None:
    """None if a state equals the model's; else the difference of the shapes, or an empty text."""
    if expected.is_stream(state):
        return None
    if state.shape == expected.first.shape:
        return ""
    return f": its shape is {tuple(state.shape)}, not {tuple(expected.first.shape)}"


@promise("residual")
def check_stream(subject: Subject) -> Faults:
    """residual() returns the input of the next block: (samples, seqlen, hidden)."""
    blocks = subject.blocks()
    recorded = record(subject.model, [block for _, block, _ in blocks], subject.tokens)
    for step in subject.steps():
        expected, stream = recorded.inputs[step.index], subject.adapter.residual(step.state)
        if stream.shape != expected.first.shape:
            shapes = f"of shape {tuple(stream.shape)}, not {tuple(expected.first.shape)}"
            yield step.name, f": residual() is {shapes}"
        elif not expected.is_stream(stream):
            yield step.name, ": residual() is not the stream that enters it in the model"
