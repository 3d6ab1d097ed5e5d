"""The results of a benchmark, as tables or as JSON."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apt.console import say, show, show_json, size, table
from apt_lab.benchmark.measures import Result, Spread, Turn, ratios, spread
from apt_lab.options import BenchRun

_Measure = Callable[[Turn], float]


@dataclass(frozen=True)
class PaysFrom:
    """The share of zeros from which on packed products are faster on this machine.

    Attributes:
        share: the share; None if packed products are never faster.
    """

    share: float | None

    @property
    def line(self) -> str:
        """A line for a person."""
        what = "packed products of one vector in bf16"
        if self.share is None:
            return f"on this processor {what} are not faster than dense ones"
        start = f"from {self.share:.0%} zeros on" if self.share else "with any share of zeros"
        return f"on this processor {what} are faster than torch's dense ones {start}"


def show_results(
    run: BenchRun, results: Sequence[Result], pays: PaysFrom | None = None, *, as_json: bool
) -> None:
    """Print the measures of all models, with their ratios to the first.

    Args:
        run: the options.
        results: the measures of each model.
        pays: the share of zeros from which on packed products are faster; None if no model is
            packed.
        as_json: print one JSON object.
    """
    if as_json:
        found = {} if pays is None else {"packed_pays_from": pays.share}
        show_json({**_record(run, results), **found})
        return
    _show_speeds(run, results)
    _show_sizes(results)
    facts, rounds = results[0].facts, len(results[0].turns)
    counted = "1 round" if rounds == 1 else f"median (smallest–largest) of {rounds} rounds"
    threads = f"{facts.threads} thread{'s' if facts.threads > 1 else ''}"
    say(
        f"{counted}; {run.prompt} tokens of prompt, {run.generate} generated; on {facts.device} "
        f"({threads if facts.device == 'cpu' else facts.device_name})"
    )
    for line in (*_slow(results), *_without_gain(run, results), *([pays.line] if pays else [])):
        say(line)


def _slow(results: Sequence[Result]) -> Iterator[str]:
    """A line for each model whose dtype the device multiplies slowly."""
    for result in results:
        if any(turn.slow for turn in result.turns):
            yield (
                f"{result.model} runs in {result.turns[0].dtype}, in which transformers opens it; "
                f"this {'processor' if result.facts.device == 'cpu' else 'device'} multiplies "
                "that more slowly than float32: see --dtype float32"
            )


def _without_gain(run: BenchRun, results: Sequence[Result]) -> Iterator[str]:
    """A line for each model that was not faster than the first one in all rounds."""
    for result in results[1:]:
        slow = [
            f"{name} of {batch} {'sequence' if batch == 1 else 'sequences'}"
            for name, measure in (("prefill", _prefill), ("decoding", _decode))
            for place, batch in enumerate(run.batch)
            if (found := _ratio(measure(place), result, results)) and found.smallest <= 1
        ]
        if slow:
            yield f"{result.model} is not faster than {results[0].model} in: {', '.join(slow)}"


def _show_speeds(run: BenchRun, results: Sequence[Result]) -> None:
    """Print a row for each model and batch."""
    several = len(results) > 1
    ratio = [">ratio"] if several else []
    made = table("model", ">batch", ">prefill tokens/s", *ratio, ">decode tokens/s", *ratio)
    for result in results:
        for place, batch in enumerate(run.batch):
            measures = (_prefill(place), _decode(place))
            cells = (c for m in measures for c in _cells(m, result, results, ",.0f"))
            made.add_row(result.model, str(batch), *cells)
    show(made)


def _show_sizes(results: Sequence[Result]) -> None:
    """Print a row for each model."""
    ratio = [">ratio"] if len(results) > 1 else []
    on_gpu = [">GPU memory"] if len(results[0].peak_bytes) > 1 else []
    made = table(
        "model", ">load s", *ratio, ">peak memory", *on_gpu, ">weights on disk", ">parameters",
        "dtype",
    )  # fmt: skip
    for result in results:
        made.add_row(
            result.model,
            *_cells(_load, result, results, ",.3f"),
            *map(size, result.peak_bytes.values()),
            size(result.facts.weight_bytes),
            f"{result.facts.parameters:,}",
            result.turns[0].dtype,
        )
    show(made)


def _cells(measure: _Measure, result: Result, results: Sequence[Result], form: str) -> list[str]:
    """The spread of a measure and, if there are several models, that of its ratio."""
    cells = [_text(spread(result.each(measure)), form)]
    if len(results) > 1:
        own = _ratio(measure, result, results)
        cells.append(_text(own, ".2f") if own else "")
    return cells


def _text(found: Spread, form: str) -> str:
    middle = f"{found.median:{form}}"
    if found.smallest == found.largest:
        return middle
    return f"{middle} ({found.smallest:{form}}–{found.largest:{form}})"


def _ratio(measure: _Measure, result: Result, results: Sequence[Result]) -> Spread | None:
    """The ratio to the first model; None for the first model itself."""
    if result is results[0]:
        return None
    return spread(ratios(result.each(measure), results[0].each(measure)))


def _load(turn: Turn) -> float:
    return turn.load_seconds


def _prefill(place: int) -> _Measure:
    return lambda turn: turn.speeds[place].prefill


def _decode(place: int) -> _Measure:
    return lambda turn: turn.speeds[place].decode


def _record(run: BenchRun, results: Sequence[Result]) -> dict[str, Any]:
    facts = results[0].facts
    return {
        "prompt": run.prompt,
        "generate": run.generate,
        "batches": run.batch,
        "rounds": len(results[0].turns),
        "device": facts.device,
        "device_name": facts.device_name,
        "threads": facts.threads,
        "versions": facts.versions,
        "models": [_model_record(run, result, results) for result in results],
    }


def _model_record(run: BenchRun, result: Result, results: Sequence[Result]) -> dict[str, Any]:
    def measured(measure: _Measure) -> dict[str, Any]:
        values, ratio = result.each(measure), _ratio(measure, result, results)
        return {**asdict(spread(values)), "ratio": asdict(ratio) if ratio else None,
                "values": values}  # fmt: skip

    return {
        "model": result.model,
        "parameters": result.facts.parameters,
        "dtype": result.turns[0].dtype,
        "slow_dtype": any(turn.slow for turn in result.turns),
        "weight_bytes": result.facts.weight_bytes,
        "idle_bytes": result.facts.idle_bytes,
        "peak_memory_bytes": result.peak_bytes,
        "load_seconds": measured(_load),
        "speeds": [
            {"batch": batch, "prefill_tokens_per_second": measured(_prefill(place)),
             "decode_tokens_per_second": measured(_decode(place))}
            for place, batch in enumerate(run.batch)
        ],
    }  # fmt: skip
