"""``apt-prune verify``."""

from pathlib import Path
from typing import Any

import typer

from apt.cli import arguments as args
from apt.errors import AptError, shortened
from apt.locations.paths import kind_at


def verify(
    directory: Path = typer.Argument(help="The model's directory."),
    sparsity: str | None = args.SPARSITY,
    pattern: str | None = args.PATTERN,
    per: str | None = args.PER,
    adapter: str | None = args.ADAPTER,
    only: list[str] | None = args.ONLY,
    skip: list[str] | None = args.SKIP,
    override: list[str] | None = args.OVERRIDE,
    as_json: bool = args.JSON,
    trust_remote_code: bool = args.REMOTE,
) -> None:
    """Count the zeros of a model on disk.

    The exit status is 1 if a site has too few zeros. A smaller model is compared with the numbers
    of blocks and groups in its report.

    Without a pattern, each site is compared with its pattern in the report of the run. With a
    pattern, the sites that the report lists as left dense on request are named and not counted,
    and --per is that of the run.
    """
    args.check_pattern_options(sparsity, pattern, per)
    if kind_at(directory) != "directory":
        raise AptError(f"no such directory: {shortened(str(directory))}", "check the path")

    from dataclasses import replace

    from apt.checkpoints.load import load, skeleton
    from apt.checkpoints.verify import failures
    from apt.checkpoints.verify import verify as count
    from apt.cli.output import notice, out, show_json
    from apt.locations.model_source import find
    from apt.output.report import read_report
    from apt.planning.plan import make_plan
    from apt.planning.rounding import check_rounding
    from apt.plugin.registry import registry

    report = read_report(directory) or {}
    if report.get("structure") and sparsity is None and pattern is None:
        if only or skip or override:
            raise AptError(
                f"{directory} is a smaller model: its sites have no pattern",
                "leave these options out, or give a pattern",
                ("only", "skip", "overrides"),
            )
        _show_structure(
            directory, report["structure"], adapter, as_json=as_json, remote=trust_remote_code
        )
        return
    given = args.read_pattern(sparsity, pattern, per)
    wanted = given or args.parse(str(_recorded(report, "options").get("pattern")))
    selection = args.read_selection(only, skip, override)
    if given is None:
        own = tuple((str(s["name"]), args.parse(str(s["pattern"]))) for s in _sites(report))
        selection = replace(selection, overrides=(*own, *selection.overrides))
    source = find(f"{directory.resolve()}", registry(), trust_remote_code=trust_remote_code)
    model = load(skeleton(replace(source, reference=str(directory)), registry(), adapter))
    if report.get("skipped"):
        dense = [str(name) for name in report["skipped"]]
        notice(f"left dense on request: {', '.join(dense)}")
        selection = replace(selection, skip=(*selection.skip, *dense))
    by_row = report.get("options", {}).get("per") == "row"
    also = [] if given else [str(kind) for kind in report.get("options", {}).get("also", ())]
    plan = make_plan(
        model.module, model.adapter, wanted, selection, "row" if by_row else "layer", also
    )
    check_rounding(plan, notice)
    verdicts = count(model.module, model.adapter, plan)
    failed = failures(verdicts)
    zeros, size = sum(v.zeros for v in verdicts), sum(v.size for v in verdicts)
    asked = wanted if given else f"their pattern in the report ({wanted})"
    met = f"{len(verdicts) - len(failed)} of {len(verdicts)} sites meet {asked}"
    if as_json:
        found = [{"name": v.name, "detail": v.detail} for v in failed]
        show_json({"directory": str(directory), "pattern": str(wanted), "sites": len(verdicts),
                   "zeros": zeros, "weights": size, "failed": found})  # fmt: skip
    else:
        for verdict in failed:
            out.print(f"{verdict.name}: {verdict.detail}", markup=False)
        zero = f"{zeros / size:.4%} of their weights are zero"
        out.print(f"{directory}: {met}; {zero}", markup=False)
    if failed:
        raise typer.Exit(1)


def _show_structure(
    directory: Path, structure: Any, adapter: str | None, *, as_json: bool, remote: bool
) -> None:
    """Compare a smaller model with the structure in its report."""
    from apt.checkpoints.load import load, skeleton
    from apt.cli.output import out, show_json
    from apt.cli.summary import structure_line
    from apt.locations.model_source import find
    from apt.plugin.registry import registry

    source = find(f"{directory.resolve()}", registry(), trust_remote_code=remote)
    model = load(skeleton(source, registry(), adapter))
    blocks = model.adapter.blocks(model.module)
    found = {"blocks": len(blocks)} | {
        groups.kind: groups.count
        for _, block in blocks
        for groups in model.adapter.groups(block, model.config)
    }
    try:
        said = {kind: entry["kept"] for kind, entry in structure["groups"].items()}
        said["blocks"], line = structure["blocks"]["kept"], structure_line(structure)
    except (KeyError, TypeError, AttributeError) as error:
        raise AptError("the report's structure is damaged", "delete the report") from error
    wrong = [
        f"{found.get(kind)} {kind}, not {n}" for kind, n in said.items() if found.get(kind) != n
    ]
    if as_json:
        show_json({"directory": str(directory), "structure": structure, "failed": wrong})
    else:
        text = f"it has {'; '.join(wrong)}" if wrong else f"{line}, as the report says"
        out.print(f"{directory}: {text}", markup=False)
    if wrong:
        raise typer.Exit(1)


def _recorded(report: dict[str, Any], key: str) -> Any:
    """An entry of the report; an error if it is missing."""
    if not report.get(key):
        raise AptError("no report gives a pattern", "give --sparsity S or --pattern N:M")
    return report[key]


def _sites(report: dict[str, Any]) -> list[dict[str, Any]]:
    sites = _recorded(report, "sites")
    if not isinstance(sites, list) or not all(
        isinstance(site, dict) and {"name", "pattern"} <= site.keys() for site in sites
    ):
        raise AptError("the report's sites are damaged", "give --sparsity S or --pattern N:M")
    return sites
