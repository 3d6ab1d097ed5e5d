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
from apt.errors import AptError, described
from apt.files.hashes import changed_files
from apt.options import VerifyRun
from apt.output.report import listed_files, read_report
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
class Verified:
    """What the check of a model on disk found.

    Attributes:
        pattern: the pattern that was asked for; empty for a smaller model, and for one that is
            quantised, whose zeros are not counted.
        verdicts: the result for each site.
        structure: the structure of a smaller model, from its report; empty for other models.
        problems: the faults beside those of sites.
    """

    pattern: str = ""
    verdicts: tuple[Verdict, ...] = ()
    structure: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def failed(self) -> list[Verdict]:
        """The verdicts of the sites that do not meet their patterns."""
        return failures(self.verdicts)


def verify_directory(run: VerifyRun, registry: Registry, notice: Notice) -> Verified:
    """Check the files of a model on disk, and its zeros or sizes.

    Without a pattern, the sites must meet that of the run, by its report. So must they if the
    pattern is that of a run which distributed it over the sites.

    Raises:
        AptError: the model cannot be read, there is neither a pattern nor a report, or a smaller
            model is to be compared with a selection.
    """
    directory, pattern, selection = run.directory, pattern_of(run), selection_of(run)
    report = read_report(directory) or {}
    if pattern is None and not report:
        raise _no_pattern()
    problems = _changed(directory, report, notice)
    source = find_source(f"{directory.resolve()}", run, registry)
    source = replace(source, reference=str(directory))
    skeleton = open_skeleton(source, registry, run.adapter, packed=True)
    method = quantised_with(skeleton.config)
    if method == METHOD:
        PackedShards(directory).check()
    elif method:
        if not report:
            fault = f"{directory} is quantised with {method}, and has no report"
            raise AptError(fault, "only the files that a report names can be verified")
        notice(f"its weights are quantised with {method}, and zeros are not counted")
        return Verified(problems=tuple(problems))
    if pattern is None and (structure := report.get("structure")):
        if selection != Selection():
            raise AptError(
                f"{directory} is a smaller model: its sites have no pattern",
                "leave these options out, or give a pattern",
                ("only", "skip", "overrides"),
            )
        problems += verify_structure(skeleton, structure)
        return Verified(structure=structure, problems=tuple(problems))
    try:
        distributed = pattern is not None and _distributed(report, pattern)
        if distributed:
            notice("the run distributed this sparsity over the sites: see its report")
        if pattern is None or distributed:
            expected = expected_by_report(skeleton, report, selection, notice)
            expected = replace(expected, zeros={}) if run.at_least else expected
        else:
            expected = expected_by_pattern(
                skeleton, report, pattern, selection, notice, at_least=run.at_least
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fault = f"the report in {directory} is damaged: {described(error)}"
        raise AptError(fault, *_GIVE_PATTERN) from error
    verdicts = count_zeros(skeleton, directory, expected, packed=method == METHOD)
    return Verified(expected.pattern, tuple(verdicts), problems=(*problems, *expected.problems))


def _distributed(report: Mapping[str, Any], pattern: Pattern) -> bool:
    """True if a pattern is that of a run that gave each site a sparsity of its own."""
    options = _options(report) if report else {}
    allocated = str(options.get("allocation") or UNIFORM) != UNIFORM
    return allocated and pattern.per is None and str(options.get("pattern")) == str(pattern)


def _changed(directory: Path, report: Mapping[str, Any], notice: Notice) -> list[str]:
    """The files that differ from their hashes in the report, as faults.

    A model card may be edited: that is a notice.
    """
    changed = changed_files(directory, listed_files(report))
    if CARD in changed:
        notice(f"{CARD} was changed or removed since it was written")
    files = [name for name in changed if name != CARD]
    return [f"{name} was changed or removed since it was written" for name in files]


@dataclass(frozen=True)
class Expected:
    """The patterns that the sites must meet, and the exact numbers of their zeros.

    Attributes:
        pattern: the pattern of the run, or the given one, as text.
        plan: the pattern of each site.
        zeros: the number of zeros of each site, by name; empty if more zeros are accepted.
        problems: the differences between what was asked for and what the report says.
    """

    pattern: str
    plan: Plan
    zeros: Mapping[str, int]
    problems: tuple[str, ...] = ()


def count_zeros(
    skeleton: Opened, directory: Path, expected: Expected, *, packed: bool
) -> Iterator[Verdict]:
    """Count the zeros of all sites, block by block if the checkpoint can be read so.

    If the model is packed, rounding may have made more zeros.
    """
    plan, exact = expected.plan, {} if packed else expected.zeros
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
) -> Expected:
    """What a given pattern asks for.

    The sites that the report lists as left dense are not counted. A site may have the zeros that
    the report says if its pattern there is the given one: weights that were zero in the dense model
    and that were kept, and weights that were rounded to zero.
    """
    if dense := _dense(report):
        notice(f"left dense: {', '.join(dense)}")
        selection = replace(selection, skip=(*selection.skip, *dense))
    plan = make_plan(skeleton.module, skeleton.adapter, pattern, selection, _per(report))
    check_rounding(plan, notice, quantized=True)
    recorded = {site["name"]: site for site in _sites(report)} if report.get("sites") else {}
    zeros = {
        site.name: _zeros(site, recorded.get(site.name))
        for block in plan.blocks
        for site in block.pruned
    }
    return Expected(str(pattern), plan, {} if at_least else zeros)


