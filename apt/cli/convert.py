"""``apt convert``."""

from pathlib import Path

import typer

from apt.cli import arguments as args
from apt.errors import AptError


def convert(
    model: str = typer.Argument(help="Directory, hub name, .gguf file or zoo:NAME."),
    output: Path = typer.Option(..., "--output", "-o", help="Directory to write."),
    tokenizer: str | None = args.TOKENIZER,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a non-empty output."),
    dtype: str = args.DTYPE,
    trust_remote_code: bool = args.REMOTE,
) -> None:
    """Write a model in the format of transformers, whatever format it is read from.

    For example: apt convert ./mamba-130m-pruned --output ./mamba-130m-pruned-hf
    """
    from shutil import copyfile

    from apt.checkpoint import keep_side_files, save_model
    from apt.cli.output import err, notice, out
    from apt.models import find, load, load_tokenizer, skeleton
    from apt.outputs import check_output
    from apt.plugins import registry
    from apt.report import FILE
    from apt.run import read_dtype
    from apt.stored import local_directory
    from apt.workplace import whole_directory, writing

    source = find(model, registry(), trust_remote_code=trust_remote_code)
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
    with err.status("converting"):
        loaded = load(shell, read_dtype(dtype))
        with whole_directory(output, overwrite) as work, writing(output):
            save_model(loaded.module, found, work.out)
            if not source.gguf:
                keep_side_files(local_directory(loaded), work.out)
            if (report := Path(source.location) / FILE).is_file():
                copyfile(report, work.out / FILE)
    out.print(f"{output}: {type(loaded.module).__name__}", markup=False)
