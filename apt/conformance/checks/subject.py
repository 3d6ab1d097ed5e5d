"""The subject of the checks: an adapter, with a small model of its family."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Call, Site, State
from apt.adapter.text_config import text_config
from apt.calibration.batches import Batch, OpenBlock
from apt.conformance.checks.recording import uncached
from apt.conformance.oracle import Oracle, Seen
from apt.plugin.specs import AdapterSpec

_LONGER = 48
_CHEAP = 2**31  # tokens times parameters of a run of about a second


@dataclass(frozen=True)
class Step:
    """A block with its sites, the state that enters it, and the calls of all blocks."""

    name: str
    block: nn.Module
    index: int
    sites: list[Site]
    state: State
    calls: list[Call]

    @property
    def call(self) -> Call:
        """The arguments of the call of this block."""
        return self.calls[self.index]


@dataclass(frozen=True)
class Subject:
    """An adapter, with a model and tokens to check it with.

    Attributes:
        adapter: the adapter.
        model: a model of its family, in eval mode; a tiny random one is enough. Checks do not
            change it.
        tokens: token ids (samples, seqlen), without padding; a few dozen in total.
        spec: the adapter's spec; None if it is unknown.
    """

    adapter: Adapter
    model: nn.Module
    tokens: Tensor
    spec: AdapterSpec | None = None

    def blocks(self) -> list[tuple[str, nn.Module, list[Site]]]:
        """Every block with its name and its sites."""
        return [(n, b, self.adapter.sites(b)) for n, b in self.adapter.blocks(self.model)]

    def steps(self) -> Iterator[Step]:
        """Each block in order, with the state before it."""
        with torch.no_grad():
            state, calls = self.adapter.enter(self.model, self.tokens)
            for index, (name, block, sites) in enumerate(self.blocks()):
                step = Step(name, block, index, sites, state, calls)
                yield step
                state = self.step(step)

    def step(self, step: Step) -> State:
        """The state after a block."""
        return self.adapter.step(step.block, step.state, step.call)

    def opened(self, step: Step, block: nn.Module | None = None, batches: int = 1) -> OpenBlock:
        """The block of a step, or a copy of it, with batches of the subject's tokens before it."""
        inputs = [Batch(step.state, step.calls, self.tokens.numel()) for _ in range(batches)]
        return OpenBlock(self.adapter, block or step.block, step.index, inputs)

    @torch.no_grad()
    def logits(self, model: nn.Module | None = None) -> Tensor:
        """The logits of the model, or of another one, for the tokens."""
        output = uncached(model or self.model, self.tokens)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    def positions(self) -> int | None:
        """The adapter's limit on the length of a sequence."""
        return self.adapter.positions(getattr(self.model, "config", None))

    def others(self) -> dict[str, Tensor]:
        """Two other batches (samples, seqlen) of the same token ids: of equal size, and longer.

        If the model has too few positions, the second batch is shorter instead.
        """
        samples, seqlen = self.tokens.shape
        limit = self.positions() or _LONGER
        length = min(max(_LONGER, seqlen + 8), limit)
        length = length if length > seqlen else max(1, seqlen - 3)
        return {
            f"on a second batch of {samples} × {seqlen} tokens": self._ids(samples, seqlen),
            f"on another length, 1 × {length} tokens": self._ids(1, length),
        }

    def long(self) -> dict[str, Tensor]:
        """A batch (1, seqlen) of the longest sequence that the adapter allows and that is cheap.

        Without a limit, the length is one more than the positions of the configuration, where a
        table of positions would end. There is no batch if it is not longer than those of `others`.
        """
        config = text_config(getattr(self.model, "config", None))
        configured = getattr(config, "max_position_embeddings", None)
        unlimited = configured + 1 if isinstance(configured, int) else 0
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        length = min(self.positions() or unlimited, _CHEAP // weights)
        if length <= max(_LONGER, self.tokens.shape[1] + 8):
            return {}
        return {f"on a long sequence, 1 × {length} tokens": self._ids(1, length)}

    def _ids(self, samples: int, seqlen: int) -> Tensor:
        """Token ids (samples, seqlen): ``tokens`` from the last to the first, repeated."""
        ids, count = self.tokens.flatten().flip(0), samples * seqlen
        return ids.repeat(count // ids.numel() + 1)[:count].view(samples, seqlen)


def products(subject: Subject, step: Step) -> dict[Site, Seen]:
    """The products with each site that runs in a step."""
    routed = [site for site in step.sites if site.routed]
    oracle = Oracle({site: site.weight(step.block).data for site in step.sites}, routed)
    with oracle:
        subject.step(step)
    return oracle.seen
