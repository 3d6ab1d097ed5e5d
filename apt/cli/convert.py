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

    from apt.checkpoint import check_output, save_model, whole_directory
    from apt.cli.output import err, notice, out
    from apt.models import find, load, load_tokenizer, skeleton
    from apt.plugins import registry
    from apt.report import FILE
    from apt.run import read_dtype

    check_output(output, overwrite)
    source = find(model, registry(), trust_remote_code=trust_remote_code)
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
        with whole_directory(output) as directory:
            save_model(loaded.module, found, directory)
            if (report := Path(source.location) / FILE).is_file():
                copyfile(report, directory / FILE)
    out.print(f"{output}: {type(loaded.module).__name__}", markup=False)
