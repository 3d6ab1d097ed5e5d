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
    check_pattern_options,
    check_seed,
    check_shard_size,
    check_solver,
)

T = TypeVar("T")


def prune(
    context: typer.Context,
    model: str | None = typer.Argument(
        None, help="Directory, hub name, .gguf file or zoo:NAME; by default the adapter's own."
    ),
    adapter: str | None = args.ADAPTER,
    method: str | None = typer.Option(
        None, "--method", metavar="NAME",
        help="See: apt-prune methods. By default the most accurate.",
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
    revision: str | None = args.REVISION,
    token: str | None = args.TOKEN,
    cache_dir: str | None = args.CACHE_DIR,
    config: Path | None = typer.Option(
        None, "--config", metavar="FILE", is_eager=True, callback=load,
        help="Take options from a TOML file, such as: pattern = \"2:4\". Those on the command line "
        "count more.",
    ),
    save_config: Path | None = typer.Option(
        None, "--save-config", metavar="FILE",
        help="Write the options of this command to a TOML file for --config.",
    ),
    as_json: bool = args.JSON,
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the plan and write nothing."),
) -> None:  # fmt: skip
    """Prune a model and write a Hugging Face directory.

    For example: apt-prune prune --adapter llama
    """
    check_amount(samples, seqlen, own_samples)
    check_seed(seed)
    check_solver(damping, block_size, effort)
    check_dtype(dtype)
    check_shard_size(max_shard_size)
    check_activations(activations, streamed=stream or resume)
    check_pattern_options(sparsity, pattern, per)
    from apt.plugin.registry import registry

    shelf, defaults = registry(), _Defaults()
    model = model or defaults.choose("model", _embedded(adapter))
    chosen = shelf.methods.get(method or shelf.default_method().name)
    metrics = tuple(shelf.evaluators.get(name).name for name in metric)
    sharing = shelf.allocations.get(allocation).name
    hub = args.read_hub(revision, token, cache_dir)
    args.find_model(model, shelf, hub, trust_remote_code=trust_remote_code)

    from apt.distributed.launch import joined
    from apt.runs.prepare import RunOptions, prepare
    from apt.solver import SolverOptions

    wanted = args.read_pattern(sparsity, pattern, per)
    wanted = wanted or defaults.choose("pattern", args.parse("2:4"))
    if method is None:
        defaults.choose("method", chosen.name)
    options = RunOptions(
        model=model,
        pattern=wanted,
        calibration=calibration or defaults.choose("calibration", "builtin"),
        output=output or defaults.choose("output", _folder(model, str(wanted), chosen.name)),
        adapter=adapter,
        method=chosen.name,
        evaluation=evaluation,
        metrics=metrics,
        allocation=sharing,
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
        hub=hub,
        selection=args.read_selection(only, skip, override),
        solver=SolverOptions(
            damping=damping,
            effort=effort,  # type: ignore[arg-type]
            block_size=block_size,
        ),
    )
    with joined() as ranks:
        prepared = prepare(options, shelf, defaults.lines.append)
        if options.stream:
            from apt.runs.stream import check_streamable

            check_streamable(prepared)
        if save_config is not None and ranks.first:
            save(context, save_config, defaults.values)
        from apt.cli import pruning

        if dry_run:
            pruning.show_planned(prepared, defaults.lines, as_json=as_json)
        else:
            pruning.run(prepared, ranks, defaults.lines, as_json=as_json)


class _Defaults:
    """What was chosen for the user.

    Attributes:
        values: by parameter.
        lines: what is said of them, once it is certain that the run can begin.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.lines: list[str] = []

    def choose(self, name: str, value: T) -> T:
        """Take note of ``value``, and return it."""
        self.values[name] = str(value)
        self.lines.append(f"{name}: {value} (default)")
        return value


def _embedded(adapter: str | None) -> str:
    from apt.plugin.registry import registry

    if adapter is None:
        raise AptError("no MODEL is given", "name one, or --adapter NAME for its embedded model")
    return f"zoo:{registry().adapters.get(adapter).name}"


def _folder(model: str, pattern: str, method: str) -> Path:
    """A folder named after model, pattern and method."""
    from apt.locations.model_source import Source

    gguf = model if model.endswith(".gguf") else None
    return Path(f"{Source(model, model, gguf).name}-{pattern.replace(':', 'of')}-{method}")