def _zeros(site: PlannedSite, record: Mapping[str, Any] | None) -> int:
    """The number of zeros that a site must have."""
    if record is not None and str(record["pattern"]) == str(site.pattern):
        return int(record["zeros"])
    return removed_by(site.pattern, site.shape)


def expected_by_report(
    skeleton: Opened, report: Mapping[str, Any], selection: Selection, notice: Notice
) -> Expected:
    """What the options of the run asked for, and the zeros that its report says.

    A selection has the sites to check, and patterns to expect in place of those of the run.

    Raises:
        AptError: there is no report of a run, or it is damaged; or a glob matches no site.
    """
    pattern = _options(report).get("pattern")
    records = {str(site["name"]): site for site in _sites(report)}
    if dense := _dense(report):
        notice(f"left dense: {', '.join(dense)}")
    asked = _asked(skeleton, report)
    allocated = _allocated(asked, report)
    plan = Plan(tuple(_with_records(b, records, allocated, dense) for b in asked.blocks))
    problems = [*_unlike(plan, records), *_wrong_total(asked, plan, allocated)]
    check_globs(plan, selection)
    plan = Plan(tuple(_selected(block, selection) for block in plan.blocks))
    known = {} if report.get("recovery") else records  # a training may move or add zeros
    zeros = {
        entry.name: int(known[entry.name]["zeros"])
        for block in plan.blocks
        for entry in block.targets
        if entry.name in known and str(entry.pattern) == str(known[entry.name]["pattern"])
    }
    return Expected(str(pattern), plan, zeros, tuple(problems))


def _asked(skeleton: Opened, report: Mapping[str, Any]) -> Plan:
    """The plan of a run, before its allocation."""
    options = _options(report)
    only, skip = (tuple(options.get(name) or ()) for name in ("only", "skip"))
    overrides = tuple((options.get("overrides") or {}).items())
    return make_plan(
        skeleton.module,
        skeleton.adapter,
        read_pattern(str(options.get("pattern"))),
        Selection(only, skip, overrides),
        _per(report),
        [str(kind) for kind in options.get("also") or ()],
    )


def _per(report: Mapping[str, Any]) -> Granularity:
    return "row" if _options(report).get("per") == "row" else "layer"


