"""``apt-prune bench``."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from apt.cli import arguments as args
from apt_lab.benchmark.options import Setting, Work

if TYPE_CHECKING:
    from apt.locations.model_source import Source


def bench(
    models: list[str] = typer.Argument(
        metavar="MODEL", help="Directories, hub names, .gguf files or zoo:NAME."
    ),
    prompt: int = typer.Option(512, "--prompt", help="Tokens of a prompt; they are random."),
    generate: int = typer.Option(64, "--generate", help="Tokens to generate after a prompt."),
    batch: list[int] = typer.Option(
        [1, 8],
        "--batch",
        help="Number of sequences that run together; repeatable.",
    ),
    rounds: int = typer.Option(
        5,
        "--rounds",
        help="Number of rounds; each loads and measures every model.",
    ),
    adapter: str | None = args.ADAPTER,
    device: str = args.DEVICE,
    dtype: str = args.DTYPE,
    threads: int | None = typer.Option(
        None,
        "--threads",
        help="CPU threads; by default those of torch.",
    ),
    as_json: bool = args.JSON,
    trust_remote_code: bool = args.REMOTE,
    revision: str | None = args.REVISION,
    token: str | None = args.TOKEN,
    cache_dir: str | None = args.CACHE_DIR,
) -> None:
    """Measure speed and memory of one or several models.

    The first model is the base of the ratios of the others. Each model runs in a process of its
    own, and the models take turns.
    """
    setting = Setting(adapter, device, dtype, threads)
    work = Work(prompt, generate, tuple(dict.fromkeys(batch)))
    setting.check()
    work.check()
    from apt.cli.output import notice
    from apt.cli.progress import Progress
    from apt.plugin.registry import registry
    from apt_lab.benchmark.break_even import pays_from
    from apt_lab.benchmark.rounds import bench as measure
    from apt_lab.commands.bench_summary import PaysFrom, show_results

    hub = args.read_hub(revision, token, cache_dir)
    sources = [
        args.find_model(model, registry(), hub, trust_remote_code=trust_remote_code)
        for model in models
    ]
    with Progress("starting a process for each model") as progress:
        work, results = measure(sources, setting, work, rounds, notice, progress.status)
        pays = None
        if results[0].facts.device == "cpu" and any(map(_is_packed, sources)):
            progress.status("measuring from which share of zeros on packing pays")
            pays = PaysFrom(pays_from(results[0].facts.threads))
    show_results(work, results, pays, as_json=as_json)


def _is_packed(source: "Source") -> bool:
    from apt.runtime.entries import is_packed

    return not source.on_hub and is_packed(Path(source.location))
