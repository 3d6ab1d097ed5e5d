"""A plan as a table, or as JSON."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

from apt.adapter import DecoderAdapter, Site
from apt.checkpoints.towers import towers_of
from apt.cli.output import duration, say, show, show_json, size, table
from apt.engine.costs import PlannedRun
from apt.engine.estimate import estimate
from apt.options import Activations
from apt.planning.plan import Plan

_Row = tuple[Site, tuple[int, int], str]


def show_plan(planned: PlannedRun, *, as_json: bool) -> None:
    """Print a plan, with the memory and time that it needs."""
    if as_json:
        show_json(_record(planned))
    else:
        _show_outline(planned)
        _show_sites(planned.plan)
        _show_needs(planned)


def _record(planned: PlannedRun) -> dict[str, Any]:
    skeleton, needs = planned.skeleton, estimate(planned)
    return {
        "model": skeleton.source.reference,
        "class": type(skeleton.module).__name__,
        "adapter": skeleton.spec.name,
        "parameters": planned.parameters,
        "active_parameters": planned.active_parameters,
        "stacks": _stacks(planned),
        "blocks": [block.name for block in planned.plan.blocks],
        "groups": _groups(planned),
        "sites": [
            {
                "name": site.name,
                "shape": list(site.shape),
                "input": site.site.input,
                "residual": site.site.residual,
                "pattern": str(site.pattern) if site.pattern else None,
            }
            for site in planned.plan.sites
        ],
        "samples": planned.samples,
        "seqlen": planned.options.seqlen,
        "device": planned.device,
        "needs": {**asdict(needs), "memory": needs.memory},
        "seconds": _seconds(planned),
    }


def _seconds(planned: PlannedRun) -> dict[str, dict[str, float]]:
    """The seconds of each step, by effort."""
    if not planned.efforts:
        return {}
    machine = planned.machine
    return {
        effort: {step: machine.seconds(part) for step, part in planned.steps(effort).items()}
        for effort in planned.efforts
    }


def _show_outline(planned: PlannedRun) -> None:
    skeleton, plan = planned.skeleton, planned.plan
    in_sites = sum(site.size for site in plan.sites)
    active = planned.active_parameters
    active_part = f" ({active:,} for a token)" if active < planned.parameters else ""
    say(
        f"{skeleton.source.reference}: {type(skeleton.module).__name__}, adapter "
        f"{skeleton.spec.name}, {planned.parameters:,} parameters{active_part}, {in_sites:,} of "
        f"them in {len(plan.sites)} sites of {len(plan.blocks)} blocks; + marks outputs that are "
        "added to the residual stream"
    )
    if len(stacks := _stacks(planned)) > 1:
        say(f"stacks, for apt-prune prune --stack: {', '.join(stacks)}")
    if groups := _groups(planned):
        counts = ", ".join(f"{count} {kind}" for kind, count in groups.items())
        say(f"groups in a block, for apt-prune shrink: {counts}")
    for site, reason in _ungrouped(planned).items():
        say(f"no groups for apt-prune shrink: {site}, since {reason}")


def _stacks(planned: PlannedRun) -> list[str]:
    """The names of the stacks, with those of the towers of a multimodal model."""
    adapter, module = planned.skeleton.adapter, planned.skeleton.module
    return [*(name for name, _ in adapter.stacks(module)), *towers_of(module)]


def _groups(planned: PlannedRun) -> dict[str, int]:
    """The number of groups of each kind in a block, which `apt-prune shrink` can remove."""
    adapter, module = planned.skeleton.adapter, planned.skeleton.module
    return {
        groups.kind: groups.count
        for _, block in adapter.blocks(module)
        for groups in adapter.groups(block, planned.skeleton.config)
    }


def _ungrouped(planned: PlannedRun) -> dict[str, str]:
    """The sites whose inputs are no groups, with the reason from the adapter."""
    adapter, module = planned.skeleton.adapter, planned.skeleton.module
    if not isinstance(adapter, DecoderAdapter):
        return {}
    return {
        site: reason
        for _, block in adapter.blocks(module)
        for site, reason in adapter.ungrouped(block, planned.skeleton.config).items()
    }


def _show_sites(plan: Plan) -> None:
    """Print a table of sites. Consecutive equal blocks share their lines."""
    site_table = table("blocks", "site", ">out", ">in", "input", "pattern")
    names = [block.name for block in plan.blocks]
    site_rows = [
        [(s.site, s.shape, str(s.pattern or "dense")) for s in block.sites] for block in plan.blocks
    ]
    for rows, group in groupby(range(len(names)), key=lambda index: site_rows[index]):
        indices = list(group)
        label = names[indices[0]]
        if len(indices) > 1:
            label += f" … {names[indices[-1]].rpartition('.')[2]}"
        for (kind, (rows_out, width), pattern), sites in _group_rows(rows):
            example, suffix = sites[0], f" × {len(sites)}" if len(sites) > 1 else ""
            input_name = example.input if len(sites) == 1 else "each its own"
            name = kind + "+" * example.residual + suffix
            site_table.add_row(label, name, str(rows_out), str(width), input_name, pattern)
            label = ""
    show(site_table)


def _group_rows(rows: list[_Row]) -> Iterable[tuple[tuple[str, tuple[int, int], str], list[Site]]]:
    """Sites by kind, shape and pattern: the experts of a stack share a line."""
    groups: dict[tuple[str, tuple[int, int], str], list[Site]] = {}
    for site, shape, pattern in rows:
        groups.setdefault((site.kind, shape, pattern), []).append(site)
    return groups.items()


def _show_needs(planned: PlannedRun) -> None:
    needs = estimate(planned)
    disk = f", {size(needs.disk)} of disk" if planned.options.activations == "disk" else ""
    say(
        f"calibration {_calibration(planned)}: about "
        f"{size(needs.memory)} of memory (process {size(needs.process)}, "
        f"weights {size(needs.weights)}, "
        f"activations {size(needs.activations)}, Gram matrices {size(needs.grams)}, "
        f"working {size(needs.working)}; while it is measured, weights and "
        f"{size(needs.predicting)}){disk}"
    )
    if planned.on:
        say(f"{planned.on}: {_memory_fit(planned, planned.machine.memory)}")
    if planned.efforts:
        machine = planned.machine
        times = (f"{e} {duration(planned.seconds(e, machine))}" for e in planned.efforts)
        where = f"on {planned.on or planned.device}"
        remark = "" if machine.measured else " (40 % of its maker's figures; not measured)"
        say(f"time by effort, error-aware, {where}: about {', '.join(times)}{remark}")


def _calibration(planned: PlannedRun) -> str:
    """The size of the calibration in words."""
    length, reads = planned.options.seqlen, planned.skeleton.reads
    if reads.windows:
        return f"{planned.samples} × {length} tokens"
    if reads.words == "texts":
        return f"{planned.samples} texts of at most {length} tokens"
    return f"{planned.samples} samples, each as {length} tokens"


def _memory_fit(planned: PlannedRun, memory: int) -> str:
    """The memory needed on an accelerator, and flags with which a run fits."""
    needed = _device_memory(planned)
    need = f"{size(needed)} of its {size(memory)} of memory"
    if needed <= memory:
        return need
    options, all_flags = planned.options, "--stream --activations cpu --effort fast"
    alternatives: dict[str, tuple[bool, Activations, bool]] = {
        "--activations cpu": (options.stream, "cpu", True),
        "--stream": (True, options.activations, True),
        "--stream --activations cpu": (True, "cpu", True), all_flags: (True, "cpu", False),
    }  # fmt: skip
    for flags, (streamed, activations, tuned) in alternatives.items():
        changed = replace(options, stream=streamed, activations=activations)
        norms = None if streamed else planned.norms
        needed = _device_memory(replace(planned, options=changed, tuned=tuned, norms=norms))
        if needed <= memory:
            return f"{need}; {size(needed)} with {flags}"
    return f"{need}; even with {all_flags} {size(needed)}"


def _device_memory(planned: PlannedRun) -> int:
    """The peak memory of the accelerator: it does not keep activations that are beside it."""
    place: Activations = "memory" if planned.options.activations == "memory" else "disk"
    return estimate(replace(planned, options=replace(planned.options, activations=place))).on_device
