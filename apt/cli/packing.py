"""``apt-prune pack`` and ``apt-prune unpack``."""

from pathlib import Path
from typing import TYPE_CHECKING

from apt.cli.opening import find_model
from apt.options import PackRun, PrintingOptions, RemoteOptions, UnpackRun

if TYPE_CHECKING:
    from apt.packing.directory import Packed


def pack(run: PackRun, printing: PrintingOptions) -> None:
    """Write a pruned model without its zeros: smaller on disk and in memory.

    Programs open it with apt.runtime.load. For example: apt-prune pack ./pruned --output ./packed
    """
    find_model(run.model, run)

    from apt.cli.output import notice, say, show_json
    from apt.cli.progress import Progress
    from apt.engine.packing import pack_model
    from apt.plugin.registry import registry

    with Progress("packing"):
        packed = pack_model(run, registry(), notice)
    if printing.as_json:
        show_json({"output": str(run.output), **vars(packed)})
    else:
        say(packed_line(run.output, packed))


def packed_line(output: Path, packed: "Packed") -> str:
    """The sizes of a packed model."""
    share, error = f"{packed.packed_bytes / packed.dense_bytes:.1%}", ""
    if packed.bound_bytes not in (0, packed.packed_bytes):  # 0 if all weights are zeros
        above = packed.packed_bytes / packed.bound_bytes - 1
        share += f"; {abs(above):.2%} {'above' if above > 0 else 'below'} the entropy"
    if packed.relative_error:
        error = f"relative rounding error {packed.relative_error:.2e}, "
    return (
        f"{output}: {packed.matrices} matrices, {packed.packed_bytes:,} of "
        f"{packed.dense_bytes:,} bytes ({share}), {packed.total_bytes:,} bytes with the other "
        f"tensors, {error}verified on disk"
    )


def unpack(run: UnpackRun, printing: PrintingOptions) -> None:
    """Write a packed model as a dense one, for plain transformers and other tools.

    For example: apt-prune unpack ./packed --output ./pruned
    """
    find_model(run.model, RemoteOptions())

    from apt.cli.output import notice, say, show_json
    from apt.cli.progress import Progress
    from apt.engine.packing import unpack_model
    from apt.plugin.registry import registry

    with Progress("unpacking"):
        count = unpack_model(run, registry(), notice)
    if printing.as_json:
        show_json({"output": str(run.output), "matrices": count})
    else:
        say(f"{run.output}: {count} matrices unpacked")
