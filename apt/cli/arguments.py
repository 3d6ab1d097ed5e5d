"""Options that several subcommands have in common, and the parsing of their values."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from apt.errors import AptError
from apt.files.writing import check_file
from apt.locations.hub import Hub
from apt.locations.paths import expanded, kind_at

if TYPE_CHECKING:
    from apt.locations.model_source import Source
    from apt.planning.plan import Selection
    from apt.plugin.registry import Registry
    from apt.solver import Pattern


def in_home(path: Path | None) -> Path | None:
    """The callback of options for paths: a shell leaves the ``~`` of ``--output=~/out``."""
    return None if path is None else expanded(path)


MODEL, PATTERN_GROUP, RUNNING = "Model", "Pattern and selection", "Running"

ADAPTER = typer.Option(
    None, "--adapter", metavar="NAME", rich_help_panel=MODEL,
    help="Adapter; by default the one for the model type.",
)  # fmt: skip
TOKENIZER = typer.Option(
    None, "--tokenizer", metavar="NAME", rich_help_panel=MODEL,
    help="Directory or hub name; by default the model's own.",
)  # fmt: skip
REMOTE = typer.Option(
    False, "--trust-remote-code", rich_help_panel=MODEL,
    help="Run code from the checkpoint, or code that task files name.",
)  # fmt: skip
REVISION = typer.Option(
    None, "--revision", metavar="REV", rich_help_panel=MODEL,
    help="Branch, tag or commit of a model on the hub.",
)  # fmt: skip
TOKEN = typer.Option(
    None, "--token", metavar="TOKEN", rich_help_panel=MODEL,
    help="Token for the hub; by default from HF_TOKEN, or the one stored by `hf auth login`.",
)  # fmt: skip
CACHE_DIR = typer.Option(
    None, "--cache-dir", metavar="DIR", rich_help_panel=MODEL,
    help="Directory for downloads from the hub.",
)  # fmt: skip
SPARSITY = typer.Option(
    None, "--sparsity", metavar="S", rich_help_panel=PATTERN_GROUP,
    help="Share of weights to prune, for example 0.5.",
)  # fmt: skip
PATTERN = typer.Option(
    None, "--pattern", metavar="N:M", rich_help_panel=PATTERN_GROUP,
    help="Keep N of every M inputs, for example 2:4. auto:M with --sparsity chooses an N for each "
    "site.",
)  # fmt: skip
PER = typer.Option(
    None, "--per", metavar="UNIT", rich_help_panel=PATTERN_GROUP,
    help="Unit in which --sparsity is counted: row, layer, block or model. The last two choose a "
    "sparsity for each site, as the allocations auto-block and auto do.",
)  # fmt: skip
ONLY = typer.Option(
    None, "--only", metavar="GLOB", rich_help_panel=PATTERN_GROUP,
    help="Prune only matching sites; repeatable.",
)  # fmt: skip
SKIP = typer.Option(
    None, "--skip", metavar="GLOB", rich_help_panel=PATTERN_GROUP,
    help="Leave matching sites dense; repeatable.",
)  # fmt: skip
OVERRIDE = typer.Option(
    None, "--override", metavar="GLOB=S|N:M", rich_help_panel=PATTERN_GROUP,
    help="Another pattern for sites that match GLOB; repeatable.",
)  # fmt: skip
ALSO = typer.Option(
    [], "--also", metavar="KIND", rich_help_panel=PATTERN_GROUP,
    help="Prune these parameters too; for Mamba conv1d, A_log or D; repeatable.",
)  # fmt: skip
METRIC = typer.Option(
    ["perplexity"], "--metric", metavar="NAME", rich_help_panel="Calibration and measuring",
    help="perplexity or accuracy; with apt-prune eval --dense also divergence or agreement; "
    "repeatable.",
)  # fmt: skip
NO_BOS = typer.Option(
    False, "--no-bos", rich_help_panel="Calibration and measuring",
    help="Do not begin samples and windows with the token that the tokenizer adds.",
)  # fmt: skip
DEVICE = typer.Option(
    "auto", "--device", rich_help_panel=RUNNING,
    help="cpu, cuda, …; auto uses a GPU if there is one.",
)  # fmt: skip
DTYPE = typer.Option(
    "auto", "--dtype", rich_help_panel=RUNNING,
    help="float32, bfloat16 or float16; auto keeps the checkpoint's.",
)  # fmt: skip
ACTIVATIONS = typer.Option(
    "memory", "--activations", metavar="WHERE", rich_help_panel=RUNNING,
    help="Place of the calibration activations: memory (with the model), cpu (beside a GPU), or "
    "disk (with --stream).",
)  # fmt: skip
WRITTEN = typer.Option(..., "--output", "-o", callback=in_home, help="Directory to write.")
JSON = typer.Option(
    False, "--json", rich_help_panel="Output",
    help="Print one JSON object, and progress and errors as lines of JSON on standard error.",
)  # fmt: skip


def read_pattern(sparsity: str | None, pattern: str | None, per: str | None) -> "Pattern | None":
    """The pattern of ``--sparsity`` or ``--pattern``; None if neither is given."""
    check_pattern_options(sparsity, pattern, per)
    from apt.solver import NM, Unstructured

    text = sparsity if sparsity is not None else pattern
    if text is None:
        return None
    if pattern is not None and pattern.startswith("auto:"):
        return parse(f"{pattern}@{sparsity}" if sparsity is not None else pattern)
    found = parse(text)
    if sparsity is not None and isinstance(found, NM):
        raise AptError(f"--sparsity {text} is a pattern", f"use --pattern {text}")
    if isinstance(found, Unstructured) and per in ("row", "layer"):
        return Unstructured(found.sparsity, per)  # type: ignore[arg-type]
    return found


ALLOCATION_PER = {"block": "auto-block", "model": "auto"}
"""The allocations of the units of ``--per`` that several sites share."""


def read_allocation(name: str | None, per: str | None, pattern: "Pattern") -> str:
    """The name of ``--allocation``, or the one that ``--per`` or the pattern implies."""
    from apt.planning.allocation import default_allocation

    if per not in ALLOCATION_PER:
        return name or default_allocation(pattern)
    if name is not None:
        raise AptError(f"--per {per} and --allocation {name} exclude each other", "choose one")
    return ALLOCATION_PER[per]


def check_pattern_options(sparsity: str | None, pattern: str | None, per: str | None) -> None:
    """Raise if the options for a pattern contradict each other."""
    mixed = pattern is not None and pattern.startswith("auto:")
    if sparsity is not None and pattern is not None and not mixed:
        raise AptError("--sparsity and --pattern are both given", "choose one")
    if mixed and sparsity is None and "@" not in str(pattern):
        raise AptError(f"--pattern {pattern} needs --sparsity", "add --sparsity 0.5")
    if per not in (None, "row", "layer", *ALLOCATION_PER):
        raise AptError(f"--per {per} is none of row, layer, block, model")
    if per is not None and (sparsity is None or mixed):
        raise AptError(
            f"--per {per} needs --sparsity",
            "an n:m pattern is the same in every row: leave out --per",
        )


def parse(text: str) -> "Pattern":
    """`parse_pattern`, with an `AptError` for a text that is not a pattern."""
    from apt.solver import parse_pattern

    try:
        return parse_pattern(text)
    except ValueError as error:
        raise AptError(str(error)) from error


def read_hub(
    revision: str | None = None, token: str | None = None, cache_dir: str | None = None
) -> Hub:
    """The settings for the hub of ``--revision``, ``--token`` and ``--cache-dir``."""
    return Hub(revision, token, cache_dir)


def find_model(
    reference: str, registry: "Registry", hub: Hub, *, trust_remote_code: bool = False
) -> "Source":
    """The location of the model. For a model on the hub, the hub is contacted."""
    from apt.cli.progress import Progress
    from apt.locations.model_source import find

    with Progress(f"looking for {reference}"):
        return find(reference, registry, trust_remote_code=trust_remote_code, hub=hub)


def read_selection(
    only: list[str] | None, skip: list[str] | None, overrides: list[str] | None = None
) -> "Selection":
    """The selection of ``--only``, ``--skip`` and ``--override``."""
    from apt.planning.plan import Selection

    pairs = []
    for text in overrides or []:
        glob, equals, pattern = text.rpartition("=")
        if not equals or not glob:
            raise AptError(f"--override {text} has no GLOB=PATTERN", "write '*.q_proj=0.4'")
        pairs.append((glob, parse(pattern)))
    return Selection(tuple(only or ()), tuple(skip or ()), tuple(pairs))


def check_new_file(
    path: Path, *inputs: str | Path | None, overwrite: bool | None, option: str = "output"
) -> None:
    """Raise if a file cannot be written, before the work.

    Args:
        path: the file.
        inputs: what the command reads; the file must not be inside.
        overwrite: True if a file there may be replaced; None for a command without that option.
        option: the option that names the file.
    """
    places = [expanded(given) for given in inputs if given]
    read = [place for place in places if kind_at(place)]
    check_file(expanded(path), overwrite=overwrite, inputs=read, options=(option,))


def parts(text: str, option: str) -> list[str]:
    """The parts of a list, which is not empty."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise AptError(f"{option} '{text}' has an empty part", "separate names by single commas")
    return parts
