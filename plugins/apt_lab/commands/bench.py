"""``apt-prune bench``, and its results as tables or as JSON."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt.console import Progress, find_model, notice, say, show, show_json, size, table
from apt.options import PrintingOptions
from apt_lab.benchmark.measures import SOUND_SECONDS, Facts, Result, Spread, Turn, ratios, spread
from apt_lab.options import BenchRun

if TYPE_CHECKING:
    from apt.extending import Source

_Measure = Callable[[Turn], float]


def bench(run: BenchRun, printing: PrintingOptions) -> None:
    """Measure speed and memory of one or several models.

    The first model is the base of the ratios of the others. Each model runs in a process of its
    own, and the models take turns.
    """
    from apt_lab.benchmark.break_even import pays_from
    from apt_lab.benchmark.rounds import bench as measure

    sources = [find_model(model, run) for model in run.models]
    with Progress("starting a process for each model") as progress:
        run, results = measure(run, sources, notice, progress.status)
        pays = None
        facts = results[0].facts
        if facts.device == "cpu" and not facts.reads and any(map(_is_packed, sources)):
            progress.status("measuring from which share of zeros on packing pays")
            pays = PaysFrom(pays_from(facts.threads))
    show_results(run, results, pays, as_json=printing.as_json)


def _is_packed(source: "Source") -> bool:
    from apt.runtime.entries import is_packed

    return not source.on_hub and is_packed(Path(source.location))


@dataclass(frozen=True)
class PaysFrom:
    """The least share of zeros at which packed products are faster on this machine.

    Attributes:
        share: the share; None if packed products are never faster.
    """

    share: float | None

    @property
    def line(self) -> str:
        """A line for a person."""
        products = "packed products of one vector in bf16"
        if self.share is None:
            from apt.runtime.linear import describe_kernels

            state, remedy = describe_kernels()
            return f"on this processor {products} are not faster than dense ones" + (
                f" ({state}; {remedy})" if remedy else ""
            )
        start = f"from {self.share:.0%} zeros on" if self.share else "with any share of zeros"
        return f"on this processor {products} are faster than torch's dense ones {start}"


def show_results(
    run: BenchRun, results: Sequence[Result], pays: PaysFrom | None = None, *, as_json: bool
) -> None:
    """Print the measures of all models, with their ratios to the first.

    Args:
        run: the options.
        results: the measures of each model.
        pays: the share of zeros at which packed products get faster; None without a packed model.
        as_json: print one JSON object.
    """
    if as_json:
        break_even = {} if pays is None else {"packed_pays_from": pays.share}
        show_json({**_record(run, results), **break_even})
        return
    _show_speeds(run, results)
    _show_sizes(results)
    facts, rounds = results[0].facts, len(results[0].turns)
    rounds_text = "1 round" if rounds == 1 else f"median (smallest–largest) of {rounds} rounds"
    threads = f"{facts.threads} thread{'s' if facts.threads > 1 else ''}"
    say(
        f"{rounds_text}; {_work(run, facts)}; on {facts.device} "
        f"({threads if facts.device == 'cpu' else facts.device_name})"
    )
    for line in (*_slow(results), *_without_gain(run, results), *([pays.line] if pays else [])):
        say(line)


def _work(run: BenchRun, facts: Facts) -> str:
    """The inputs of a sequence or of a sample, and the outputs."""
    if not facts.reads:
        return f"{run.prompt} tokens of prompt, {run.generate} generated"
    kinds = {
        "texts": f"texts of {run.prompt} tokens", "images": "images",
        "sounds": f"sounds of {SOUND_SECONDS} s",
    }  # fmt: skip
    words = " and ".join(kinds[kind] for kind in facts.reads.split(" and "))
    return f"{words}, {run.generate} tokens written" if facts.writes else words


@dataclass(frozen=True)
class _Column:
    """A speed.

    Attributes:
        title: its title in the table.
        key: its entry in the record.
        work: what is done, for messages.
        things: the things in a batch, for messages.
        name: the attribute of `Speed`.
    """

    title: str
    key: str
    work: str
    things: str
    name: str

    def measure(self, index: int) -> _Measure:
        """The speed of one batch."""

        def speed(turn: Turn) -> float:
            value: float = getattr(turn.speeds[index], self.name)
            return value

        return speed


def _columns(facts: Facts) -> list[_Column]:
    """The speeds that models of a kind have."""
    things = facts.reads if facts.reads and " " not in facts.reads else "samples"
    things = things if facts.reads else "sequences"
    tokens = "decode tokens/s", "decode_tokens_per_second", "decoding", things, "decode"
    decode = [_Column(*tokens)] if facts.writes else []
    if not facts.reads:
        key = "prefill_tokens_per_second"
        return [_Column("prefill tokens/s", key, "prefill", things, "prefill"), *decode]
    return [_Column(f"{things}/s", "samples_per_second", "reading", things, "prefill"), *decode]


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
        lines = [
            f"{column.work} of {batch} {column.things[:-1] if batch == 1 else column.things}"
            for column in _columns(results[0].facts)
            for index, batch in enumerate(run.batch)
            if (ratio := _ratio(column.measure(index), result, results)) and ratio.smallest <= 1
        ]
        if lines:
            yield f"{result.model} is not faster than {results[0].model} in: {', '.join(lines)}"


def _show_speeds(run: BenchRun, results: Sequence[Result]) -> None:
    """Print a row for each model and batch."""
    several = len(results) > 1
    ratio = [">ratio"] if several else []
    columns = _columns(results[0].facts)
    titles = (title for column in columns for title in (f">{column.title}", *ratio))
    rows = table("model", ">batch", *titles)
    for result in results:
        for index, batch in enumerate(run.batch):
            measures = (column.measure(index) for column in columns)
            form = ",.1f" if results[0].facts.reads else ",.0f"
            cells = (c for m in measures for c in _cells(m, result, results, form))
            rows.add_row(result.model, str(batch), *cells)
    show(rows)


def _show_sizes(results: Sequence[Result]) -> None:
    """Print a row for each model."""
    ratio = [">ratio"] if len(results) > 1 else []
    on_gpu = [">GPU memory"] if len(results[0].peak_bytes) > 1 else []
    rows = table(
        "model", ">load s", *ratio, ">peak memory", *on_gpu, ">weights on disk", ">parameters",
        "dtype",
    )  # fmt: skip
    for result in results:
        rows.add_row(
            result.model,
            *_cells(_load, result, results, ",.3f"),
            *map(size, result.peak_bytes.values()),
            size(result.facts.weight_bytes),
            f"{result.facts.parameters:,}",
            result.turns[0].dtype,
        )
    show(rows)


def _cells(measure: _Measure, result: Result, results: Sequence[Result], form: str) -> list[str]:
    """The cells with the spread of a measure and, with several models, of its ratio."""
    cells = [_text(spread(result.each(measure)), form)]
    if len(results) > 1:
        ratio = _ratio(measure, result, results)
        cells.append(_text(ratio, ".2f") if ratio else "")
    return cells


def _text(values: Spread, form: str) -> str:
    middle = f"{values.median:{form}}"
    if values.smallest == values.largest:
        return middle
    return f"{middle} ({values.smallest:{form}}–{values.largest:{form}})"


def _ratio(measure: _Measure, result: Result, results: Sequence[Result]) -> Spread | None:
    """The ratio to the first model; None for the first model itself."""
    if result is results[0]:
        return None
    return spread(ratios(result.each(measure), results[0].each(measure)))


def _load(turn: Turn) -> float:
    return turn.load_seconds


def _record(run: BenchRun, results: Sequence[Result]) -> dict[str, Any]:
    facts = results[0].facts
    return {
        **({"reads": facts.reads} if facts.reads else {}),
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
            {"batch": batch}
            | {each.key: measured(each.measure(index)) for each in _columns(result.facts)}
            for index, batch in enumerate(run.batch)
        ],
    }  # fmt: skip
