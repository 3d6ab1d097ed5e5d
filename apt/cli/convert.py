"""``apt-prune convert``."""

from pathlib import Path

import typer

from apt.cli import arguments as args
from apt.engine.limits import check_dtype
from apt.errors import AptError


def convert(
    model: str = typer.Argument(help="Directory, hub name, .gguf file or zoo:NAME."),
    output: Path = args.WRITTEN,
    tokenizer: str | None = args.TOKENIZER,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a non-empty output."),
    dtype: str = args.DTYPE,
    as_json: bool = args.JSON,
    trust_remote_code: bool = args.REMOTE,
    revision: str | None = args.REVISION,
    token: str | None = args.TOKEN,
    cache_dir: str | None = args.CACHE_DIR,
) -> None:
    """Convert a model to the format of transformers.

    For example: apt-prune convert ./mamba-130m-pruned --output ./mamba-130m-pruned-hf
    """
    check_dtype(dtype)

    from apt.cli.output import notice, out, show_json
    from apt.cli.progress import Progress
    from apt.plugin.registry import registry

    hub = args.read_hub(revision, token, cache_dir)
    source = args.find_model(model, registry(), hub, trust_remote_code=trust_remote_code)

    from apt.checkpoints.copies import keep_side_files, save_model
    from apt.checkpoints.load import load, load_tokenizer, skeleton
    from apt.checkpoints.stored import local_directory
    from apt.engine.machine import read_dtype
    from apt.output.location import check_output
    from apt.output.report import carry_report
    from apt.output.workplace import whole_directory, write_errors

    if lost := check_output(output, overwrite, source.files()):
        notice(f"replaces {lost}")
    shell = skeleton(source, registry())
    try:
        found = load_tokenizer(source, tokenizer)
    except AptError as error:
        if tokenizer is not None:
            raise
        notice(f"without a tokenizer: {error.message}")
        found = None
    with Progress("converting"):
        loaded = load(shell, read_dtype(dtype))
        with whole_directory(output, overwrite) as work, write_errors(output):
            save_model(loaded.module, found, work.out)
            if not source.gguf:
                keep_side_files(local_directory(loaded), work.out)
            carry_report(Path(source.location), work.out, source.reference)
    kind = type(loaded.module).__name__
    if as_json:
        show_json({"output": str(output), "class": kind, "tokenizer": found is not None})
    else:
        out.print(f"{output}: {kind}", markup=False)
