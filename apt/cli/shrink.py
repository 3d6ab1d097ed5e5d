"""``apt-prune shrink``."""

from pathlib import Path
from typing import Any

import typer

from apt.cli import arguments as args
from apt.cli import run_arguments as run
from apt.errors import AptError

_SIZE = "Size"


def shrink(
    context: typer.Context,
    model: str | None = run.MODEL,
    adapter: str | None = args.ADAPTER,
    tokenizer: str | None = args.TOKENIZER,
    trust_remote_code: bool = args.REMOTE,
    revision: str | None = args.REVISION,
    token: str | None = args.TOKEN,
    cache_dir: str | None = args.CACHE_DIR,
    keep: float = typer.Option(
        0.75, "--keep", metavar="S", rich_help_panel=_SIZE,
        help="Share of the parameters of the blocks that is kept.",
    ),
    budget: str = typer.Option(
        "parameters", "--budget", metavar="WHAT", rich_help_panel=_SIZE,
        help="--keep is a share of the parameters, or of the latency: the time of a forward "
        "through the blocks, measured on this machine.",
    ),
    width_only: bool = typer.Option(
        False, "--width-only", rich_help_panel=_SIZE,
        help="Remove channels, heads or states, and no block. The default for models of fewer than "
        "8 blocks, and where no number of blocks is within 2 % of --keep.",
    ),
    depth_only: bool = typer.Option(
        False, "--depth-only", rich_help_panel=_SIZE,
        help="Drop whole blocks, and nothing else. The default for other models.",
    ),
    search: bool = typer.Option(
        False, "--search", rich_help_panel=_SIZE,
        help="Search for the best numbers of blocks, heads and channels, and for the blocks.",
    ),
    multiple_of: int | None = typer.Option(
        None, "--multiple-of", metavar="N", rich_help_panel=_SIZE,
        help="The number of channels is a multiple of N. By default 64, or a smaller power of two "
        "where none comes within 1 % of --keep.",
    ),
    size: list[str] = typer.Option(
        [], "--size", metavar="KIND=N", rich_help_panel=_SIZE,
        help="Keep N groups of a kind in every block, for example channels=1024, in place of "
        "--keep; repeatable.",
    ),
    blocks: int | None = typer.Option(
        None, "--blocks", metavar="N", rich_help_panel=_SIZE,
        help="Keep N blocks, in place of --keep.",
    ),
    drop: list[int] = typer.Option(
        [], "--drop", metavar="INDEX", rich_help_panel=_SIZE,
        help="Drop the block with this index, from 0, in place of --keep; repeatable.",
    ),
    evaluations: int = typer.Option(
        120, "--evaluations", metavar="N", rich_help_panel=_SIZE,
        help="Candidates that --search evaluates at most.",
    ),
    minutes: float | None = typer.Option(
        None, "--minutes", metavar="M", rich_help_panel=_SIZE,
        help="Time for --search; by default no limit.",
    ),
    calibration: str | None = run.CALIBRATION,
    samples: int = run.SAMPLES,
    seqlen: int = run.SEQLEN,
    own_samples: int | None = run.OWN_SAMPLES,
    random_tokens: float | None = run.RANDOM_TOKENS,
    no_bos: bool = args.NO_BOS,
    seed: int = run.SEED,
    evaluation: str | None = run.EVALUATION,
    metric: list[str] = args.METRIC,
    method: str | None = typer.Option(
        None, "--method", metavar="NAME", rich_help_panel=run.ACCURACY_GROUP,
        help="Choice of groups or of blocks, listed by: apt-prune methods. By default the most "
        "accurate. It decides which of the two are removed.",
    ),
    compensate: bool | None = typer.Option(
        None, "--compensate/--no-compensate", rich_help_panel=run.ACCURACY_GROUP,
        help="Solve the weights of the kept columns exactly, or keep them as they are. The default "
        "depends on the method.",
    ),
    effort: str = run.EFFORT,
    error_aware: bool | None = run.ERROR_AWARE,
    alpha: float | None = run.ALPHA,
    beta: float | None = run.BETA,
    ordered: bool | None = run.ORDERED,
    tuning_epochs: int | None = run.TUNING_EPOCHS,
    tuning_rate: float | None = run.TUNING_RATE,
    tuning_tokens: int | None = run.TUNING_TOKENS,
    damping: float | None = run.DAMPING,
    device: str = args.DEVICE,
    dtype: str = args.DTYPE,
    stream: bool = run.STREAM,
    resume: bool = run.RESUME,
    activations: str = args.ACTIVATIONS,
    dry_run: bool = run.DRY_RUN,
    config: Path | None = run.CONFIG,
    save_config: Path | None = run.SAVE_CONFIG,
    output: Path | None = run.OUTPUT,
    overwrite: bool = run.OVERWRITE,
    max_shard_size: str | None = run.MAX_SHARD_SIZE,
    plot: Path | None = typer.Option(
        None, "--plot", metavar="FILE", rich_help_panel=run.OUTPUT_GROUP,
        help="Draw the candidates of --search into a .png, .svg or .pdf file (needs matplotlib).",
    ),
    as_json: bool = args.JSON,
) -> None:  # fmt: skip
    """Make a smaller dense model, which plain transformers opens.

    Channels, heads, states or whole blocks are removed, and the weights that are left compensate.
    For example: apt-prune shrink --adapter llama --keep 0.75
    """
    prune_options = run.prune_options(context)
    mode = _mode(width_only=width_only, depth_only=depth_only, search=search)
    sizes = _sizes(size)
    if plot is not None and not search:
        raise AptError("--plot draws the candidates of a search", "add --search")
    run.check_plot(plot, model, calibration, evaluation, overwrite=overwrite)
    from apt.plugin.registry import registry
    from apt.shrinking.options import ShrinkOptions
    from apt.shrinking.search import SearchOptions

    wish = ShrinkOptions(
        keep,
        budget,  # type: ignore[arg-type]
        mode,
        compensate,
        multiple_of,
        sizes,
        blocks,
        tuple(drop),
        SearchOptions(evaluations, minutes),
    )
    wish.check()
    installed, defaults = registry(), run.Defaults()
    model = model or defaults.choose("model", run.embedded(adapter))
    metrics = run.metric_names(metric)
    hub = args.read_hub(revision, token, cache_dir)
    args.find_model(model, installed, hub, trust_remote_code=trust_remote_code)

    from apt.cli import pruning
    from apt.engine.options import RunOptions
    from apt.engine.prune_options import PruneOptions

    options = RunOptions(
        model=model,
        pattern=None,
        calibration=calibration or defaults.choose("calibration", "builtin"),
        output=output or defaults.choose("output", run.directory(model, *_name(wish))),
        method=method,
        metrics=metrics,
        hub=hub,
        prune=PruneOptions(**prune_options),
        shrink=wish,
        **run.run_options(context),
    )
    report = pruning.start(context, options, installed, defaults)
    if plot is not None and report is not None:
        from apt.cli.plots import draw_candidates

        draw_candidates(report.structure["candidates"], plot, overwrite=overwrite)


