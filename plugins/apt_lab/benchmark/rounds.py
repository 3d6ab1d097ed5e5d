"""Rounds over several models: each model has its turn in each round."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from apt.errors import AptError
from apt.locations.model_source import Source
from apt_lab.benchmark.measures import Result, Turn
from apt_lab.benchmark.options import Setting, Work
from apt_lab.benchmark.process import started


def bench(
    sources: Sequence[Source],
    setting: Setting,
    work: Work,
    rounds: int,
    notice: Callable[[str], None] = lambda line: None,
    status: Callable[[str], None] = lambda line: None,
) -> tuple[Work, list[Result]]:
    """Measure models, each in a process of its own; while one measures, the others wait.

    In each round each model is loaded, measured and released. So the weights of one model are in
    memory at a time, and a drift of the machine's speed affects all models alike. Every second
    round is in the opposite order.

    Args:
        sources: the models; one may be given twice, which shows the noise of the machine.
        setting: the way in which they are loaded.
        work: the tokens that each processes in a round.
        rounds: the number of rounds.
        notice: called with a line if the prompt is shortened to fit the models.
        status: called with a line before each turn.

    Returns:
        The work with the prompt that was used, and the measures of each model.

    Raises:
        AptError: an option is out of range, or a model does not load, fails or needs more memory.
    """
    if rounds < 1:
        raise AptError("there must be at least 1 round", options=("rounds",))
    names = [source.reference for source in sources]
    with ExitStack() as stack:
        workers = [stack.enter_context(started(source, setting)) for source in sources]
        facts = [worker.facts() for worker in workers]
        limits = {name: found.positions for name, found in zip(names, facts, strict=True)}
        work = work.fitted(limits, notice)
        turns: list[list[Turn]] = [[] for _ in workers]
        for number, index in _order(rounds, len(workers)):
            status(f"round {number + 1}/{rounds}: {names[index]}")
            turns[index].append(workers[index].turn(work, number))
    found = zip(names, facts, turns, strict=True)
    return work, [Result(name, known, tuple(measures)) for name, known, measures in found]


def _order(rounds: int, models: int) -> Iterator[tuple[int, int]]:
    """The round and the model of each turn."""
    for number in range(rounds):
        order = range(models)
        yield from ((number, index) for index in (reversed(order) if number % 2 else order))
