"""Rounds over several models: each model has its turn in each round."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from apt.errors import AptError
from apt.extending import Source
from apt_lab.benchmark.measures import Facts, Result, Turn
from apt_lab.benchmark.process import started
from apt_lab.options import BenchRun


def bench(
    run: BenchRun,
    sources: Sequence[Source],
    notice: Callable[[str], None] = lambda line: None,
    status: Callable[[str], None] = lambda line: None,
) -> tuple[BenchRun, list[Result]]:
    """Measure models, each in a process of its own; while one process measures, the others wait.

    In each round each model is loaded, measured and released. So only the weights of one model are
    in memory, and a drift of the machine's speed affects all models equally. Every second round is
    in the opposite order.

    Args:
        run: the options.
        sources: the models; one may be given twice, which shows the noise of the machine.
        notice: called with a line if the prompt is shortened to fit the models.
        status: called with a line before each turn.

    Returns:
        The options with the used length of the prompt, and the measures of each model.

    Raises:
        AptError: an option is out of range, or a model does not load, fails or needs more memory.
    """
    run.check()
    run = replace(run, batch=tuple(dict.fromkeys(run.batch)))
    names = [source.reference for source in sources]
    with ExitStack() as stack:
        workers = [stack.enter_context(started(source, run)) for source in sources]
        facts = [worker.facts() for worker in workers]
        _check_alike(names, facts)
        limits = {name: of_model.positions for name, of_model in zip(names, facts, strict=True)}
        run = fitted(run, limits, notice, one_side=not facts[0].reads)
        turns: list[list[Turn]] = [[] for _ in workers]
        for number, index in _order(run.rounds, len(workers)):
            status(f"round {number + 1}/{run.rounds}: {names[index]}")
            turns[index].append(workers[index].turn(run, number))
    results = zip(names, facts, turns, strict=True)
    return run, [
        Result(name, model_facts, tuple(measures)) for name, model_facts, measures in results
    ]


def _order(rounds: int, models: int) -> Iterator[tuple[int, int]]:
    """The round and the model of each turn."""
    for number in range(rounds):
        order = range(models)
        yield from ((number, index) for index in (reversed(order) if number % 2 else order))


def _check_alike(names: Sequence[str], facts: Sequence[Facts]) -> None:
    """Raise if models do not read the same kinds of inputs, or only some of them write."""
    for name, each in zip(names, facts, strict=True):
        if (each.reads, each.writes) != (facts[0].reads, facts[0].writes):
            raise AptError(
                f"{names[0]} {_task(facts[0])}, and {name} {_task(each)}", "measure them apart"
            )


def _task(facts: Facts) -> str:
    """What a model does, in words."""
    reads = facts.reads or "windows of text"
    return f"reads {reads}" + (" and writes" if facts.reads and facts.writes else "")


def fitted(
    run: BenchRun,
    positions: Mapping[str, int | None],
    notice: Callable[[str], None],
    *,
    one_side: bool = True,
) -> BenchRun:
    """The options with a prompt that fits the positions of every model.

    All models receive the same number of tokens, since their speeds are compared.

    Args:
        run: the options.
        positions: the positions of each model by its name; None if unlimited.
        notice: called with a line if the prompt is shortened.
        one_side: True if the generated tokens have positions behind those of the prompt.

    Raises:
        AptError: a model has too few positions for the generated tokens.
    """
    limits = {name: limit for name, limit in positions.items() if limit is not None}
    if not limits:
        return run
    name = min(limits, key=limits.__getitem__)
    space = limits[name] - (run.generate if one_side else 0)
    if space < 1:
        raise AptError(
            f"{name} has {limits[name]} positions, too few for a prompt and {run.generate} "
            "generated tokens",
            "generate fewer",
            ("generate",),
        )
    if run.prompt <= space:
        return run
    generated = f", and {run.generate} tokens are generated" if one_side else ""
    notice(
        f"prompt: {space} tokens (not {run.prompt}: {name} has {limits[name]} positions{generated})"
    )
    return replace(run, prompt=space)
