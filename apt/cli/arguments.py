"""Options that several subcommands take, and how their text is read."""

from typing import TYPE_CHECKING

import typer

from apt.errors import AptError
from apt.locations.hub import Hub
from apt.runs.limits import check_pattern_options

if TYPE_CHECKING:
    from apt.locations.model_source import Source
    from apt.planning.plan import Selection
    from apt.plugin.registry import Registry
    from apt.solver import Pattern

ADAPTER = typer.Option(None, "--adapter", metavar="NAME", help="Adapter; by default by model type.")
SPARSITY = typer.Option(None, "--sparsity", metavar="S", help="Share of weights to prune, as 0.5.")
PATTERN = typer.Option(None, "--pattern", metavar="N:M", help="Keep N of every M inputs, as 2:4.")
PER = typer.Option(None, "--per", metavar="row|layer", help="Where --sparsity is counted.")
ALSO = typer.Option(
    [], "--also", metavar="KIND",
    help="Prune this beside the Linears: of Mamba conv1d, A_log or D; repeatable.",
)  # fmt: skip
ONLY = typer.Option(None, "--only", metavar="GLOB", help="Prune only sites that match; repeatable.")
SKIP = typer.Option(None, "--skip", metavar="GLOB", help="Leave matching sites dense; repeatable.")
OVERRIDE = typer.Option(
    None, "--override", metavar="GLOB=S|N:M", help="Another pattern where GLOB matches; repeatable."
)
METRIC = typer.Option(
    ["perplexity"], "--metric", metavar="NAME", help="perplexity or accuracy; repeatable."
)
TOKENIZER = typer.Option(
    None, "--tokenizer", metavar="NAME", help="Directory or hub name; by default the model's own."
)
NO_BOS = typer.Option(
    False, "--no-bos",
    help="Leave out the token that begins each sample and window where the tokenizer adds one.",
)  # fmt: skip
ACTIVATIONS = typer.Option(
    "memory", "--activations", metavar="WHERE",
    help="Where a --stream run keeps the calibration activations: memory, or disk.",
)  # fmt: skip
REVISION = typer.Option(
    None, "--revision", metavar="REV", help="Branch, tag or commit of a model on the hub."
)
TOKEN = typer.Option(
    None, "--token", metavar="TOKEN",
    help="Token for the hub; by default the one of HF_TOKEN, or that `hf auth login` has stored.",
)  # fmt: skip
CACHE_DIR = typer.Option(
    None, "--cache-dir", metavar="DIR", help="Where downloads from the hub are kept."
)
JSON = typer.Option(False, "--json", help="Print one JSON object.")
REMOTE = typer.Option(False, "--trust-remote-code", help="Run code that comes with the checkpoint.")
DEVICE = typer.Option("auto", "--device", help="cpu, cuda, …; auto takes a GPU if there is one.")
DTYPE = typer.Option(
    "auto", "--dtype", help="float32, bfloat16 or float16; auto keeps the checkpoint's."
)


def read_pattern(sparsity: str | None, pattern: str | None, per: str | None) -> "Pattern | None":
    """The pattern of ``--sparsity`` or ``--pattern``; None where neither is given."""
    check_pattern_options(sparsity, pattern, per)
    from apt.solver import NM, Unstructured

    text = sparsity if sparsity is not None else pattern
    if text is None:
        return None
    found = parse(text)
    if sparsity is not None and isinstance(found, NM):
        raise AptError(f"--sparsity {text} is a pattern", f"use --pattern {text}")
    if isinstance(found, Unstructured) and per is not None:
        return Unstructured(found.sparsity, per)  # type: ignore[arg-type]
    return found


def parse(text: str) -> "Pattern":
    """`parse_pattern` with errors for users."""
    from apt.solver import parse_pattern

    try:
        return parse_pattern(text)
    except ValueError as error:
        raise AptError(str(error)) from error


def read_hub(
    revision: str | None = None, token: str | None = None, cache_dir: str | None = None
) -> Hub:
    """How the hub is asked, by ``--revision``, ``--token`` and ``--cache-dir``."""
    return Hub(revision, token, cache_dir)


def find_model(
    reference: str, registry: "Registry", hub: Hub, *, trust_remote_code: bool = False
) -> "Source":
    """Where the model is; for one on the hub, after a look whether the hub answers."""
    from apt.cli.output import working
    from apt.locations.model_source import find

    with working(f"looking for {reference}"):
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
