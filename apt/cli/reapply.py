"""``apt-prune reapply``."""

from pathlib import Path

import typer

from apt.cli import arguments as args
from apt.cli import run_arguments as run
from apt.engine.limits import check_shard_size


def reapply(
    masks: Path = typer.Argument(
        help="A file of masks, written with --save-masks, or the directory of a pruned model."
    ),
    model: str = typer.Argument(
        help="The model that was fine-tuned from the pruned one: a directory or hub name."
    ),
    output: Path = args.WRITTEN,
    overwrite: bool = run.OVERWRITE,
    max_shard_size: str | None = run.MAX_SHARD_SIZE,
    adapter: str | None = args.ADAPTER,
    trust_remote_code: bool = args.REMOTE,
    revision: str | None = args.REVISION,
    token: str | None = args.TOKEN,
    cache_dir: str | None = args.CACHE_DIR,
    as_json: bool = args.JSON,
) -> None:
    """Set the weights to zero again that a fine-tuning has filled.

    For example: apt-prune reapply ./pruned ./fine-tuned --output ./sparse
    """
    check_shard_size(max_shard_size)
    from apt.plugin.registry import registry

    hub = args.read_hub(revision, token, cache_dir)
    args.find_model(model, registry(), hub, trust_remote_code=trust_remote_code)

    from apt.cli.output import notice, out, show_json
    from apt.cli.progress import Progress
    from apt.engine.reapply_task import ReapplyOptions
    from apt.engine.run import run as run_task

    options = ReapplyOptions(
        masks, model, output, adapter, overwrite, max_shard_size, trust_remote_code, hub
    )
    with Progress("reapplying the masks"):
        done = run_task(options, notice=notice).reapplied
    if as_json:
        names = ("weights", "share", "sparsity", "parameters")
        show_json({"output": str(output), **{name: done[name] for name in names}})
        return
    out.print(
        f"{output}: {done['weights']:,} weights set to zero again ({done['share']:.2%} of the sum "
        f"of squares); {done['sparsity']:.2%} zeros in {done['parameters']} matrices, verified on "
        "disk",
        markup=False,
    )
