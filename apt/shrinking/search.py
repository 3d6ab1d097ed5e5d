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

_IDLE_GENERATIONS = 10  # without a new candidate, after which the search ends


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
        minutes: the time budget, including this start; None for no limit. With a budget, the result
            depends on the machine. The start is always completed, and one candidate evaluated.
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
        first: the candidates that are evaluated first.
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
        """All evaluated candidates, by increasing loss.

        Raises:
            AptError: there is no size to choose from.
        """
        if not self.sizes:
            raise AptError("no size meets the budget", "allow other multiples", ("multiple_of",))
        self._random, self._scored = random.Random(self.seed), dict[str, Scored]()
        self._evaluate(self.first)
        drops = [(size, len(self.ranking) - size.blocks) for size in self.sizes]
        self._evaluate(Candidate(size, frozenset(self.ranking[:n])) for size, n in drops)
        idle = 0
        while not self._is_over() and idle < _IDLE_GENERATIONS:
            count = len(self._scored)
            self._evaluate(self._child() for _ in range(GENERATION["children"]))
            idle = idle + 1 if len(self._scored) == count else 0
        return self._ranked()

    def _ranked(self) -> list[Scored]:
        return sorted(self._scored.values(), key=lambda scored: scored.loss)

    def _is_over(self) -> bool:
        minutes = self.options.minutes
        time_is_over = minutes is not None and time.monotonic() - self.started > 60 * minutes
        return time_is_over or len(self._scored) >= self.options.evaluations

    def _evaluate(self, candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            if self._is_over() and self._scored:
                return
            if candidate.key in self._scored:
                continue
            self._scored[candidate.key] = Scored(candidate, self.loss(candidate))
            self.observe(len(self._scored), self._ranked()[0].loss)

    def _child(self) -> Candidate:
        """A mutated candidate or a cross of two, both from the population."""
        parents = [scored.candidate for scored in self._ranked()[: GENERATION["population"]]]
        first, second = self._random.choice(parents), self._random.choice(parents)
        if first.key != second.key and self._random.random() < 0.5:
            size = self._random.choice([first.size, second.size])
            return Candidate(size, self._dropped_for(sorted(first.dropped | second.dropped), size))
        size = first.size
        if self._random.random() < 0.5:  # a neighbour among the sizes
            near = sorted(self.sizes, key=lambda s: abs(s.blocks - size.blocks))
            size = self._random.choice(near[: max(8, len(near) // 4)])
            return Candidate(size, self._dropped_for(sorted(first.dropped), size))
        return Candidate(size, self._exchanged(first.dropped))

    def _dropped_for(self, dropped: list[int], size: Size) -> frozenset[int]:
        """The blocks that the size drops: from ``dropped``, then by importance."""
        count = len(self.ranking) - size.blocks
        chosen = self._random.sample(dropped, min(count, len(dropped)))
        others = [index for index in self.ranking if index not in chosen]
        while len(chosen) < count:  # the less important, the more probable
            place = min(int(self._random.expovariate(0.5)), len(others) - 1)
            chosen.append(others.pop(place))
        return frozenset(chosen)

    def _exchanged(self, dropped: frozenset[int]) -> frozenset[int]:
        """``dropped`` with one block exchanged for a kept block."""
        kept = [index for index in self.ranking if index not in dropped]
        if not dropped or not kept:
            return dropped
        old = self._random.choice(sorted(dropped))
        neighbours = [index for index in (old - 1, old + 1) if index in kept]
        pool = neighbours if neighbours and self._random.random() < 0.5 else kept
        return dropped - {old} | {self._random.choice(pool)}


def pareto_front(scored: Sequence[Scored], cost: Callable[[Candidate], float]) -> list[Scored]:
    """The candidates that no other candidate beats in both cost and loss."""
    front = list[Scored]()
    for entry in sorted(scored, key=lambda s: (cost(s.candidate), s.loss)):
        if not front or entry.loss < front[-1].loss:
            front.append(entry)
    return front
