"""``apt-prune prune``."""

from pathlib import Path
from typing import Any, TypeVar

import typer

from apt.cli import arguments as args
from apt.cli.settings import load, save
from apt.errors import AptError
from apt.runs.limits import (
    check_activations,
    check_amount,
    check_dtype,
    check_prune_options,
    check_seed,
    check_shard_size,
)

T = TypeVar("T")


_CALIBRATION, _ACCURACY, _OUTPUT = "Calibration and measuring", "Accuracy", "Output"


def prune(
    context: typer.Context,
    model: str | None = typer.Argument(
        None, help="Directory, hub name, .gguf file or zoo:NAME; by default that of the adapter."
    ),
    adapter: str | None = args.ADAPTER,
    tokenizer: str | None = args.TOKENIZER,
    trust_remote_code: bool = args.REMOTE,
    revision: str | None = args.REVISION,
    token: str | None = args.TOKEN,
    cache_dir: str | None = args.CACHE_DIR,
    sparsity: str | None = args.SPARSITY,
    pattern: str | None = args.PATTERN,
    per: str | None = args.PER,
    allocation: str = typer.Option(
        "uniform", "--allocation", metavar="NAME", rich_help_panel=args.PATTERN_GROUP,
        help="Distribution of --sparsity over the sites: uniform or owl.",
    ),
    only: list[str] | None = args.ONLY,
    skip: list[str] | None = args.SKIP,
    override: list[str] | None = args.OVERRIDE,
    also: list[str] = args.ALSO,
    calibration: str | None = typer.Option(
        None, "--calibration", metavar="SRC", rich_help_panel=_CALIBRATION,
        help="builtin, wikitext2, ptb, c4, a hub data set, or a .txt, .jsonl or .parquet file.",
    ),
    samples: int = typer.Option(
        128, "--samples", rich_help_panel=_CALIBRATION,
        help="Calibration samples drawn from the text.",
    ),
    seqlen: int = typer.Option(
        2048, "--seqlen", rich_help_panel=_CALIBRATION,
        help="Tokens of a sample; at most the model's positions.",
    ),
    own_samples: int | None = typer.Option(
        None, "--own-samples", metavar="N", rich_help_panel=_CALIBRATION,
        help="Samples that the model generates, beside --samples. By default a fourth of "
        "--samples with --effort best, else 0.",
    ),
    random_tokens: float | None = typer.Option(
        None, "--random-tokens", metavar="R", rich_help_panel=_CALIBRATION,
        help="Copies with random tokens for each sample. By default 0.25 with --effort default "
        "in an error-aware run, else 0.",
    ),
    no_bos: bool = args.NO_BOS,
    seed: int = typer.Option(
        0, "--seed", rich_help_panel=_CALIBRATION,
        help="Seed for the choice of samples and for the text that the model generates.",
    ),
    evaluation: str | None = typer.Option(
        None, "--eval", metavar="SRC", rich_help_panel=_CALIBRATION,
        help="Measure the model on this text before and after.",
    ),
    metric: list[str] = args.METRIC,
    method: str | None = typer.Option(
        None, "--method", metavar="NAME", rich_help_panel=_ACCURACY,
        help="Pruning method, listed by: apt-prune methods. By default the most accurate.",
    ),
    effort: str = typer.Option(
        "default", "--effort", metavar="LEVEL", rich_help_panel=_ACCURACY,
        help="fast, default or best: the length of the mask search, and the defaults of tuning, "
        "random tokens and own samples.",
    ),
    error_aware: bool | None = typer.Option(
        None, "--error-aware/--layer-wise", rich_help_panel=_ACCURACY,
        help="Each site compensates a part of the error of the sites before it, or none of it. "
        "The default depends on the method.",
    ),
    alpha: float | None = typer.Option(
        None, "--alpha", metavar="A", rich_help_panel=_ACCURACY,
        help="Share of the error of its inputs that a site compensates. By default 0.25.",
    ),
    beta: float | None = typer.Option(
        None, "--beta", metavar="B", rich_help_panel=_ACCURACY,
        help="Share of the drift of the residual stream that is compensated. By default 0.25.",
    ),
    row_importance: float | None = typer.Option(
        None, "--row-importance", metavar="P", rich_help_panel=_ACCURACY,
        help="Exponent by which more important rows keep more weights; 0 turns it off. By default "
        "0.35.",
    ),
    ordered: bool | None = typer.Option(
        None, "--ordered/--at-once", rich_help_panel=_ACCURACY,
        help="Solve the sites of a block one after the other (true-sequential), or all on the "
        "inputs of the dense block. By default ordered if error-aware.",
    ),
    tuning_epochs: int | None = typer.Option(
        None, "--tuning-epochs", metavar="N", rich_help_panel=_ACCURACY,
        help="Passes of block tuning by gradients; 0 turns it off. By effort 0, 1 or 8.",
    ),
    tuning_rate: float | None = typer.Option(
        None, "--tuning-rate", metavar="R", rich_help_panel=_ACCURACY,
        help="First learning rate of the tuning, as a share of a weight's size. By default 0.05, "
        "with --effort best 0.025.",
    ),
    tuning_tokens: int | None = typer.Option(
        None, "--tuning-tokens", metavar="N", rich_help_panel=_ACCURACY,
        help="Calibration tokens for the tuning; 0 uses all. By default 12288, with --effort best "
        "all.",
    ),
    damping: float | None = typer.Option(
        None, "--damping", rich_help_panel=_ACCURACY,
        help="Share of the mean diagonal of the Gram matrix (Hessian) that is added to it. By "
        "default 0.05 if error-aware, else 0.01.",
    ),
    block_size: int | None = typer.Option(
        None, "--block-size", rich_help_panel=_ACCURACY,
        help="Columns of one joint compensation; by default all.",
    ),
    device: str = args.DEVICE,
    dtype: str = args.DTYPE,
    stream: bool = typer.Option(
        False, "--stream", rich_help_panel=args.RUNNING,
        help="Read and write block by block, with one block in memory at a time.",
    ),
    resume: bool = typer.Option(
        False, "--resume", rich_help_panel=args.RUNNING,
        help="Continue an interrupted --stream run of the same command.",
    ),
    activations: str = args.ACTIVATIONS,
    dry_run: bool = typer.Option(
        False, "--dry-run", rich_help_panel=args.RUNNING, help="Show the plan and write nothing."
    ),
    config: Path | None = typer.Option(
        None, "--config", metavar="FILE", is_eager=True, callback=load,
        rich_help_panel=args.RUNNING,
        help="Take options from a TOML file with lines such as pattern = \"2:4\". Options on the "
        "command line take precedence.",
    ),
    save_config: Path | None = typer.Option(
        None, "--save-config", metavar="FILE", rich_help_panel=args.RUNNING,
        help="Write the options of this command to a TOML file for --config.",
    ),
    output: Path | None = typer.Option(
        None, "--output", "-o", rich_help_panel=_OUTPUT, help="Directory to write."
    ),
    overwrite: bool = typer.Option(
        False, "--overwrite", rich_help_panel=_OUTPUT, help="Replace the output of an earlier run."
    ),
    max_shard_size: str | None = typer.Option(
        None, "--max-shard-size", metavar="SIZE", rich_help_panel=_OUTPUT,
        help="Largest file of weights, for example 5GB; by default as in the checkpoint.",
    ),
    as_json: bool = args.JSON,
) -> None:  # fmt: skip
    """Prune a model and write a Hugging Face directory.

    For example: apt-prune prune --adapter llama
    """
    prune_options: dict[str, Any] = {
        "effort": effort,
        "error_aware": error_aware,
        "alpha": alpha,
        "beta": beta,
        "row_importance": row_importance,
        "ordered": ordered,
        "tuning_epochs": tuning_epochs,
        "tuning_rate": tuning_rate,
        "tuning_tokens": tuning_tokens,
        "random_tokens": random_tokens,
        "own_samples": own_samples,
        "damping": damping,
        "block_size": block_size,
    }
    check_amount(samples, seqlen, own_samples)
    check_prune_options(prune_options)
    check_seed(seed)
    check_dtype(dtype)
    check_shard_size(max_shard_size)
    check_activations(activations, streamed=stream or resume)
    args.check_pattern_options(sparsity, pattern, per)
    from apt.plugin.registry import registry

    installed, defaults = registry(), _Defaults()
    model = model or defaults.choose("model", _embedded(adapter))
    chosen = installed.methods.get(method or installed.default_method().name)
    metrics = tuple(installed.evaluators.get(name).name for name in metric)
    sharing = installed.allocations.get(allocation).name
    hub = args.read_hub(revision, token, cache_dir)
    args.find_model(model, installed, hub, trust_remote_code=trust_remote_code)

    from apt.distributed.launch import joined
    from apt.runs.options import RunOptions
    from apt.runs.prepare import prepare
    from apt.runs.prune_options import PruneOptions

    wanted = args.read_pattern(sparsity, pattern, per)
    wanted = wanted or defaults.choose("pattern", args.parse("2:4"))
    if method is None:
        defaults.choose("method", chosen.name)
    options = RunOptions(
        model=model,
        pattern=wanted,
        calibration=calibration or defaults.choose("calibration", "builtin"),
        output=output or defaults.choose("output", _directory(model, str(wanted), chosen.name)),
        adapter=adapter,
        method=chosen.name,
        evaluation=evaluation,
        metrics=metrics,
        allocation=sharing,
        also=tuple(also),
        samples=samples,
        seqlen=seqlen,
        seed=seed,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        tokenizer=tokenizer,
        stream=stream or resume,
        resume=resume,
        activations=activations,
        trust_remote_code=trust_remote_code,
        bos=not no_bos,
        hub=hub,
        selection=args.read_selection(only, skip, override),
        prune=PruneOptions(**prune_options),
    )
    with joined() as ranks:
        prepared = prepare(options, installed, defaults.lines.append)
        if options.stream:
            from apt.runs.streamed import check_streamable

            check_streamable(prepared)
        if save_config is not None and ranks.first:
            save(context, save_config, defaults.values)
        from apt.cli import pruning

        if dry_run:
            pruning.show_planned(prepared, defaults.lines, as_json=as_json)
        else:
            pruning.run(prepared, ranks, defaults.lines, as_json=as_json)


class _Defaults:
    """Defaults that depend on other options.

    Attributes:
        values: the defaults by parameter.
        lines: notices about them, to be printed once the run begins.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.lines: list[str] = []

    def choose(self, name: str, value: T) -> T:
        """Record a default and return it."""
        self.values[name] = str(value)
        self.lines.append(f"{name}: {value} (default)")
        return value


def _embedded(adapter: str | None) -> str:
    from apt.plugin.registry import registry

    if adapter is None:
        raise AptError("no MODEL is given", "name one, or --adapter NAME for its embedded model")
    return f"zoo:{registry().adapters.get(adapter).name}"


def _directory(model: str, pattern: str, method: str) -> Path:
    """A directory name of model, pattern and method."""
    from apt.locations.model_source import Source

    gguf = model if model.endswith(".gguf") else None
    return Path(f"{Source(model, model, gguf).name}-{pattern.replace(':', 'of')}-{method}")
