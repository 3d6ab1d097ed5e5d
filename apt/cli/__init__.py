"""The command line. Nothing here imports torch until a subcommand runs."""

import os
import sys
import warnings

import typer

from apt.cli import (
    adapters,
    check,
    convert,
    doctor,
    evaluate,
    inspect,
    methods,
    plugins,
    prune,
    verify,
)
from apt.errors import AptError

# What people mean by `apt` on Debian and its relatives.
_PACKAGE_MANAGER = [
    "install",
    "remove",
    "purge",
    "autoremove",
    "update",
    "upgrade",
    "full-upgrade",
    "dist-upgrade",
    "search",
    "show",
    "list",
    "policy",
    "edit-sources",
    "source",
    "build-dep",
    "download",
    "changelog",
    "clean",
    "autoclean",
    "satisfy",
]

app = typer.Typer(
    name="apt",
    help="Prune language models after training, in one shot.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("prune")(prune.prune)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)
app.command("check")(check.check)
app.command("convert")(convert.convert)
app.command("doctor")(doctor.doctor)
app.command("adapters")(adapters.adapters)
app.command("methods")(methods.methods)
app.command("plugins")(plugins.plugins)


def _version(show: bool) -> None:
    if show:
        from apt import __version__

        typer.echo(f"apt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of every error."),
) -> None:
    """Prune language models after training, in one shot."""


def main() -> None:
    """Run the command line: exit status 2 for what the user can mend, 130 for Ctrl-C."""
    arguments = sys.argv[1:] or ["--help"]
    if arguments[0] in _PACKAGE_MANAGER:
        _fail(
            f"this is APT, which prunes language models; for packages, run "
            f"/usr/bin/apt {arguments[0]}"
        )
    debug = "--debug" in arguments
    _quiet()
    try:
        app(args=[word for word in arguments if word != "--debug"], prog_name="apt")
    except AptError as error:
        if debug:
            raise
        rank = os.environ.get("RANK", "0")  # of the processes that torchrun starts
        _fail(f"rank {rank}: {error}" if rank != "0" else str(error))


def _fail(line: str) -> None:
    typer.echo(f"apt: {line}", err=True)
    raise SystemExit(2)


def _quiet() -> None:
    """Keep libraries' own chatter off the terminal; plugin failures are shown in one line each."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")
    for kept in ("plugin failed to load", "observer failed"):
        warnings.filterwarnings("always", message=kept)
    warnings.formatwarning = lambda message, *rest, **more: f"apt: warning: {message}\n"