def _allocated(asked: Plan, report: Mapping[str, Any]) -> set[str]:
    """The names of the sites whose sparsity an allocation chose."""
    name = str(_options(report).get("allocation") or UNIFORM)
    return {site.name for site in unstructured(asked)} if is_needed(name, asked) else set()


def _with_records(
    block: PlannedBlock,
    records: Mapping[str, Any],
    allocated: Collection[str],
    dense: Collection[str],
) -> PlannedBlock:
    """The block with the patterns of the report for the sites that an allocation served.

    An allocation of n:m may leave a site dense.
    """
    served = [site for site in block.pruned if site.name in allocated]
    counted: dict[str, SitePattern | None] = {
        s.site.name: _recorded(s, records[s.name]) for s in served if s.name in records
    }
    left = {site.site.name: None for site in served if site.name in dense}
    return block.with_patterns(counted | left)


def _recorded(site: PlannedSite, record: Mapping[str, Any]) -> Pattern:
    """The pattern of a site in the report, counted as the run counted it."""
    pattern = read_pattern(str(record["pattern"]))
    return pattern.counted((site.pattern and site.pattern.per) or "layer")


def _unlike(plan: Plan, records: Mapping[str, Any]) -> Iterator[str]:
    """The sites whose pattern in the report is not the one that was asked for."""
    for block in plan.blocks:
        for entry in block.targets:
            recorded = records[entry.name]["pattern"] if entry.name in records else "nothing"
            if str(entry.pattern) != str(recorded):
                yield f"{entry.name}: {entry.pattern} was asked for, and the report has {recorded}"


def _wrong_total(asked: Plan, plan: Plan, allocated: Collection[str]) -> Iterator[str]:
    """A line if an allocation did not keep the total."""
    sites = [site for site in asked.sites if site.name in allocated]
    wanted = sum(Unstructured(sparsity_of(site)).count(site.size) for site in sites)
    total = sum(removed_by(s.pattern, s.shape) for s in plan.sites if s.name in allocated)
    if abs(total - wanted) > max(map(step_of, sites), default=0):
        yield f"the patterns in the report remove {total:,} weights, and {wanted:,} were asked for"


def _selected(block: PlannedBlock, selection: Selection) -> PlannedBlock:
    """The block with those sites that a selection does not leave out, and its patterns."""

    def pattern(entry: PlannedSite) -> SitePattern | None:
        if entry.pattern is None or selection.pattern(entry.name, _ANY) is None:
            return None
        chosen = selection.override(entry.name)
        return entry.pattern if chosen is None else chosen.counted("layer")

    sites = tuple(entry.with_pattern(pattern(entry)) for entry in block.sites)
    extras = tuple(e for e in block.extras if selection.pattern(e.name, _ANY) is not None)
    return replace(block, sites=sites, extras=extras)


_ANY = Unstructured(0.5)  # the default of a selection, which is not used


def _options(report: Mapping[str, Any]) -> dict[str, Any]:
    options = report.get("options")
    return options if isinstance(options, dict) else {}


def _dense(report: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in report.get("skipped") or ()]


def _sites(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of the sites.

    Raises:
        AptError: there are none, or they are damaged.
    """
    if not report.get("sites") or not _options(report).get("pattern"):
        raise _no_pattern()
    sites = report["sites"]
    needed = {"name", "pattern", "zeros"}
    if not isinstance(sites, list) or not all(
        isinstance(site, dict) and needed <= site.keys() for site in sites
    ):
        raise AptError("the report's sites are damaged", *_GIVE_PATTERN)
    return sites


def _no_pattern() -> AptError:
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
        said = {str(kind): int(entry["kept"]) for kind, entry in structure["groups"].items()}
        said["blocks"] = int(structure["blocks"]["kept"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AptError("the report's structure is damaged", "delete the report") from error
    # A smaller model may have fewer kinds of groups, see `group_counts`.
    return [f"{counted[k]} {k}, not {n}" for k, n in said.items() if counted.get(k, n) != n]
