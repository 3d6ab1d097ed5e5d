"""The blocks are all that there are: chained, they make the model's logits."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.conformance.checks.blocks import chained, takes
from apt.conformance.checks.promise import Fault, promise
from apt.conformance.checks.recording import record, removed
from apt.conformance.checks.subject import Subject
from apt.conformance.checks.tensors import same


@promise
def check_logits(subject: Subject) -> Iterator[Fault]:
    """No block is left out, and what the last one gives makes the model's logits."""
    blocks = [block for _, block, _ in subject.blocks()]
    for name in _beside(subject, blocks):
        yield Fault(name, " runs beside the blocks, but blocks() leaves it out", "blocks")
    others = [tokens for tokens in subject.others().values() if takes(subject, tokens)]
    for tokens in (subject.tokens, *others):
        if not _makes_logits(replace(subject, tokens=tokens), blocks):
            before = list(chained(subject, tokens))
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


def _ending_in(last: nn.Module, stream: Tensor) -> AbstractContextManager[None]:
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
    around = {m for m in named.values() if not set(blocks).isdisjoint(m.modules())}
    lists = [m for m in named.values() if isinstance(m, nn.ModuleList | nn.Sequential)]
    members = {part for parts in lists for part in parts if any(True for _ in part.children())}
    kinds = {type(block) for block in blocks}
    likely = {
        name: module
        for name, module in named.items()
        if module not in inside | around and (module in members or type(module) in kinds)
    }
    given = record(subject.model, blocks, subject.tokens).inputs[0].first
    return [
        name for name in _given(subject, likely, tuple(given.shape)) if not _within(name, likely)
    ]


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