def _mode(*, width_only: bool, depth_only: bool, search: bool) -> Any:
    """The mode of the three flags; None if none is given."""
    given = {"width": width_only, "depth": depth_only, "search": search}
    chosen = [mode for mode, flag in given.items() if flag]
    if len(chosen) > 1:
        raise AptError("--width-only, --depth-only and --search exclude each other", "choose one")
    return chosen[0] if chosen else None


def _sizes(texts: list[str]) -> dict[str, int]:
    """The numbers of ``--size``."""
    found = {}
    for text in texts:
        kind, equals, number = text.partition("=")
        if not equals or not kind or not number.isdecimal():
            raise AptError(f"--size {text} is not KIND=N", "write channels=1024")
        found[kind] = int(number)
    return found


def _name(wish: Any) -> list[str]:
    """The parts of the name of a directory that depend on the options."""
    sizes = [f"{number}-{kind}" for kind, number in wish.sizes.items()]
    blocks = [f"{wish.blocks}-blocks"] if wish.blocks is not None else []
    blocks += [f"without-{'-'.join(map(str, sorted(wish.drop)))}"] if wish.drop else []
    parts = [*blocks, *sizes] if wish.explicit else [f"keep-{wish.keep:g}"]
    return parts + ([wish.mode] if wish.mode else [])
