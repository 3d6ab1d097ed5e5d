"""Blocks chained by the adapter are the model: on every batch, for every block, to the logits."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.errors import first_line
from apt.testing.checks.promise import Fault, promise
from apt.testing.checks.recording import Passed, record, removed
from apt.testing.checks.subject import Subject
from apt.testing.checks.tensors import first_tensor, same


@promise
def check_blocks(subject: Subject) -> Iterator[Fault]:
    """Blocks chained by the adapter are the model: the same inputs, bit for bit, and outputs."""
    yield from _chained(subject, subject.tokens)


@promise
def check_batches(subject: Subject) -> Iterator[Fault]:
    """So they are on a second batch, and on another length, entered after the first."""
    if wrong := list(_chained(subject, subject.tokens)):
        yield from wrong  # which says all
        return
    for which, tokens in subject.others().items():
        place = ""
        try:
            for place, fault in _compared(subject, tokens):
                if fault is not None:
                    yield Fault(place, f"{fault.said}, {which}", fault.method)
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            yield Fault(place, f": {which}, {what}", "step" if place else "enter")


def _chained(subject: Subject, tokens: Tensor) -> Iterator[Fault]:
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
        if wrong := _differs(first_tensor(state), seen.inputs[index]):
            said = f": the state before it is not what the model gives it{wrong.rstrip()}"
            yield name, Fault(name, said, "enter")
            return
        state = adapter.step(block, state, calls[index])
        if wrong := _differs(first_tensor(state), seen.outputs[index]):
            said = f": the state after it is not what it gives in the model{wrong.rstrip()}"
            yield name, Fault(name, said, "step")
            return


def _differs(found: Tensor, expected: Passed) -> str | None:
    """Nothing where a state is what passes in the model; else whatever is to be said of it."""
    if expected.is_stream(found):
        return None
    if found.shape == expected.first.shape:
        return " "
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


@promise
def check_logits(subject: Subject) -> Iterator[Fault]:
    """No block is left out, and what the last one gives makes the model's logits."""
    blocks = [block for _, block, _ in subject.blocks()]
    for name in _beside(subject, blocks):
        yield Fault(name, " runs beside the blocks, but blocks() leaves it out", "blocks")
    for tokens in (subject.tokens, *subject.others().values()):
        if not _makes_logits(replace(subject, tokens=tokens), blocks):
            before = list(_chained(subject, tokens))
            yield from before or [Fault("", "the last state does not make the model's logits")]
            return


@torch.no_grad()
def _makes_logits(subject: Subject, blocks: list[nn.Module]) -> bool:
    """Whether the model goes on to its own logits from the last state."""
    state, calls = subject.adapter.enter(subject.model, subject.tokens)
    for block, call in zip(blocks, calls, strict=True):
        state = subject.adapter.step(block, state, call)
    stream = subject.adapter.residual(state)
    if stream.shape[:2] != subject.tokens.shape:
        return True  # that is what `check_stream` is for
    with _ending_in(blocks[-1], stream):
        found = subject.logits()
    return same(found, subject.logits())


def _ending_in(last: nn.Module, stream: Tensor) -> Any:
    """While entered, the ``last`` block gives ``stream``, whatever it is given."""

    def instead(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return stream
        rest = [
            torch.zeros_like(part)  # of a stream in two parts
            if isinstance(part, Tensor) and part.shape == stream.shape
            else part
            for part in output[1:]
        ]
        return type(output)((stream, *rest))

    return removed([last.register_forward_hook(instead)])


def _beside(subject: Subject, blocks: list[nn.Module]) -> list[str]:
    """Modules that look like blocks, and run, but are none: most likely they were forgotten.

    These are members of a list of modules that have parts and weights of their own and are given
    the residual stream, or something of its shape; and any module of a block's own class.
    """
    named = dict(subject.model.named_modules())
    inside = {part for block in blocks for part in block.modules()}
    around = {m for m in named.values() if not inside.isdisjoint(m.modules())}
    lists = [m for m in named.values() if isinstance(m, nn.ModuleList | nn.Sequential)]
    members = {part for parts in lists for part in parts if any(True for _ in part.children())}
    kinds = {type(block) for block in blocks}
    likely = {
        name: module
        for name, module in named.items()
        if module not in inside | around and (module in members or type(module) in kinds)
    }
    shape = tuple(first_tensor(subject.adapter.enter(subject.model, subject.tokens)[0]).shape)
    return [name for name in _given(subject, likely, shape) if not _within(name, likely)]


def _within(name: str, others: dict[str, nn.Module]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


def _given(subject: Subject, modules: dict[str, nn.Module], shape: tuple[int, ...]) -> list[str]:
    """Those of ``modules`` that run, have matrices, and are given a tensor of ``shape`` first."""
    found: dict[str, None] = {}
    handles = []
    for name, module in modules.items():
        if not any(parameter.ndim > 1 for parameter in module.parameters()):
            continue

        def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            values = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if values and tuple(values[0].shape) == shape:
                found[name] = None

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    with removed(handles):
        subject.logits()
    return list(found)
