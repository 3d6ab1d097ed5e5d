"""``apt-prune verify``."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from apt.errors import AptError, shortened
from apt.locations.paths import kind_at
from apt.options import PrintingOptions, VerifyRun

if TYPE_CHECKING:
    from apt.engine.verification import Verified


def verify(run: VerifyRun, printing: PrintingOptions) -> None:
    """Check a model on disk: its files, and the zeros of every site.

    The exit status is 1 if a file was changed, or if a site has too few zeros or too many. Files
    are compared with their hashes in the report, and the tensors of a packed model with their
    checksums. A smaller model is compared with the numbers of blocks and groups in its report.

    Without a pattern, the sites are compared with the options of the run, and with the numbers of
    zeros in its report. With a pattern, the sites that the report lists as left dense on request
    are named and not counted, and --per is that of the run.
    """
    if kind_at(run.directory) != "directory":
        raise AptError(f"no such directory: {shortened(str(run.directory))}", "check the path")

    from apt.cli.output import notice
    from apt.engine.verification import verify_directory
    from apt.plugin.registry import registry

    found = verify_directory(run, registry(), notice)
    by_report = run.sparsity is None and run.pattern is None
    _show(run.directory, found, by_report=by_report, as_json=printing.as_json)
    if found.failed or found.problems:
        raise typer.Exit(1)


def _show(directory: Path, found: "Verified", *, by_report: bool, as_json: bool) -> None:
    from apt.cli.output import say, show_json

    if as_json:
        show_json(_record(directory, found))
        return
    for verdict in found.failed:
        say(f"{verdict.name}: {verdict.detail}")
    for problem in found.problems:
        say(problem)
    say(f"{directory}: {_summary(found, by_report=by_report)}")


def _record(directory: Path, found: "Verified") -> dict[str, object]:
    return {
        "directory": str(directory),
        "pattern": found.pattern or None,
        "structure": dict(found.structure) or None,
        "sites": len(found.verdicts),
        "zeros": sum(verdict.zeros for verdict in found.verdicts),
        "weights": sum(verdict.size for verdict in found.verdicts),
        "failed": [{"name": verdict.name, "detail": verdict.detail} for verdict in found.failed],
        "problems": list(found.problems),
    }


def _summary(found: "Verified", *, by_report: bool) -> str:
    from apt.cli.summary import structure_line

    if found.structure:
        as_said = "not as the report says" if found.problems else "as the report says"
        return f"{structure_line(found.structure)}, {as_said}"
    if not found.verdicts:
        return "its files differ" if found.problems else "its files are as the report says"
    zeros, size = (sum(n) for n in zip(*((v.zeros, v.size) for v in found.verdicts), strict=True))
    meeting = len(found.verdicts) - len(found.failed)
    asked = f"their pattern in the report ({found.pattern})" if by_report else found.pattern
    return (
        f"{meeting} of {len(found.verdicts)} sites meet {asked}; "
        f"{zeros / size:.4%} of their weights are zero"
    )
