"""``apt-prune pack`` and ``apt-prune unpack``."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from apt.cli import arguments as args
from apt.cli import run_arguments as run
from apt.errors import AptError
from apt.locations.hub import Hub
from apt.runs.limits import check_integers

if TYPE_CHECKING:
    from apt.packing.directory import Packed

_OUTPUT = typer.Option(..., "--output", "-o", help="Directory to write.")


def pack(
    model: str = typer.Argument(help="A pruned model: a directory or hub name."),
    output: Path = _OUTPUT,
    quantize: str | None = typer.Option(
        None,
        "--quantize",
        metavar="KIND",
        help="Round the kept weights to the nearest int8 or int4.",
    ),
    group: int = typer.Option(
        128, "--group", metavar="N", help="Columns that share a scale with --quantize."
    ),
    form: str = typer.Option(
        "apt",
        "--format",
        metavar="NAME",
        help="apt leaves the zeros out. compressed-tensors keeps them, as integers that vLLM and "
        "transformers open; it needs --quantize, or a model that was pruned with it.",
    ),
    overwrite: bool = run.OVERWRITE,
    trust_remote_code: bool = args.REMOTE,
    revision: str | None = args.REVISION,
    token: str | None = args.TOKEN,
    cache_dir: str | None = args.CACHE_DIR,
    as_json: bool = args.JSON,
) -> None:
    """Write a pruned model without its zeros: smaller on disk and in memory.

    Programs open it with apt.runtime.load. For example: apt-prune pack ./pruned --output ./packed
    """
    check_integers(quantize, group)
    from apt.cli.output import notice, out, show_json, status_line
    from apt.packing.directory import Rounding
    from apt.plugin.registry import registry
    from apt.runs.packing import FORMATS, pack_model

    if form not in FORMATS:
        raise AptError(f"--format {form} is not one of {', '.join(FORMATS)}")

    hub = args.read_hub(revision, token, cache_dir)
    source = args.find_model(model, registry(), hub, trust_remote_code=trust_remote_code)
    with status_line("packing"):
        rounding = Rounding(quantize, group) if quantize else None
        done = pack_model(
            source, output, registry(), notice,
            rounding=rounding, form=form, overwrite=overwrite,
        )  # fmt: skip
    if as_json:
        show_json({"output": str(output), **vars(done)})
    else:
        out.print(_summary(output, done), markup=False)


def _summary(output: Path, done: "Packed") -> str:
    share, error = f"{done.packed_bytes / done.dense_bytes:.1%}", ""
    if done.packed_bytes != done.bound_bytes:
        above = done.packed_bytes / done.bound_bytes - 1
        share += f"; {abs(above):.2%} {'above' if above > 0 else 'below'} the entropy"
    if done.relative_error:
        error = f"relative rounding error {done.relative_error:.2e}, "
    return (
        f"{output}: {done.matrices} matrices, {done.packed_bytes:,} of {done.dense_bytes:,} bytes "
        f"({share}), {done.total_bytes:,} bytes with the other "
        f"tensors, {error}verified on disk"
    )


def check_packed_place(pack: Path, output: Path, *, overwrite: bool) -> None:
    """Raise if the packed model of a run cannot be written, before the run.

    Raises:
        AptError: the directory is that of the pruned model, or exists.
    """
    from apt.output.location import check_output

    if pack.resolve() == Path(output).resolve():
        raise AptError(f"--pack {pack} is the output itself", "choose another directory")
    check_output(pack, overwrite, [])


def pack_output(output: Path, pack: Path, *, overwrite: bool) -> None:
    """Write the packed form of a run's output, and print a line about it."""
    from apt.cli.output import notice, status_line
    from apt.plugin.registry import registry
    from apt.runs.packing import pack_model

    source = args.find_model(str(output), registry(), Hub())
    with status_line("packing"):
        done = pack_model(source, pack, registry(), notice, overwrite=overwrite)
    notice(_summary(pack, done))


def unpack(
    model: Path = typer.Argument(help="A directory that apt-prune pack wrote."),
    output: Path = _OUTPUT,
    overwrite: bool = run.OVERWRITE,
    as_json: bool = args.JSON,
) -> None:
    """Write a packed model as a dense one, for plain transformers and other tools.

    For example: apt-prune unpack ./packed --output ./pruned
    """
    from apt.cli.output import notice, out, show_json, status_line
    from apt.plugin.registry import registry
    from apt.runs.packing import unpack_model

    source = args.find_model(str(model), registry(), Hub())
    with status_line("unpacking"):
        count = unpack_model(source, output, notice, overwrite=overwrite)
    if as_json:
        show_json({"output": str(output), "matrices": count})
    else:
        out.print(f"{output}: {count} matrices unpacked", markup=False)
