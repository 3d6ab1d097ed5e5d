"""What is checked: an adapter, with a small model of its family."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Call, Site, State
from apt.plugin.specs import AdapterSpec

_LONGER = 48


@dataclass(frozen=True)
class Step:
    """A block, with all that is needed to run it.

    Attributes:
        name, block, index: the block and its place among the blocks.
        sites: its sites.
        state: what flows into it.
        call: how it is called.
        calls: how every block is called.
    """

    name: str
    block: nn.Module
    index: int
    sites: list[Site]
    state: State
    calls: list[Call]

    @property
    def call(self) -> Call:
        """How this block is called."""
        return self.calls[self.index]


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
        adapter: the adapter.
        model: a model of its family, in eval mode; random and tiny is enough. It is not changed.
        tokens: token ids (samples, seqlen), without padding; a few dozen in all.
        spec: what a plugin declares of the adapter; None where that is not known.
    """

    adapter: Adapter
    model: nn.Module
    tokens: Tensor
    spec: AdapterSpec | None = None

    def blocks(self) -> list[tuple[str, nn.Module, list[Site]]]:
        """Every block with its name and its sites."""
        return [(n, b, self.adapter.sites(b)) for n, b in self.adapter.blocks(self.model)]

    def steps(self) -> Iterator[Step]:
        """Every block in turn, with the state before it."""
        with torch.no_grad():
            state, calls = self.adapter.enter(self.model, self.tokens)
            for index, (name, block, sites) in enumerate(self.blocks()):
                step = Step(name, block, index, sites, state, calls)
                yield step
                state = self.step(step)

    def step(self, step: Step) -> State:
        """What the adapter makes of the state."""
        return self.adapter.step(step.block, step.state, step.call)

    @torch.no_grad()
    def logits(self, model: nn.Module | None = None) -> Tensor:
        """What the model, or another, gives for the tokens."""
        output: Any = (model or self.model)(self.tokens)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    def others(self) -> dict[str, Tensor]:
        """Other batches (samples, seqlen) of the same token ids: as large, and of another length.

        The other length is larger than the first where the model's positions reach so far.
        """
        samples, seqlen = self.tokens.shape
        limit = self.adapter.positions(getattr(self.model, "config", None)) or _LONGER
        length = min(max(_LONGER, seqlen + 8), limit)
        length = length if length > seqlen else max(1, seqlen - 3)
        ids = self.tokens.flatten().flip(0)
        longer = ids.repeat(length // ids.numel() + 1)[:length].view(1, length)
        return {
            f"on a second batch of {samples} × {seqlen} tokens": ids.view(samples, seqlen),
            f"on another length, 1 × {length} tokens": longer,
        }
