"""``apt-prune reapply``."""

from apt.options import PrintingOptions, ReapplyRun


def reapply(run: ReapplyRun, printing: PrintingOptions) -> None:
    """Set the weights to zero again that a fine-tuning has filled.

    For example: apt-prune reapply ./pruned ./fine-tuned --output ./sparse
    """
    from apt.cli.opening import run_request

    request, _ = run_request(run)

    from apt.cli.output import notice, say, show_json
    from apt.cli.progress import Progress
    from apt.distributed.ranks import Ranks
    from apt.engine.run import Watcher, drive

    with Progress("reapplying the masks"):
        report = drive(request, Watcher(notice=notice), Ranks())
    assert report is not None
    record = report.reapplied
    if printing.as_json:
        names = ("weights", "share", "sparsity", "parameters", "permuted")
        show_json({"output": str(run.output), **{name: record[name] for name in names}})
        return
    if record["permuted"]:
        say("the channels and values of MODEL now have the order of the pruned model")
    say(
        f"{run.output}: {record['weights']:,} weights set to zero again ({record['share']:.2%} of "
        f"the sum of squares); {record['sparsity']:.2%} zeros in {record['parameters']} matrices, "
        "verified on disk"
    )
