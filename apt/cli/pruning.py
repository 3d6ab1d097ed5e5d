"""A run of ``apt-prune prune``, once its options are read."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from apt.checkpoints.copies import REPORT
from apt.cli.output import complaint, notice, out, show_json
from apt.cli.plan import Planned, show_plan
from apt.cli.progress import RunProgress
from apt.cli.streams import program
from apt.cli.summary import show_report, without_value
from apt.distributed.ranks import Ranks
from apt.errors import AptError
from apt.output.workplace import resumable
from apt.runs.options import RunOptions
from apt.runs.prepare import Prepared, already_complete
from apt.runs.run import execute


def plan_of(prepared: Prepared) -> Planned:
    """What is going to be done."""
    options = prepared.options
    return Planned(
        prepared.shell,
        prepared.plan,
        prepared.samples,
        options.seqlen,
        prepared.device,
        streamed=options.stream,
        on_disk=options.activations == "disk",
        writing=bool(prepared.augmentation.own_samples),
    )


def show_planned(prepared: Prepared, notices: list[str], *, as_json: bool) -> None:
    """Print what would be done."""
    for line in notices:
        notice(line)
    show_plan(plan_of(prepared), as_json=as_json)


def run(prepared: Prepared, ranks: Ranks, notices: list[str], *, as_json: bool) -> None:
    """Prune, and print what was done.

    Args:
        prepared: the checked run.
        ranks: the processes that do this together.
        notices: the defaults that were chosen, to be said once the run is under way.
        as_json: whether the summary is one JSON object.
    """
    if already_complete(prepared):
        _show_complete(prepared, as_json=as_json)
        return
    try:
        with _terminable(), RunProgress(prepared.plan, notices) as progress:
            report = execute(prepared, progress.observe, progress.status, ranks=ranks)
    except AptError:
        raise
    except Exception as error:
        error.add_note(_whose(prepared))
        raise
    except KeyboardInterrupt as error:
        if ranks.first:
            typer.echo(f"{program()}: interrupted; {_left(prepared.options)}", err=True)
        raise typer.Exit(143 if isinstance(error, _TerminatedError) else 130) from None
    show_report(report, prepared.options, prepared.registry, as_json=as_json)
    if wrong := without_value(report.scores, prepared.options.metrics):
        complaint(f"the {wrong} is not a finite number: the model's outputs are not")
        raise typer.Exit(1)


def _show_complete(prepared: Prepared, *, as_json: bool) -> None:
    output = str(prepared.options.output)
    if as_json:
        show_json({"output": output, "complete": True})
    else:
        out.print(f"{output}: already complete", markup=False)


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


def _left(options: RunOptions) -> str:
    """What an interrupted run has left."""
    if options.stream and resumable(options.output):
        return "to go on, give the same command with --resume"
    written = (options.output / REPORT).is_file()
    return f"{options.output} is whole" if written else "nothing was written"


def _whose(prepared: Prepared) -> str:
    """Where the code comes from that took part in a run, for those who read its traceback."""
    method, adapter = prepared.method.name, prepared.shell.spec.name
    found = prepared.registry.methods.origins[method], prepared.registry.adapters.origins[adapter]
    note = f"method {method} comes from {found[0].distribution}, adapter {adapter} from "
    note += found[1].distribution
    if prepared.options.stream and resumable(prepared.options.output):
        note += "; blocks that were done are on disk: once it is mended, go on with --resume"
    return note
