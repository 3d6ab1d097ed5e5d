"""``apt-prune prune``."""

from pathlib import Path
from typing import Any

import typer

from apt.cli import arguments as args
from apt.cli import run_arguments as run


def prune(
    context: typer.Context,
    model: str | None = run.MODEL,
    adapter: str | None = args.ADAPTER,
    tokenizer: str | None = args.TOKENIZER,
    trust_remote_code: bool = args.REMOTE,
    revision: str | None = args.REVISION,
    token: str | None = args.TOKEN,
    cache_dir: str | None = args.CACHE_DIR,
    sparsity: str | None = args.SPARSITY,
    pattern: str | None = args.PATTERN,
    per: str | None = args.PER,
    allocation: str | None = typer.Option(
        None, "--allocation", metavar="NAME", rich_help_panel=args.PATTERN_GROUP,
        help="Distribution of --sparsity over the sites, listed by: apt-prune methods. By default "
        "uniform; auto for --pattern auto:M.",
    ),
    only: list[str] | None = args.ONLY,
    skip: list[str] | None = args.SKIP,
    override: list[str] | None = args.OVERRIDE,
    also: list[str] = args.ALSO,
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
        help="Pruning method, listed by: apt-prune methods. By default the most accurate.",
    ),
    effort: str = run.EFFORT,
    error_aware: bool | None = run.ERROR_AWARE,
    alpha: float | None = run.ALPHA,
    beta: float | None = run.BETA,
    row_importance: float | None = typer.Option(
        None, "--row-importance", metavar="P", rich_help_panel=run.ACCURACY_GROUP,
        help="Exponent by which more important rows keep more weights; 0 turns it off. By default "
        "0.35.",
    ),
    ordered: bool | None = run.ORDERED,
    tuning_epochs: int | None = run.TUNING_EPOCHS,
    tuning_rate: float | None = run.TUNING_RATE,
    tuning_tokens: int | None = run.TUNING_TOKENS,
    damping: float | None = run.DAMPING,
    block_size: int | None = typer.Option(
        None, "--block-size", rich_help_panel=run.ACCURACY_GROUP,
        help="Columns of one joint compensation; by default all.",
    ),
    quantize: str | None = run.QUANTIZE,
    group: str = run.GROUP,
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
    save_masks: bool = run.SAVE_MASKS,
    pack: Path | None = run.PACK,
    plot: Path | None = typer.Option(
        None, "--plot", metavar="FILE", rich_help_panel=run.OUTPUT_GROUP,
        help="Draw the sparsity of the sites by block and kind into a .png, .svg or .pdf file "
        "(needs matplotlib).",
    ),
    as_json: bool = args.JSON,
) -> None:  # fmt: skip
    """Prune a model and write a Hugging Face directory.

    For example: apt-prune prune --adapter llama
    """
    prune_options = run.prune_options(context)
    args.check_pattern_options(sparsity, pattern, per)
    run.check_plot(plot, model, calibration, evaluation, overwrite=overwrite)
    from apt.plugin.registry import registry

    installed, defaults = registry(), run.Defaults()
    model = model or defaults.choose("model", run.embedded(adapter))
    chosen = installed.methods.get(method or installed.default_method().name)
    metrics = run.metric_names(metric)
    hub = args.read_hub(revision, token, cache_dir)
    source = args.find_model(model, installed, hub, trust_remote_code=trust_remote_code)

    from apt.cli import packing, pruning
    from apt.engine.options import RunOptions
    from apt.engine.prune_options import PruneOptions

    wanted = args.read_pattern(sparsity, pattern, per)
    wanted = wanted or defaults.choose("pattern", args.parse("2:4"))
    sharing = installed.allocations.get(args.read_allocation(allocation, per, wanted)).name
    name = run.directory(model, _plain(wanted), chosen.name)
    options = RunOptions(
        model=model,
        pattern=wanted,
        calibration=calibration or defaults.choose("calibration", "builtin"),
        output=output or defaults.choose("output", name),
        method=chosen.name,
        metrics=metrics,
        allocation=sharing,
        also=tuple(also),
        save_masks=save_masks,
        hub=hub,
        selection=args.read_selection(only, skip, override),
        prune=PruneOptions(**prune_options),
        **run.run_options(context),
    )
    if pack is not None:
        packing.check_packed_place(pack, options, source)
    report = pruning.start(context, options, installed, defaults)
    if pack is not None and not dry_run:  # also without a report: the output was complete before
        packing.pack_output(pack, options)
    if plot is not None and report is not None:
        from apt.cli.plots import draw_sparsities

        draw_sparsities(report, plot, overwrite=overwrite)


def _plain(pattern: Any) -> str:
    """A pattern in the name of a directory: ``2of4``, ``0.5`` or ``auto8-0.5``."""
    return str(pattern).replace("auto:", "auto").replace(":", "of").replace("@", "-")
