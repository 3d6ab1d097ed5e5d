"""``apt-prune bench``."""

from pathlib import Path
from typing import TYPE_CHECKING

from apt.cli.opening import find_model
from apt.options import PrintingOptions
from apt_lab.benchmark.options import Setting, Work
from apt_lab.options import BenchRun

if TYPE_CHECKING:
    from apt.locations.model_source import Source


def bench(run: BenchRun, printing: PrintingOptions) -> None:
    """Measure speed and memory of one or several models.

    The first model is the base of the ratios of the others. Each model runs in a process of its
    own, and the models take turns.
    """
    from apt.cli.output import notice
    from apt.cli.progress import Progress
    from apt_lab.benchmark.break_even import pays_from
    from apt_lab.benchmark.rounds import bench as measure
    from apt_lab.commands.bench_summary import PaysFrom, show_results

    sources = [find_model(model, run) for model in run.models]
    setting = Setting(run.adapter, run.device, run.dtype, run.threads)
    work = Work(run.prompt, run.generate, tuple(dict.fromkeys(run.batch)))
    with Progress("starting a process for each model") as status:
        work, results = measure(sources, setting, work, run.rounds, notice, status.status)
        pays = None
        if results[0].facts.device == "cpu" and any(map(_is_packed, sources)):
            status.status("measuring from which share of zeros on packing pays")
            pays = PaysFrom(pays_from(results[0].facts.threads))
    show_results(work, results, pays, as_json=printing.as_json)


def _is_packed(source: "Source") -> bool:
    from apt.runtime.entries import is_packed

    return not source.on_hub and is_packed(Path(source.location))
