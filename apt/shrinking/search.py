"""Evolutionary search for the blocks and widths of a smaller model, without training.

After "Search for efficient large language models" (arXiv 2409.17372): the first candidates follow
from a choice of blocks and from the importance of each block. The best candidates are then mutated
and crossed over, and their fitness is the loss on calibration text. Here the candidates have exact
weights (`apt.shrinking.proxy`), and the result is pruned anew, block by block.
"""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from apt.errors import AptError
from apt.options import GENERATION, ShrinkOptions
from apt.shrinking.sizes import Size

_BARREN = 10  # generations without a new candidate, after which the search ends


@dataclass(frozen=True)
class Candidate:
    """A smaller model.

    Args:
        size: its numbers of blocks and groups.
        dropped: the indices of the blocks that are dropped.
    """

    size: Size
    dropped: frozenset[int]

    @property
    def key(self) -> str:
        """A text that is the same for equal candidates only."""
        kept = ",".join(f"{kind}={count}" for kind, count in sorted(self.size.kept.items()))
        return f"{kept} without {','.join(map(str, sorted(self.dropped)))}"


@dataclass(frozen=True)
class Scored:
    """A candidate with its loss."""

    candidate: Candidate
    loss: float


@dataclass(frozen=True)
class SearchOptions:
    """The options of a search.

    Args:
        evaluations: the greatest number of candidates whose loss is computed, beside the loss
            without each block, from which the search starts.
        minutes: the time budget, including that start; None for no limit. The result then depends
            on the machine. The start is completed, and one candidate evaluated, in any case.
    """

    evaluations: int = ShrinkOptions.evaluations
    minutes: float | None = None


@dataclass
class Search:
    """A search among the sizes of a smaller model.

    Args:
        sizes: the sizes to choose from; all meet the budget.
        ranking: the indices of all blocks, the least important first.
        loss: the loss of a candidate.
        options: the options of the search.
        seed: the seed of mutation and crossover.
        first: candidates that are evaluated before all others.
        observe: called with the number of evaluated candidates and the lowest loss.
        started: the beginning of the time budget, of `time.monotonic`; now by default.
    """

    sizes: Sequence[Size]
    ranking: Sequence[int]
    loss: Callable[[Candidate], float]
    options: SearchOptions = field(default_factory=SearchOptions)
    seed: int = 0
    first: Sequence[Candidate] = ()
    observe: Callable[[int, float], None] = lambda count, loss: None
    started: float = field(default_factory=time.monotonic)

    def run(self) -> list[Scored]:
        """All candidates that were evaluated, those of lowest loss first.

        Raises:
            AptError: there is no size to choose from.
        """
        if not self.sizes:
            raise AptError("no size meets the budget", "allow other multiples", ("multiple_of",))
        self._draw, self._found = random.Random(self.seed), dict[str, Scored]()
        self._evaluate(self.first)
        self._evaluate(Candidate(s, self._least_important(s)) for s in self.sizes)
        barren = 0
        while not self._done() and barren < _BARREN:
            before = len(self._found)
            self._evaluate(self._child() for _ in range(GENERATION["children"]))
            barren = barren + 1 if len(self._found) == before else 0
        return self._ranked()

    def _ranked(self) -> list[Scored]:
        return sorted(self._found.values(), key=lambda scored: scored.loss)

    def _done(self) -> bool:
        minutes = self.options.minutes
        spent = minutes is not None and time.monotonic() - self.started > 60 * minutes
        return spent or len(self._found) >= self.options.evaluations

    def _evaluate(self, candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            if self._done() and self._found:
                return
            if candidate.key in self._found:
                continue
            self._found[candidate.key] = Scored(candidate, self.loss(candidate))
            self.observe(len(self._found), self._ranked()[0].loss)

    def _least_important(self, size: Size) -> frozenset[int]:
        return frozenset(self.ranking[: len(self.ranking) - size.blocks])

    def _child(self) -> Candidate:
        """A mutated candidate or a cross of two, both from the population."""
        parents = [scored.candidate for scored in self._ranked()[: GENERATION["population"]]]
        first, second = self._draw.choice(parents), self._draw.choice(parents)
        if first.key != second.key and self._draw.random() < 0.5:
            size = self._draw.choice([first.size, second.size])
            return Candidate(size, self._sized(sorted(first.dropped | second.dropped), size))
        size = first.size
        if self._draw.random() < 0.5:  # a neighbour among the sizes
            near = sorted(self.sizes, key=lambda s: abs(s.blocks - size.blocks))
            size = self._draw.choice(near[: max(8, len(near) // 4)])
            return Candidate(size, self._sized(sorted(first.dropped), size))
        return Candidate(size, self._moved(first.dropped))

    def _sized(self, dropped: list[int], size: Size) -> frozenset[int]:
        """As many dropped blocks as the size needs, from ``dropped`` and then by importance."""
        count = len(self.ranking) - size.blocks
        chosen = self._draw.sample(dropped, min(count, len(dropped)))
        others = [index for index in self.ranking if index not in chosen]
        while len(chosen) < count:  # the less important, the more probable
            place = min(int(self._draw.expovariate(0.5)), len(others) - 1)
            chosen.append(others.pop(place))
        return frozenset(chosen)

    def _moved(self, dropped: frozenset[int]) -> frozenset[int]:
        """One dropped block exchanged for another one."""
        kept = [index for index in self.ranking if index not in dropped]
        if not dropped or not kept:
            return dropped
        out = self._draw.choice(sorted(dropped))
        neighbours = [index for index in (out - 1, out + 1) if index in kept]
        pool = neighbours if neighbours and self._draw.random() < 0.5 else kept
        return dropped - {out} | {self._draw.choice(pool)}


def pareto_front(scored: Sequence[Scored], cost: Callable[[Candidate], float]) -> list[Scored]:
    """The candidates for which no other one has both a lower cost and a lower loss."""
    front = list[Scored]()
    for entry in sorted(scored, key=lambda s: (cost(s.candidate), s.loss)):
        if not front or entry.loss < front[-1].loss:
            front.append(entry)
    return front
