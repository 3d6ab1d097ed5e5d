"""``apt-prune verify``."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from apt.errors import AptError, shortened
from apt.locations.paths import kind_at
from apt.options import PrintingOptions, VerifyRun

if TYPE_CHECKING:
    from apt.engine.verification import Verification


def verify(run: VerifyRun, printing: PrintingOptions) -> None:
    """Check a model on disk: its files, and the zeros of every site.

    The exit status is 1 if a file was changed, or if a site has too few zeros or too many. Files
    are compared with their hashes in the report, and the tensors of a packed model with their
    checksums. A smaller model is compared with the numbers of blocks and groups in its report.

    Without a pattern, the sites are compared with the options of the run, and with the numbers of
    zeros in its report. With a pattern, the sites that the report lists as left dense on request
    are named and not counted, and --per is that of the run.

    A model that is one file, such as NAME.gguf, is compared with its hash in the report beside it.
    """
    kind = kind_at(run.directory)
    if kind not in ("directory", "file"):
        raise AptError(f"no such directory: {shortened(str(run.directory))}", "check the path")

    from apt.cli.output import notice
    from apt.engine.verification import verify_directory, verify_file
    from apt.plugin.registry import registry

    is_file = kind == "file"
    verified = verify_file(run) if is_file else verify_directory(run, registry(), notice)
    by_report = run.sparsity is None and run.pattern is None
    _show(run.directory, verified, by_report=by_report, as_json=printing.as_json)
    if verified.failed or verified.problems:
        raise typer.Exit(1)


def _show(directory: Path, verified: "Verification", *, by_report: bool, as_json: bool) -> None:
    from apt.cli.output import say, show_json

    if as_json:
        show_json(_record(directory, verified))
        return
    for verdict in verified.failed:
        say(f"{verdict.name}: {verdict.detail}")
    for problem in verified.problems:
        say(problem)
    say(f"{directory}: {_summary(verified, by_report=by_report)}")


def _record(directory: Path, verified: "Verification") -> dict[str, object]:
    return {
        "directory": str(directory),
        "pattern": verified.pattern or None,
        "structure": dict(verified.structure) or None,
        "sites": len(verified.verdicts),
        "zeros": sum(verdict.zeros for verdict in verified.verdicts),
        "weights": sum(verdict.size for verdict in verified.verdicts),
        "failed": [{"name": verdict.name, "detail": verdict.detail} for verdict in verified.failed],
        "problems": list(verified.problems),
    }


def _summary(verified: "Verification", *, by_report: bool) -> str:
    from apt.cli.summary import structure_line

    if verified.structure:
        comparison = "not as the report says" if verified.problems else "as the report says"
        return f"{structure_line(verified.structure)}, {comparison}"
    if not verified.verdicts:
        return "its files differ" if verified.problems else "its files are as the report says"
    zeros, size = (
        sum(n) for n in zip(*((v.zeros, v.size) for v in verified.verdicts), strict=True)
    )
    passed = len(verified.verdicts) - len(verified.failed)
    pattern = f"their pattern in the report ({verified.pattern})" if by_report else verified.pattern
    return (
        f"{passed} of {len(verified.verdicts)} sites meet {pattern}; "
        f"{zeros / size:.4%} of their weights are zero"
    )
