"""``apt-prune pack`` and ``apt-prune unpack``."""

from pathlib import Path
from typing import TYPE_CHECKING

from apt.cli.opening import find_model
from apt.errors import AptError
from apt.options import PackRun, PrintingOptions, PruneRun, RemoteOptions, UnpackRun

if TYPE_CHECKING:
    from apt.packing.directory import Packed


def pack(run: PackRun, printing: PrintingOptions) -> None:
    """Write a pruned model without its zeros: smaller on disk and in memory.

    Programs open it with apt.runtime.load. For example: apt-prune pack ./pruned --output ./packed
    """
    source = find_model(run.model, run)

    from apt.cli.output import notice, out, show_json
    from apt.cli.progress import Progress
    from apt.engine.packing import pack_model
    from apt.packing.directory import Rounding
    from apt.plugin.registry import registry

    with Progress("packing"):
        rounding = Rounding(run.quantize, run.scale_group) if run.quantize else None
        done = pack_model(
            source, run.output, registry(), notice,
            adapter=run.adapter, rounding=rounding, form=run.form, overwrite=run.overwrite,
        )  # fmt: skip
    if printing.as_json:
        show_json({"output": str(run.output), **vars(done)})
    else:
        out.print(_summary(run.output, done), markup=False)


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


def check_packed_place(pack: Path, run: PruneRun) -> None:
    """Raise if the packed model of a run cannot be written, before the run.

    Raises:
        AptError: the directory is that of the pruned model or of an input, is inside one or
            contains one, or it exists.
    """
    from apt.engine.prepare import input_paths
    from apt.output.location import check_output

    place, output = pack.resolve(), run.directory.resolve()
    if place.is_relative_to(output) or output.is_relative_to(place):
        raise AptError(
            f"pack {pack} is the output itself, inside it or around it",
            "choose another directory",
            ("pack",),
        )
    texts = (run.calibration, run.evaluation, run.tokenizer)
    check_output(pack, run.overwrite, input_paths(find_model(run.model, run), texts))


def pack_output(pack: Path, run: PruneRun) -> None:
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
    remote = RemoteOptions(trust_remote_code=run.trust_remote_code)
    source = find_model(str(run.directory), remote)
    with Progress("packing"):
        done = pack_model(
            source, pack, registry(), notice, adapter=run.adapter, overwrite=run.overwrite
        )
    notice(_summary(pack, done))


def unpack(run: UnpackRun, printing: PrintingOptions) -> None:
    """Write a packed model as a dense one, for plain transformers and other tools.

    For example: apt-prune unpack ./packed --output ./pruned
    """
    from apt.cli.output import notice, out, show_json
    from apt.cli.progress import Progress
    from apt.engine.packing import unpack_model

    source = find_model(run.model, RemoteOptions())
    with Progress("unpacking"):
        count = unpack_model(source, run.output, notice, overwrite=run.overwrite)
    if printing.as_json:
        show_json({"output": str(run.output), "matrices": count})
    else:
        out.print(f"{run.output}: {count} matrices unpacked", markup=False)
