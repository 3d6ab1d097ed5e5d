"""The check of a model on disk: its files, its zeros, and the sizes of a smaller model."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apt.checkpoints.architecture import quantised_with
from apt.checkpoints.copies import CARD
from apt.checkpoints.load import load, open_skeleton
from apt.checkpoints.offload import StoredBlocks
from apt.checkpoints.opened import Opened
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.stored import find_stored, layout_of
from apt.checkpoints.verify import Verdict, block_verdicts, failures, verify
from apt.engine.opening import find_source, pattern_of, selection_of
from apt.engine.prepare import tower_in
from apt.errors import AptError, describe
from apt.files.hashes import changed_files, sha256
from apt.options import VerifyRun
from apt.output.report import listed_files, read_report, report_beside
from apt.packing.directory import PackedShards
from apt.patterns import Granularity, Pattern, SitePattern, Unstructured
from apt.planning.allocation import is_needed, sparsity_of, step_of, unstructured
from apt.planning.plan import (
    Plan,
    PlannedBlock,
    PlannedSite,
    Selection,
    check_globs,
    check_rounding,
    make_plan,
    read_pattern,
    removed_by,
)
from apt.plugin.registry import Registry
from apt.plugin.specs import UNIFORM
from apt.runtime.entries import METHOD
from apt.shrinking.record import group_counts

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Verification:
    """The result of the check of a model on disk.

    Attributes:
        pattern: the expected pattern; empty for a smaller model, and for a quantised model, whose
            zeros are not counted.
        verdicts: the result for each site.
        structure: the structure of a smaller model, from its report; empty for other models.
        problems: the problems beside failed sites.
    """

    pattern: str = ""
    verdicts: tuple[Verdict, ...] = ()
    structure: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def failed(self) -> list[Verdict]:
        """The verdicts of the sites that do not meet their patterns."""
        return failures(self.verdicts)


def verify_directory(run: VerifyRun, registry: Registry, notice: Notice) -> Verification:
    """Check the files of a model on disk, and its zeros or sizes.

    Without a pattern, the sites must meet the patterns in the report. This holds too if the pattern
    is the pattern of a run that distributed it over the sites.

    Raises:
        AptError: the model cannot be read, there is neither a pattern nor a report, or a smaller
            model is to be compared with a selection.
    """
    directory, pattern, selection = run.directory, pattern_of(run), selection_of(run)
    report = read_report(directory) or {}
    if pattern is None and not report:
        raise _missing_pattern_error()
    problems = _changed_files(directory, report, notice)
    source = find_source(f"{directory.resolve()}", run, registry)
    source = replace(source, reference=str(directory))
    skeleton = open_skeleton(source, registry, run.adapter, packed=True)
    method = quantised_with(skeleton.config)
    last = next(iter(_options_of(report).get("stacks") or ()), None) if pattern is None else None
    skeleton = tower_in(skeleton, run.stack or last, registry, run.adapter, packed=True)
    if method == METHOD:
        PackedShards(directory).check()
    elif method:
        if not report:
            message = f"{directory} is quantised with {method}, and has no report"
            raise AptError(message, "only the files that a report names can be verified")
        notice(f"its weights are quantised with {method}, and zeros are not counted")
        return Verification(problems=tuple(problems))
    if pattern is None and (structure := report.get("structure")):
        if selection != Selection():
            raise AptError(
                f"{directory} is a smaller model: its sites have no pattern",
                "leave these options out, or give a pattern",
                ("only", "skip", "overrides"),
            )
        problems += verify_structure(skeleton, structure)
        return Verification(structure=structure, problems=tuple(problems))
    try:
        is_distributed = pattern is not None and _is_distributed(report, pattern)
        if is_distributed:
            notice("the run distributed this sparsity over the sites: see its report")
        if pattern is None or is_distributed:
            expectation = expected_by_report(skeleton, report, selection, notice)
            expectation = replace(expectation, zeros={}) if run.at_least else expectation
        else:
            expectation = expected_by_pattern(
                skeleton, report, pattern, selection, notice, at_least=run.at_least
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = f"the report in {directory} is damaged: {describe(error)}"
        raise AptError(message, *_GIVE_PATTERN) from error
    verdicts = count_zeros(skeleton, directory, expectation, packed=method == METHOD)
    return Verification(
        expectation.pattern, tuple(verdicts), problems=(*problems, *expectation.problems)
    )


def verify_file(run: VerifyRun) -> Verification:
    """Compare a model that is one file with its hash in the report beside it.

    Raises:
        AptError: there is no report that lists the file, or options are given that choose sites or
            patterns: the zeros of a file are not counted.
    """
    file, names = run.directory, ("sparsity", "pattern", "only", "skip", "overrides")
    if given := tuple(name for name in names if getattr(run, name) not in (None, ())):
        message = f"{file} is compared with its report alone: its zeros are not counted"
        raise AptError(message, "leave these options out", given)
    hashes = listed_files(read_report(file) or {})
    if file.name not in hashes:
        message = f"no report beside {file} lists it"
        raise AptError(message, f"a file that APT wrote has one: {report_beside(file).name}")
    if sha256(file) == hashes[file.name]:
        return Verification()
    return Verification(problems=(f"{file.name} was changed since it was written",))


def _is_distributed(report: Mapping[str, Any], pattern: Pattern) -> bool:
    """True if a pattern is the pattern of a run with an allocation."""
    options = _options_of(report) if report else {}
    allocated = str(options.get("allocation") or UNIFORM) != UNIFORM
    return allocated and pattern.per is None and str(options.get("pattern")) == str(pattern)


def _changed_files(directory: Path, report: Mapping[str, Any], notice: Notice) -> list[str]:
    """A line for each file that differs from its hash in the report.

    A model card may be edited: a change of it is a notice.
    """
    changed = changed_files(directory, listed_files(report))
    if CARD in changed:
        notice(f"{CARD} was changed or removed since it was written")
    files = [name for name in changed if name != CARD]
    return [f"{name} was changed or removed since it was written" for name in files]


@dataclass(frozen=True)
class Expectation:
    """The patterns that the sites must meet, and the exact numbers of their zeros.

    Attributes:
        pattern: the given pattern or the pattern of the run, as text.
        plan: the pattern of each site.
        zeros: the number of zeros of each site, by name; empty if more zeros are accepted.
        problems: the differences between the options and the sites in the report.
    """

    pattern: str
    plan: Plan
    zeros: Mapping[str, int]
    problems: tuple[str, ...] = ()


def count_zeros(
    skeleton: Opened, directory: Path, expectation: Expectation, *, packed: bool
) -> Iterator[Verdict]:
    """Count the zeros of all sites, block by block if the checkpoint can be read so.

    If the model is packed, rounding may have made more zeros.
    """
    plan, exact = expectation.plan, {} if packed else expectation.zeros
    stored = find_stored(skeleton) if not packed else None
    if packed:
        shards: Shards = PackedShards(directory)
        layout = layout_of(skeleton, shards)
    elif stored is not None:
        shards, layout = stored.shards, stored.layout
    else:
        yield from verify(load(skeleton).module, skeleton.adapter, plan, exact)
        return
    on_disk = StoredBlocks(shards, layout, dict(skeleton.adapter.blocks(skeleton.module)), "cpu")
    for planned in plan.blocks:
        with on_disk.open(planned.name) as block:
            yield from block_verdicts(planned, block, exact)


def expected_by_pattern(
    skeleton: Opened,
    report: Mapping[str, Any],
    pattern: Pattern,
    selection: Selection,
    notice: Notice,
    *,
    at_least: bool,
) -> Expectation:
    """The expectation from a given pattern.

    The sites that the report lists as left dense are not counted. If the report has the given
    pattern for a site, the site must have the number of zeros in the report. This number may
    include zeros of the dense model that were kept, and weights that were rounded to zero.
    """
    if dense := _dense_names(report):
        notice(f"left dense: {', '.join(dense)}")
        selection = replace(selection, skip=(*selection.skip, *dense))
    plan = make_plan(skeleton.module, skeleton.adapter, pattern, selection, _per(report))
    check_rounding(plan, notice, quantized=True)
    recorded = {site["name"]: site for site in _site_records(report)} if report.get("sites") else {}
    zeros = {
        site.name: _expected_zeros(site, recorded.get(site.name))
        for block in plan.blocks
        for site in block.pruned
    }
    return Expectation(str(pattern), plan, {} if at_least else zeros)


def _expected_zeros(site: PlannedSite, record: Mapping[str, Any] | None) -> int:
    """The number of zeros that a site must have."""
    if record is not None and str(record["pattern"]) == str(site.pattern):
        return int(record["zeros"])
    return removed_by(site.pattern, site.shape)


def expected_by_report(
    skeleton: Opened, report: Mapping[str, Any], selection: Selection, notice: Notice
) -> Expectation:
    """The expectation from the options of the run, and from the zeros in its report.

    A selection has the sites to check, and expected patterns in place of the patterns of the run.

    Raises:
        AptError: there is no report of a run, or it is damaged; or a glob matches no site.
    """
    fitted = bool(report.get("fit"))
    pattern = "its levels" if fitted else _options_of(report).get("pattern")
    records = {str(site["name"]): site for site in _site_records(report)}
    if dense := _dense_names(report):
        notice(f"left dense: {', '.join(dense)}")
    requested = _requested_plan(skeleton, report)
    allocated = set(requested.names) if fitted else _allocated_names(requested, report)
    plan = Plan(tuple(_with_records(b, records, allocated, dense) for b in requested.blocks))
    problems = [
        *_pattern_differences(plan, records),
        *([] if fitted else _total_differences(requested, plan, allocated)),
    ]
    check_globs(plan, selection)
    plan = Plan(tuple(_selected(block, selection) for block in plan.blocks))
    exact_records = {} if report.get("recovery") else records  # a training may move or add zeros
    zeros = {
        site.name: int(exact_records[site.name]["zeros"])
        for block in plan.blocks
        for site in block.targets
        if site.name in exact_records
        and str(site.pattern) == str(exact_records[site.name]["pattern"])
    }
    return Expectation(str(pattern), plan, zeros, tuple(problems))


def _requested_plan(skeleton: Opened, report: Mapping[str, Any]) -> Plan:
    """The plan of a run, before its allocation."""
    options = _options_of(report)
    only, skip = (tuple(options.get(name) or ()) for name in ("only", "skip"))
    overrides = tuple((options.get("overrides") or {}).items())
    return make_plan(
        skeleton.module,
        skeleton.adapter,
        read_pattern(str(0 if report.get("fit") else options.get("pattern"))),
        Selection(only, skip, overrides),
        _per(report),
        [str(kind) for kind in options.get("also") or ()],
    )


def _per(report: Mapping[str, Any]) -> Granularity:
    return "row" if _options_of(report).get("per") == "row" else "layer"


def _allocated_names(requested: Plan, report: Mapping[str, Any]) -> set[str]:
    """The names of the sites whose sparsity an allocation chose."""
    name = str(_options_of(report).get("allocation") or UNIFORM)
    return {site.name for site in unstructured(requested)} if is_needed(name, requested) else set()


def _with_records(
    block: PlannedBlock,
    records: Mapping[str, Any],
    allocated: Collection[str],
    dense: Collection[str],
) -> PlannedBlock:
    """The block with the patterns of the report for the sites that an allocation has changed.

    An allocation of n:m may leave a site dense.
    """
    sites = [site for site in block.pruned if site.name in allocated]
    patterns: dict[str, SitePattern | None] = {
        site.site.name: _recorded_pattern(site, records[site.name])
        for site in sites
        if site.name in records
    }
    dense_patterns = {site.site.name: None for site in sites if site.name in dense}
    return block.with_patterns(patterns | dense_patterns)


def _recorded_pattern(site: PlannedSite, record: Mapping[str, Any]) -> Pattern:
    """The pattern of a site in the report, with the unit of the run."""
    pattern = read_pattern(str(record["pattern"]))
    return pattern.counted((site.pattern and site.pattern.per) or "layer")


def _pattern_differences(plan: Plan, records: Mapping[str, Any]) -> Iterator[str]:
    """A line for each site whose pattern in the report differs from the plan."""
    for block in plan.blocks:
        for site in block.targets:
            recorded = records[site.name]["pattern"] if site.name in records else "nothing"
            if str(site.pattern) != str(recorded):
                yield f"{site.name}: {site.pattern} was asked for, and the report has {recorded}"


def _total_differences(requested: Plan, plan: Plan, allocated: Collection[str]) -> Iterator[str]:
    """A line if the total of an allocation differs from the sparsity."""
    sites = [site for site in requested.sites if site.name in allocated]
    expected = sum(Unstructured(sparsity_of(site)).count(site.size) for site in sites)
    total = sum(
        removed_by(site.pattern, site.shape) for site in plan.sites if site.name in allocated
    )
    if abs(total - expected) > max(map(step_of, sites), default=0):
        removed = f"the patterns in the report remove {total:,} weights"
        yield f"{removed}, and {expected:,} were asked for"


def _selected(block: PlannedBlock, selection: Selection) -> PlannedBlock:
    """The block with the sites and the patterns of a selection."""

    def pattern(site: PlannedSite) -> SitePattern | None:
        if site.pattern is None or selection.pattern(site.name, _ANY) is None:
            return None
        chosen = selection.override(site.name)
        return site.pattern if chosen is None else chosen.counted("layer")

    sites = tuple(site.with_pattern(pattern(site)) for site in block.sites)
    extras = tuple(
        extra for extra in block.extras if selection.pattern(extra.name, _ANY) is not None
    )
    return replace(block, sites=sites, extras=extras)


_ANY = Unstructured(0.5)  # the default of a selection, which is not used


def _options_of(report: Mapping[str, Any]) -> dict[str, Any]:
    options = report.get("options")
    return options if isinstance(options, dict) else {}


def _dense_names(report: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in report.get("skipped") or ()]


def _site_records(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of the sites.

    Raises:
        AptError: there are no records, or they are damaged.
    """
    has_pattern = _options_of(report).get("pattern") or report.get("fit")
    if not report.get("sites") or not has_pattern:
        raise _missing_pattern_error()
    sites = report["sites"]
    needed = {"name", "pattern", "zeros"}
    if not isinstance(sites, list) or not all(
        isinstance(site, dict) and needed <= site.keys() for site in sites
    ):
        raise AptError("the report's sites are damaged", *_GIVE_PATTERN)
    return sites


def _missing_pattern_error() -> AptError:
    return AptError("no report gives a pattern", *_GIVE_PATTERN)


_GIVE_PATTERN = "give a sparsity or a pattern", ("sparsity", "pattern")


def verify_structure(skeleton: Opened, structure: Mapping[str, Any]) -> list[str]:
    """The differences between a smaller model and the structure in its report.

    Raises:
        AptError: the report is damaged.
    """
    counts = group_counts(skeleton.module, skeleton.adapter, skeleton.config)
    counted = {"blocks": len(skeleton.adapter.blocks(skeleton.module))} | counts
    try:
        recorded = {str(kind): int(entry["kept"]) for kind, entry in structure["groups"].items()}
        recorded["blocks"] = int(structure["blocks"]["kept"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AptError("the report's structure is damaged", "delete the report") from error
    # A smaller model may have fewer kinds of groups, see `group_counts`.
    return [
        f"{counted[kind]} {kind}, not {count}"
        for kind, count in recorded.items()
        if counted.get(kind, count) != count
    ]
