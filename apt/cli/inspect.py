"""``apt-prune inspect``."""

import typer

from apt.cli import arguments as args
from apt.engine.limits import check_activations, check_windows


def inspect(
    model: str = typer.Argument(help="Directory, hub name, .gguf file or zoo:NAME."),
    adapter: str | None = args.ADAPTER,
    sparsity: str | None = args.SPARSITY,
    pattern: str | None = args.PATTERN,
    only: list[str] | None = args.ONLY,
    skip: list[str] | None = args.SKIP,
    override: list[str] | None = args.OVERRIDE,
    samples: int = typer.Option(128, "--samples", help="Calibration samples of the planned run."),
    seqlen: int = typer.Option(2048, "--seqlen", help="Tokens of a sample in the planned run."),
    device: str = args.DEVICE,
    stream: bool = typer.Option(False, "--stream", help="Plan a run that streams block by block."),
    activations: str = args.ACTIVATIONS,
    as_json: bool = args.JSON,
    trust_remote_code: bool = args.REMOTE,
    revision: str | None = args.REVISION,
    token: str | None = args.TOKEN,
    cache_dir: str | None = args.CACHE_DIR,
) -> None:
    """Show the blocks and sites of a model.

    Also shows the memory and time to prune it. No weights are read.
    """
    check_windows(samples, seqlen)
    check_activations(activations, streamed=stream)
    args.check_pattern_options(sparsity, pattern, None)
    from apt.cli.output import notice
    from apt.plugin.registry import registry

    hub = args.read_hub(revision, token, cache_dir)
    source = args.find_model(model, registry(), hub, trust_remote_code=trust_remote_code)

    from apt.checkpoints.load import skeleton
    from apt.cli.plan import Planned, show_plan
    from apt.engine.machine import choose_device
    from apt.engine.prepare import capped
    from apt.engine.prune_options import PruneOptions
    from apt.planning.plan import check_rounding, make_plan

    wanted = args.read_pattern(sparsity, pattern, None) or args.parse("2:4")
    device, on_disk = choose_device(device), activations == "disk"
    shell = skeleton(source, registry(), adapter)
    selection = args.read_selection(only, skip, override)
    plan = make_plan(shell.module, shell.adapter, wanted, selection)
    seqlen = capped(seqlen, shell, notice)
    check_rounding(plan, notice)
    usual = PruneOptions().augmentation(registry().default_method(), samples)
    count = usual.samples(samples, seqlen)
    planned = Planned(shell, plan, count, seqlen, device, streamed=stream, on_disk=on_disk)
    show_plan(planned, as_json=as_json)
