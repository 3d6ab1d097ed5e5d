"""A check that the blocks are complete: chained, they give the logits of the model."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.conformance.checks.blocks import accepts, chained
from apt.conformance.checks.promise import Fault, Faults, promise
from apt.conformance.checks.recording import record, removed, same
from apt.conformance.checks.subject import Subject


@promise("blocks")
def check_logits(subject: Subject) -> Faults:
    """No block is missing, and the output of the last one gives the logits of the model."""
    blocks = [block for _, block, _ in subject.blocks()]
    for name in _beside(subject, blocks):
        yield name, " runs beside the blocks, but blocks() leaves it out"
    others = [tokens for tokens in subject.others().values() if accepts(subject, tokens)]
    for tokens in (subject.tokens, *others):
        if not _gives_logits(replace(subject, tokens=tokens), blocks):
            before = list(chained(subject, tokens))
            yield from before or [Fault("", "the last state does not give the model's logits")]
            return


@torch.no_grad()
def _gives_logits(subject: Subject, blocks: list[nn.Module]) -> bool:
    """True if the model computes its logits from the last state of the chained blocks."""
    state, calls = subject.adapter.enter(subject.model, subject.tokens)
    for block, call in zip(blocks, calls, strict=True):
        state = subject.adapter.step(block, state, call)
    stream = subject.adapter.residual(state)
    if stream.shape[:2] != subject.tokens.shape:
        return True  # `check_stream` reports it
    with _ending_in(blocks[-1], stream):
        logits = subject.logits()
    return same(logits, subject.logits())


def _ending_in(last: nn.Module, stream: Tensor) -> AbstractContextManager[None]:
    """While entered, the ``last`` block returns ``stream`` for every input."""

    def replaced(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return stream
        others = [
            torch.zeros_like(part)  # the second part of a stream
            if isinstance(part, Tensor) and part.shape == stream.shape
            else part
            for part in output[1:]
        ]
        return type(output)((stream, *others))

    return removed([last.register_forward_hook(replaced)])


def _beside(subject: Subject, blocks: list[nn.Module]) -> list[str]:
    """Modules that run and look like blocks, but are not among the blocks.

    A module looks like a block if its class is that of a block; or if it is a member of a list of
    modules, has submodules and weights, and has an input of the shape of the residual stream.
    """
    modules = dict(subject.model.named_modules())
    block_modules = {part for block in blocks for part in block.modules()}
    around = {m for m in modules.values() if not set(blocks).isdisjoint(m.modules())}
    lists = [m for m in modules.values() if isinstance(m, nn.ModuleList | nn.Sequential)]
    members = {part for parts in lists for part in parts if any(True for _ in part.children())}
    kinds = {type(block) for block in blocks}
    likely = {
        name: module
        for name, module in modules.items()
        if module not in block_modules | around and (module in members or type(module) in kinds)
    }
    stream = record(subject.model, blocks, subject.tokens).inputs[0].first
    inner = tuple(f"{name}." for name in likely)
    return [n for n in _given(subject, likely, tuple(stream.shape)) if not n.startswith(inner)]


def _given(subject: Subject, modules: dict[str, nn.Module], shape: tuple[int, ...]) -> list[str]:
    """The ``modules`` that run, have matrices, and have a first input of that ``shape``."""
    names: dict[str, None] = {}
    handles = []
    for name, module in modules.items():
        if not any(parameter.ndim > 1 for parameter in module.parameters()):
            continue

        def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            values = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if values and tuple(values[0].shape) == shape:
                names[name] = None

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    with removed(handles):
        subject.logits()
    return list(names)
