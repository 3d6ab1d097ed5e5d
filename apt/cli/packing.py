"""``apt-prune pack`` and ``apt-prune unpack``."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from apt.cli import arguments as args
from apt.cli import run_arguments as run
from apt.engine.limits import check_integers, read_group
from apt.errors import AptError
from apt.locations.hub import Hub

if TYPE_CHECKING:
    from apt.engine.options import RunOptions
    from apt.locations.model_source import Source
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
    group: str = typer.Option(
        "128",
        "--group",
        metavar="N|row",
        help="Columns that share a scale with --quantize, or row for one scale a row.",
    ),
    form: str = typer.Option(
        "apt",
        "--format",
        metavar="NAME",
        help="apt leaves the zeros out. compressed-tensors keeps them, as integers that vLLM and "
        "transformers open; it needs --quantize, or a model that was pruned with it.",
    ),
    overwrite: bool = run.OVERWRITE,
    adapter: str | None = args.ADAPTER,
    trust_remote_code: bool = args.REMOTE,
    revision: str | None = args.REVISION,
    token: str | None = args.TOKEN,
    cache_dir: str | None = args.CACHE_DIR,
    as_json: bool = args.JSON,
) -> None:
    """Write a pruned model without its zeros: smaller on disk and in memory.

    Programs open it with apt.runtime.load. For example: apt-prune pack ./pruned --output ./packed
    """
    columns = read_group(group)
    check_integers(quantize, columns)
    from apt.cli.output import notice, out, show_json
    from apt.cli.progress import Progress
    from apt.engine.packing import FORMATS, pack_model
    from apt.packing.directory import Rounding
    from apt.plugin.registry import registry

    if form not in FORMATS:
        raise AptError(f"--format {form} is not one of {', '.join(FORMATS)}")

    hub = args.read_hub(revision, token, cache_dir)
    source = args.find_model(model, registry(), hub, trust_remote_code=trust_remote_code)
    with Progress("packing"):
        rounding = Rounding(quantize, columns) if quantize else None
        done = pack_model(
            source, output, registry(), notice,
            adapter=adapter, rounding=rounding, form=form, overwrite=overwrite,
        )  # fmt: skip
    if as_json:
        show_json({"output": str(output), **vars(done)})
    else:
        out.print(_summary(output, done), markup=False)


def _summary(output: Path, done: "Packed") -> str:
    share, error = f"{done.packed_bytes / done.dense_bytes:.1%}", ""
    if done.bound_bytes not in (0, done.packed_bytes):  # 0 if all weights are zeros
        above = done.packed_bytes / done.bound_bytes - 1
        share += f"; {abs(above):.2%} {'above' if above > 0 else 'below'} the entropy"
    if done.relative_error:
        error = f"relative rounding error {done.relative_error:.2e}, "
    return (
        f"{output}: {done.matrices} matrices, {done.packed_bytes:,} of {done.dense_bytes:,} bytes "
        f"({share}), {done.total_bytes:,} bytes with the other "
        f"tensors, {error}verified on disk"
    )


def check_packed_place(pack: Path, options: "RunOptions", source: "Source") -> None:
    """Raise if the packed model of a run cannot be written, before the run.

    Args:
        pack: the directory to write.
        options: the options of the run.
        source: the model of the run.

    Raises:
        AptError: the directory is that of the pruned model or of an input, is inside one or
            contains one, or it exists.
    """
    from apt.engine.prepare import input_paths
    from apt.output.location import check_output

    place, output = pack.resolve(), options.output.resolve()
    if place.is_relative_to(output) or output.is_relative_to(place):
        raise AptError(
            f"--pack {pack} is the output itself, inside it or around it",
            "choose another directory",
        )
    texts = (options.calibration, options.evaluation, options.tokenizer)
    check_output(pack, options.overwrite, input_paths(source, texts))


def pack_output(pack: Path, options: "RunOptions") -> None:
    """Write the packed form of a run's output, and print a line about it.

    It is written by the first rank alone.
    """
    from apt.cli.output import notice
    from apt.cli.progress import Progress
    from apt.distributed.launch import whole_number
    from apt.engine.packing import pack_model
    from apt.plugin.registry import registry

    if whole_number("WORLD_SIZE", 1) > 1 and whole_number("RANK", 0):
        return
    remote = options.trust_remote_code
    source = args.find_model(str(options.output), registry(), Hub(), trust_remote_code=remote)
    with Progress("packing"):
        done = pack_model(
            source, pack, registry(), notice, adapter=options.adapter, overwrite=options.overwrite
        )
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
    from apt.cli.output import notice, out, show_json
    from apt.cli.progress import Progress
    from apt.engine.packing import unpack_model
    from apt.plugin.registry import registry

    source = args.find_model(str(model), registry(), Hub())
    with Progress("unpacking"):
        count = unpack_model(source, output, notice, overwrite=overwrite)
    if as_json:
        show_json({"output": str(output), "matrices": count})
    else:
        out.print(f"{output}: {count} matrices unpacked", markup=False)
