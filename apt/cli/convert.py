"""``apt-prune convert``."""

from pathlib import Path

from apt.errors import AptError
from apt.options import ConvertRun, PrintingOptions


def convert(run: ConvertRun, printing: PrintingOptions) -> None:
    """Convert a model to the format of transformers.

    For example: apt-prune convert ./mamba-130m-pruned --output ./mamba-130m-pruned-hf
    """
    from apt.cli.opening import find_model
    from apt.engine.opening import check_directory_name
    from apt.plugin.registry import registry

    check_directory_name(run.output, registry())
    source = find_model(run.model, run)

    from apt.checkpoints.copies import keep_side_files, save_model
    from apt.checkpoints.load import load, load_tokenizer, open_skeleton
    from apt.checkpoints.stored import local_directory
    from apt.cli.output import notice, say, show_json
    from apt.cli.progress import Progress
    from apt.engine.machine import read_dtype
    from apt.engine.prepare import check_place
    from apt.output.report import carry_report
    from apt.output.staging import staged_directory, write_errors

    check_place(run, source, (run.tokenizer,), notice)
    skeleton = open_skeleton(source, registry(), expanded=source.gguf is None)
    try:
        tokenizer = load_tokenizer(source, run.tokenizer)
    except AptError as error:
        if run.tokenizer is not None:
            raise
        notice(f"without a tokenizer: {error.message}")
        tokenizer = None
    with Progress("converting"):
        loaded = load(skeleton, read_dtype(run.dtype))
        with staged_directory(run.output, run.overwrite) as work, write_errors(run.output):
            save_model(loaded.module, tokenizer, work.out)
            if not source.gguf:
                keep_side_files(local_directory(loaded), work.out)
            carry_report(Path(source.location), work.out, source.reference)
    kind = type(loaded.module).__name__
    if printing.as_json:
        show_json({"output": str(run.output), "class": kind, "tokenizer": tokenizer is not None})
    else:
        say(f"{run.output}: {kind}")
