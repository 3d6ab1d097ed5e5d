"""The sources of calibration samples, and the tokens of each source by expert."""

from dataclasses import dataclass

import torch
from torch import Tensor

from apt.adapter import Routing
from apt.distributed.ranks import Ranks
from apt.events import ExpertsRouted


@dataclass(frozen=True)
class SampleSources:
    """The sources of calibration samples.

    Attributes:
        names: the names of the sources.
        of: the index in ``names`` of the source of each sample (samples,).
        mixed: the number of sources that the user named, which come first in ``names``. The model
            or a random generator made the samples of the others.
    """

    names: tuple[str, ...]
    of: Tensor
    mixed: int = 1

    @classmethod
    def one(cls, samples: int) -> "SampleSources":
        """One source for all samples."""
        return cls(("calibration",), torch.zeros(samples, dtype=torch.long))

    def part(self, chosen: Tensor) -> "SampleSources":
        """The sources of some of the samples."""
        return SampleSources(self.names, self.of[chosen], self.mixed)


class RoutedBySource:
    """Counts of the tokens that the router of a block sends to each expert, by source.

    They count the tokens of this rank until `over_ranks` adds those of the other ranks.

    Attributes:
        tokens: the counts of tokens (sources, experts).
        weights: the sums of the router's weights of these tokens (sources, experts).
    """

    def __init__(self, names: tuple[str, ...], experts: int) -> None:
        self._names = names
        self.tokens = torch.zeros(len(names), experts, dtype=torch.double)
        self.weights = torch.zeros(len(names), experts, dtype=torch.double)

    def add(self, routing: Routing, sources: Tensor) -> None:
        """Add the routing of tokens with their sources (tokens,)."""
        experts = self.tokens.shape[1]
        used = (routing.index >= 0) & (routing.index < experts)
        cells = sources.to(routing.index.device).unsqueeze(1) * experts + routing.index
        cells = cells[used].cpu()
        weights = routing.weights.detach().double().abs()[used].cpu()
        self.tokens.view(-1).index_add_(0, cells, torch.ones_like(weights))
        self.weights.view(-1).index_add_(0, cells, weights)

    def over_ranks(self, ranks: Ranks) -> None:
        """Add the tokens of the other ranks."""
        ranks.add(self.tokens)
        ranks.add(self.weights)

    def record(self, name: str) -> ExpertsRouted:
        """The record for the block of that name, without sources that have no tokens."""
        present = [source for source in range(len(self._names)) if self.tokens[source].any()]
        return ExpertsRouted(
            name,
            {
                self._names[source]: tuple(map(int, self.tokens[source].tolist()))
                for source in present
            },
            {
                self._names[source]: tuple(float(f"{w:.6g}") for w in self.weights[source].tolist())
                for source in present
            },
        )
