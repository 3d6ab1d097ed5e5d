"""``apt-prune bench``."""

from pathlib import Path
from typing import TYPE_CHECKING

from apt.console import Progress, find_model, notice
from apt.options import PrintingOptions
from apt_lab.options import BenchRun

if TYPE_CHECKING:
    from apt.extending import Source


def bench(run: BenchRun, printing: PrintingOptions) -> None:
    """Measure speed and memory of one or several models.

    The first model is the base of the ratios of the others. Each model runs in a process of its
    own, and the models take turns.
    """
    from apt_lab.benchmark.break_even import pays_from
    from apt_lab.benchmark.rounds import bench as measure
    from apt_lab.commands.bench_summary import PaysFrom, show_results

    sources = [find_model(model, run) for model in run.models]
    with Progress("starting a process for each model") as progress:
        run, results = measure(run, sources, notice, progress.status)
        pays = None
        if results[0].facts.device == "cpu" and any(map(_is_packed, sources)):
            progress.status("measuring from which share of zeros on packing pays")
            pays = PaysFrom(pays_from(results[0].facts.threads))
    show_results(run, results, pays, as_json=printing.as_json)


def _is_packed(source: "Source") -> bool:
    from apt.runtime.entries import is_packed

    return not source.on_hub and is_packed(Path(source.location))
