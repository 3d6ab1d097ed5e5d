"""``apt prune``."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from apt.cli import arguments as args
from apt.errors import AptError

if TYPE_CHECKING:
    from apt.ranks import Ranks
    from apt.report import Report
    from apt.run import Prepared, RunOptions

T = TypeVar("T")


def prune(
    model: str | None = typer.Argument(
        None, help="Directory, hub name, .gguf file or zoo:NAME; by default the adapter's own."
    ),
    adapter: str | None = args.ADAPTER,
    method: str | None = typer.Option(
        None, "--method", metavar="NAME", help="See: apt methods. By default the most accurate."
    ),
    sparsity: str | None = args.SPARSITY,
    pattern: str | None = args.PATTERN,
    per: str | None = args.PER,
    calibration: str | None = typer.Option(
        None, "--calibration", metavar="SRC",
        help="builtin, wikitext2, ptb, c4, a hub data set, or a .txt, .jsonl or .parquet file.",
    ),
    samples: int = typer.Option(
        128, "--samples",
        help="Calibration samples; an error-aware run of default effort adds copies of some with "
        "random tokens in them.",
    ),
    seqlen: int = typer.Option(2048, "--seqlen", help="Tokens a sample; at most the positions."),
    own_samples: int | None = typer.Option(
        None, "--own-samples", metavar="N",
        help="Samples more that the model writes itself: by default a fourth of --samples with "
        "--effort best, else none.",
    ),
    output: Path | None = typer.Option(None, "--output", "-o", help="Directory to write."),
    evaluation: str | None = typer.Option(
        None, "--eval", metavar="SRC", help="Measure on this text before and after."
    ),
    metric: list[str] = args.METRIC,
    allocation: str = typer.Option(
        "uniform", "--allocation", metavar="NAME",
        help="How --sparsity is shared out among sites: uniform, or owl.",
    ),
    also: list[str] = args.ALSO,
    only: list[str] | None = args.ONLY,
    skip: list[str] | None = args.SKIP,
    override: list[str] | None = args.OVERRIDE,
    effort: str = typer.Option(
        "default", "--effort", metavar="LEVEL",
        help="How long masks are searched and blocks tuned by gradient: fast (not tuned), default "
        "or best.",
    ),
    error_aware: bool | None = typer.Option(
        None, "--error-aware/--layer-wise",
        help="Whether a site makes up for the error of those before it. By default as the method.",
    ),
    ordered: bool | None = typer.Option(
        None, "--ordered/--at-once",
        help="Solve each of a block's sites on what the pruned ones before it give, or all on what "
        "the dense ones do. By default in order where error-aware.",
    ),
    damping: float | None = typer.Option(
        None, "--damping",
        help="Share of the mean Gram diagonal: by default 0.05 where error-aware, else 0.01.",
    ),
    block_size: int | None = typer.Option(
        None, "--block-size", help="Columns of one joint compensation; by default all."
    ),
    device: str = args.DEVICE,
    dtype: str = args.DTYPE,
    seed: int = typer.Option(0, "--seed", help="Draws the calibration samples."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a non-empty output."),
    max_shard_size: str | None = typer.Option(
        None, "--max-shard-size", metavar="SIZE",
        help="Largest file of weights, as 5GB; by default the files are the checkpoint's.",
    ),
    tokenizer: str | None = args.TOKENIZER,
    no_bos: bool = args.NO_BOS,
    stream: bool = typer.Option(
        False, "--stream", help="Read and write block by block; never more than one in memory."
    ),
    resume: bool = typer.Option(
        False, "--resume", help="Go on with an interrupted --stream run of the same command."
    ),
    activations: str = args.ACTIVATIONS,
    trust_remote_code: bool = args.REMOTE,
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the plan and write nothing."),
) -> None:  # fmt: skip
    """Prune a model and write a Hugging Face directory.

    For example: apt prune --adapter llama
    """
    from apt.cli.output import notice
    from apt.plugins import registry
    from apt.ranks import joined
    from apt.run import RunOptions, prepare
    from apt.solver import SolverOptions

    shelf = registry()
    model = model or _default("model", _embedded(adapter))
    wanted = args.read_pattern(sparsity, pattern, per) or _default("pattern", args.parse("2:4"))
    chosen = shelf.methods.get(method or _default("method", shelf.default_method().name))
    calibration = calibration or _default("calibration", "builtin")
    options = RunOptions(
        model=model,
        pattern=wanted,
        output=output or _default("output", _folder(model, str(wanted), chosen.name)),
        adapter=adapter,
        method=chosen.name,
        calibration=calibration,
        evaluation=evaluation,
        metrics=tuple(shelf.evaluators.get(name).name for name in metric),
        allocation=shelf.allocations.get(allocation).name,
        also=tuple(also),
        samples=samples,
        seqlen=seqlen,
        seed=seed,
        own_samples=own_samples,
        device=device,
        dtype=dtype,
        error_aware=error_aware,
        ordered=ordered,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        tokenizer=tokenizer,
        stream=stream or resume,
        resume=resume,
        activations=activations,
        trust_remote_code=trust_remote_code,
        bos=not no_bos,
        selection=args.read_selection(only, skip, override),
        solver=SolverOptions(
            damping=damping,
            effort=effort,  # type: ignore[arg-type]
            block_size=block_size,
        ),
    )
    with joined() as ranks:
        prepared = prepare(options, shelf, notice)
        if options.stream:
            from apt.stream import check_streamable

            check_streamable(prepared)
        if dry_run:
            _show_plan(prepared)
        else:
            _run(prepared, ranks)


def _default(name: str, value: T) -> T:
    """``value``, said in a line."""
    from apt.cli.output import notice

    notice(f"{name}: {value} (default)")
    return value


def _embedded(adapter: str | None) -> str:
    from apt.plugins import registry

    if adapter is None:
        raise AptError("no MODEL is given", "name one, or --adapter NAME for its embedded model")
    return f"zoo:{registry().adapters.get(adapter).name}"


def _folder(model: str, pattern: str, method: str) -> Path:
    """A folder named after model, pattern and method."""
    from apt.models import Source

    gguf = model if model.endswith(".gguf") else None
    return Path(f"{Source(model, model, gguf).name}-{pattern.replace(':', 'of')}-{method}")


def _show_plan(prepared: "Prepared") -> None:
    from apt.cli.inspect import show_plan

    options = prepared.options
    show_plan(
        prepared.shell,
        prepared.plan,
        options.samples + (options.own_samples or 0),
        options.seqlen,
        prepared.device,
        streamed=options.stream,
        on_disk=options.activations == "disk",
        writing=bool(options.own_samples),
    )


def _run(prepared: "Prepared", ranks: "Ranks") -> None:
    from apt.arena import share_arena
    from apt.cli.output import out
    from apt.cli.progress import RunProgress
    from apt.run import already_complete, execute
    from apt.stream import execute_streamed

    share_arena()
    options = prepared.options
    if already_complete(prepared):
        out.print(f"{options.output}: already complete", markup=False)
        return
    try:
        with _terminable(), RunProgress(prepared.plan) as progress:
            if options.stream:
                report = execute_streamed(
                    prepared,
                    progress.observe,
                    progress.status,
                    resume=options.resume,
                    ranks=ranks,
                )
            else:
                report = execute(prepared, progress.observe, progress.status, ranks=ranks)
    except AptError:
        raise
    except Exception as error:
        error.add_note(_whose(prepared))
        raise
    except KeyboardInterrupt as error:
        if ranks.first:
            typer.echo(f"apt: interrupted; {_left(options)}", err=True)
        raise typer.Exit(143 if isinstance(error, _TerminatedError) else 130) from None
    show_report(report, prepared.options)


class _TerminatedError(KeyboardInterrupt):
    """The process was asked to end (SIGTERM): it clears up as after Ctrl-C."""


@contextmanager
def _terminable() -> Iterator[None]:
    """While entered, SIGTERM raises an exception, so that nothing is left lying about."""

    def stop(number: int, frame: object) -> None:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _left(options: "RunOptions") -> str:
    """What an interrupted run has left."""
    from apt.workplace import resumable

    if options.stream and resumable(options.output):
        return "to go on, give the same command with --resume"
    written = (options.output / "apt_report.json").is_file()
    return f"{options.output} is whole" if written else "nothing was written"


def _whose(prepared: "Prepared") -> str:
    """Where the code comes from that took part in a run, for those who read its traceback."""
    from apt.workplace import resumable

    method, adapter = prepared.method.name, prepared.shell.spec.name
    found = prepared.registry.methods.origins[method], prepared.registry.adapters.origins[adapter]
    note = f"method {method} comes from {found[0].distribution}, adapter {adapter} from "
    note += found[1].distribution
    if prepared.options.stream and resumable(prepared.options.output):
        note += "; blocks that were done are on disk: once it is mended, go on with --resume"
    return note


def show_report(report: "Report", options: "RunOptions") -> None:
    """The closing table and where the result lies."""
    from apt.cli.output import duration, out, size, table
    from apt.report import by_kind, peak_memory

    made = table("site", ">sites", ">weights", ">sparsity", ">mean error", ">worst", ">solve s")
    for kind in by_kind(report.sites):
        made.add_row(
            kind.kind,
            str(kind.sites),
            f"{kind.weights:,}",
            f"{kind.sparsity:.4f}",
            f"{kind.mean_error:.4f}",
            f"{kind.max_error:.4f}",
            f"{kind.seconds:.2f}",
        )
    out.print(made)
    for event in report.sites:
        asked = options.solver.damping
        if asked is not None and event.damping is not None and event.damping > asked:
            out.print(f"{event.name} needed damping {event.damping:g}", markup=False)
    if starved := [site for site in report.sites if site.starved]:
        first = starved[0]
        out.print(
            f"{len(starved)} sites saw fewer tokens than they have inputs ({first.name}: "
            f"{first.tokens:,} of {first.shape[1]:,}); more --samples would serve them better",
            markup=False,
        )
    for metric in options.metrics if report.scores else ():
        before, after = report.scores["before"][metric], report.scores["after"][metric]
        out.print(f"{metric} on {options.evaluation}: {before:.4g} → {after:.4g}", markup=False)
    out.print(
        f"{options.output}: {report.sparsity:.2%} zeros in the pruned sites, verified on disk; "
        f"mean relative layer error {report.relative_error:.4f}; {duration(report.seconds)}, "
        f"peak memory {size(sum(peak_memory().values()))}",
        markup=False,
    )
