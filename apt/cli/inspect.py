"""``apt inspect``."""

from typing import TYPE_CHECKING

import typer

from apt.cli import arguments as args

if TYPE_CHECKING:
    from collections.abc import Iterable

    from apt.adapter import Site
    from apt.models import Model
    from apt.plan import Plan

    Row = tuple[Site, tuple[int, int], str]


def inspect(
    model: str = typer.Argument(help="Directory, hub name, .gguf file or zoo:NAME."),
    adapter: str | None = args.ADAPTER,
    sparsity: str | None = args.SPARSITY,
    pattern: str | None = args.PATTERN,
    only: list[str] | None = args.ONLY,
    skip: list[str] | None = args.SKIP,
    override: list[str] | None = args.OVERRIDE,
    samples: int = typer.Option(128, "--samples", help="Calibration samples to plan for."),
    seqlen: int = typer.Option(2048, "--seqlen", help="Tokens a sample to plan for."),
    device: str = args.DEVICE,
    stream: bool = typer.Option(False, "--stream", help="Plan for a run block by block."),
    activations: str = args.ACTIVATIONS,
    trust_remote_code: bool = args.REMOTE,
) -> None:
    """Show a model's blocks and sites, and what pruning it will need; reads no weights."""
    from apt.cli.output import notice
    from apt.models import find, skeleton
    from apt.plan import make_plan
    from apt.plugins import registry
    from apt.run import capped, check_activations, choose_device

    check_activations(activations, streamed=stream)

    source = find(model, registry(), trust_remote_code=trust_remote_code)
    shell = skeleton(source, registry(), adapter)
    wanted = args.read_pattern(sparsity, pattern, None) or args.parse("2:4")
    selection = args.read_selection(only, skip, override)
    plan = make_plan(shell.module, shell.adapter, wanted, selection)
    seqlen = capped(seqlen, shell, notice)
    device, on_disk = choose_device(device), activations == "disk"
    show_plan(shell, plan, samples, seqlen, device, streamed=stream, on_disk=on_disk)


def show_plan(
    shell: "Model",
    plan: "Plan",
    samples: int,
    seqlen: int,
    device: str,
    *,
    streamed: bool,
    on_disk: bool,
    writing: bool = False,
) -> None:
    """The sites of equal blocks in one table, and the estimate."""
    from itertools import groupby

    from apt.cli.output import duration, out, size, table
    from apt.estimate import estimate

    parameters = sum(p.numel() for p in shell.module.parameters())
    in_sites = sum(site.size for site in plan.sites)
    out.print(
        f"{shell.source.reference}: {type(shell.module).__name__}, adapter {shell.spec.name}, "
        f"{parameters:,} parameters, {in_sites:,} of them in {len(plan.sites)} sites of "
        f"{len(plan.blocks)} blocks; + marks what is added to the residual stream",
        markup=False,
    )
    made = table("blocks", "site", ">out", ">in", "input", "pattern")
    names = [block.name for block in plan.blocks]
    likeness = [
        [(s.site, s.shape, str(s.pattern or "dense")) for s in block.sites] for block in plan.blocks
    ]
    for rows, group in groupby(range(len(names)), key=lambda index: likeness[index]):
        indices = list(group)
        label = names[indices[0]]
        if len(indices) > 1:
            label += f" … {names[indices[-1]].rpartition('.')[2]}"
        for (kind, (rows_out, width), pattern), alike in _alike(rows):
            first, more = alike[0], f" × {len(alike)}" if len(alike) > 1 else ""
            given = first.input if len(alike) == 1 else "each its own"
            name = kind + "+" * first.residual + more
            made.add_row(label, name, str(rows_out), str(width), given, pattern)
            label = ""
    out.print(made)
    where = {"streamed": streamed, "on_disk": on_disk, "writing": writing}
    needs = estimate(shell, plan, samples, seqlen, shell.dtype, device, **where)
    disk = f", {size(needs.disk)} of disk" if on_disk else ""
    out.print(
        f"calibration {samples} × {seqlen} tokens: about {size(needs.memory)} of memory "
        f"(process {size(needs.process)}, weights {size(needs.weights)}, "
        f"activations {size(needs.activations)}, Gram matrices {size(needs.grams)}, "
        f"working {size(needs.working)}; or, while it is measured, weights and "
        f"{size(needs.predicting)}){disk} and at least {duration(needs.seconds)} on {device}",
        markup=False,
    )


def _alike(rows: "list[Row]") -> "Iterable[tuple[tuple[str, tuple[int, int], str], list[Site]]]":
    """Sites by kind, shape and pattern: experts of a stack take one line together."""
    groups: dict[tuple[str, tuple[int, int], str], list[Site]] = {}
    for site, shape, pattern in rows:
        groups.setdefault((site.kind, shape, pattern), []).append(site)
    return groups.items()
