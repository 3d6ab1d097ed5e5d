"""Options of the commands that change a model: prune and shrink."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import typer

from apt.cli import arguments as args
from apt.cli.settings import load
from apt.engine.limits import (
    check_activations,
    check_amount,
    check_dtype,
    check_prune_options,
    check_seed,
    check_shard_size,
    read_group,
)
from apt.errors import AptError

T = TypeVar("T")

CALIBRATION_GROUP, ACCURACY_GROUP, OUTPUT_GROUP = (
    "Calibration and measuring", "Accuracy", "Output",
)  # fmt: skip

MODEL = typer.Argument(
    None, help="Directory, hub name, .gguf file or zoo:NAME; by default that of the adapter."
)
CALIBRATION = typer.Option(
    None, "--calibration", metavar="SRC", rich_help_panel=CALIBRATION_GROUP,
    help="builtin, wikitext2, ptb, c4, a hub data set, or a .txt, .jsonl or .parquet file.",
)  # fmt: skip
SAMPLES = typer.Option(
    128, "--samples", rich_help_panel=CALIBRATION_GROUP,
    help="Calibration samples drawn from the text.",
)  # fmt: skip
SEQLEN = typer.Option(
    2048, "--seqlen", rich_help_panel=CALIBRATION_GROUP,
    help="Tokens of a sample; at most the model's positions.",
)  # fmt: skip
OWN_SAMPLES = typer.Option(
    None, "--own-samples", metavar="N", rich_help_panel=CALIBRATION_GROUP,
    help="Samples that the model generates, beside --samples. By default a fourth of "
    "--samples with --effort best, else 0.",
)  # fmt: skip
RANDOM_TOKENS = typer.Option(
    None, "--random-tokens", metavar="R", rich_help_panel=CALIBRATION_GROUP,
    help="Copies with random tokens for each sample. By default 0.25 with --effort default "
    "in an error-aware run, else 0.",
)  # fmt: skip
SEED = typer.Option(
    0, "--seed", rich_help_panel=CALIBRATION_GROUP,
    help="Seed for the choice of samples and for the text that the model generates.",
)  # fmt: skip
EVALUATION = typer.Option(
    None, "--eval", metavar="SRC", rich_help_panel=CALIBRATION_GROUP,
    help="Measure the model on this text before and after.",
)  # fmt: skip
EFFORT = typer.Option(
    "default", "--effort", metavar="LEVEL", rich_help_panel=ACCURACY_GROUP,
    help="fast, default or best: the length of the mask search, and the defaults of tuning, "
    "random tokens and own samples.",
)  # fmt: skip
ERROR_AWARE = typer.Option(
    None, "--error-aware/--layer-wise", rich_help_panel=ACCURACY_GROUP,
    help="Each site compensates a part of the error of the sites before it, or none of it. "
    "The default depends on the method.",
)  # fmt: skip
ALPHA = typer.Option(
    None, "--alpha", metavar="A", rich_help_panel=ACCURACY_GROUP,
    help="Share of the error of its inputs that a site compensates. By default 0.25.",
)  # fmt: skip
BETA = typer.Option(
    None, "--beta", metavar="B", rich_help_panel=ACCURACY_GROUP,
    help="Share of the drift of the residual stream that is compensated. By default 0.25.",
)  # fmt: skip
ORDERED = typer.Option(
    None, "--ordered/--at-once", rich_help_panel=ACCURACY_GROUP,
    help="Solve the sites of a block one after the other (true-sequential), or all on the "
    "inputs of the dense block. By default ordered if error-aware.",
)  # fmt: skip
TUNING_EPOCHS = typer.Option(
    None, "--tuning-epochs", metavar="N", rich_help_panel=ACCURACY_GROUP,
    help="Passes of block tuning by gradients; 0 turns it off. By effort 0, 1 or 8.",
)  # fmt: skip
TUNING_RATE = typer.Option(
    None, "--tuning-rate", metavar="R", rich_help_panel=ACCURACY_GROUP,
    help="First learning rate of the tuning, as a share of a weight's size. By default 0.05, "
    "with --effort best 0.025.",
)  # fmt: skip
TUNING_TOKENS = typer.Option(
    None, "--tuning-tokens", metavar="N", rich_help_panel=ACCURACY_GROUP,
    help="Calibration tokens for the tuning; 0 uses all. By default 12288, with --effort best "
    "all.",
)  # fmt: skip
DAMPING = typer.Option(
    None, "--damping", rich_help_panel=ACCURACY_GROUP,
    help="Share of the mean diagonal of the Gram matrix (Hessian) that is added to it. By "
    "default 0.05 if error-aware, else 0.01.",
)  # fmt: skip
STREAM = typer.Option(
    False, "--stream", rich_help_panel=args.RUNNING,
    help="Read and write block by block, with one block in memory at a time.",
)  # fmt: skip
RESUME = typer.Option(
    False, "--resume", rich_help_panel=args.RUNNING,
    help="Continue an interrupted --stream run of the same command.",
)  # fmt: skip
DRY_RUN = typer.Option(
    False, "--dry-run", rich_help_panel=args.RUNNING, help="Show the plan and write nothing."
)  # fmt: skip
CONFIG = typer.Option(
    None, "--config", metavar="FILE", is_eager=True, callback=load,
    rich_help_panel=args.RUNNING,
    help="Take options from a TOML file with lines such as pattern = \"2:4\". Options on the "
    "command line take precedence.",
)  # fmt: skip
SAVE_CONFIG = typer.Option(
    None, "--save-config", metavar="FILE", rich_help_panel=args.RUNNING,
    help="Write the options of this command to a TOML file for --config.",
)  # fmt: skip
OUTPUT = typer.Option(
    None, "--output", "-o", callback=args.in_home, rich_help_panel=OUTPUT_GROUP,
    help="Directory to write.",
)  # fmt: skip
OVERWRITE = typer.Option(
    False, "--overwrite", rich_help_panel=OUTPUT_GROUP, help="Replace the output of an earlier run."
)  # fmt: skip
MAX_SHARD_SIZE = typer.Option(
    None, "--max-shard-size", metavar="SIZE", rich_help_panel=OUTPUT_GROUP,
    help="Largest file of weights, for example 5GB; by default as in the checkpoint.",
)  # fmt: skip
SAVE_MASKS = typer.Option(
    False, "--save-masks", rich_help_panel=OUTPUT_GROUP,
    help="Write the masks beside the model, one bit for each weight, for apt-prune reapply.",
)  # fmt: skip

QUANTIZE = typer.Option(
    None, "--quantize", metavar="KIND", rich_help_panel=ACCURACY_GROUP,
    help="Round the kept weights to int8 or int4 times a scale, so that what follows makes up for "
    "the error.",
)  # fmt: skip
GROUP = typer.Option(
    "128", "--group", metavar="N|row", rich_help_panel=ACCURACY_GROUP,
    help="Columns that share a scale with --quantize, or row for one scale a row.",
)  # fmt: skip
PACK = typer.Option(
    None, "--pack", metavar="DIR", rich_help_panel=OUTPUT_GROUP,
    help="Also write the model without its zeros to DIR, as apt-prune pack does.",
)  # fmt: skip


def check_plot(
    plot: Path | None, *inputs: str | Path | None, overwrite: bool | None = None
) -> None:
    """Raise if a plot cannot be drawn, before the work.

    Args:
        plot: the file; None for no plot.
        inputs: what the command reads; the plot must not be inside.
        overwrite: True if a file there may be replaced; None for a command without that option.
    """
    if plot is None:
        return
    if plot.suffix not in (".png", ".svg", ".pdf"):
        raise AptError(f"--plot {plot} is not a .png, .svg or .pdf file")
    args.check_new_file(plot, *inputs, overwrite=overwrite, option="plot")
    if find_spec("matplotlib") is None:
        raise AptError("--plot needs matplotlib", "pip install 'apt-prune[plot]'")


class Defaults:
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


_PRUNE_OPTIONS = (
    "effort", "error_aware", "alpha", "beta", "row_importance", "ordered", "tuning_epochs",
    "tuning_rate", "tuning_tokens", "random_tokens", "own_samples", "damping", "block_size",
    "quantize", "group",
)  # fmt: skip
_RUN_OPTIONS = (
    "adapter", "evaluation", "samples", "seqlen", "seed", "device", "dtype", "overwrite",
    "max_shard_size", "tokenizer", "resume", "activations", "trust_remote_code",
)  # fmt: skip


def prune_options(context: typer.Context) -> dict[str, Any]:
    """The command's options of `apt.PruneOptions`.

    Raises:
        AptError: one of them, or an option of the run, is out of range. It is raised before
            anything that takes time is imported.
    """
    given = context.params
    options = {name: given[name] for name in _PRUNE_OPTIONS if name in given}
    if "group" in options:
        options["group"] = read_group(options["group"])
    check_amount(given["samples"], given["seqlen"], given["own_samples"])
    check_prune_options(options)
    check_seed(given["seed"])
    check_dtype(given["dtype"])
    check_shard_size(given["max_shard_size"])
    check_activations(given["activations"], streamed=given["stream"] or given["resume"])
    return options


def run_options(context: typer.Context) -> dict[str, Any]:
    """The command's options of `apt.engine.options.RunOptions` that need no other one."""
    given = context.params
    same = {name: given[name] for name in _RUN_OPTIONS}
    return same | {"stream": given["stream"] or given["resume"], "bos": not given["no_bos"]}


def metric_names(metrics: list[str]) -> tuple[str, ...]:
    """The names of metrics that need no dense model.

    Raises:
        AptError: a metric is unknown, or needs one.
    """
    from apt.plugin.registry import registry

    found = [registry().evaluators.get(name) for name in metrics]
    for spec in found:
        if spec.dense:
            raise AptError(
                f"the metric {spec.name} compares with the dense model",
                "measure it afterwards: apt-prune eval DIR --dense MODEL",
            )
    return tuple(spec.name for spec in found)


def embedded(adapter: str | None) -> str:
    """The embedded model of an adapter."""
    from apt.plugin.registry import registry

    if adapter is None:
        raise AptError("no MODEL is given", "name one, or --adapter NAME for its embedded model")
    return f"zoo:{registry().adapters.get(adapter).name}"


def directory(model: str, *parts: str) -> Path:
    """A directory name of a model and of options."""
    from apt.locations.model_source import Source

    gguf = model if model.endswith(".gguf") else None
    return Path("-".join([Source(model, model, gguf).name, *parts]))
