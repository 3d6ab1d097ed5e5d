"""Packed copies of checkpoints, and dense copies of packed ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from apt.checkpoints.load import open_shell
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.stored import local_directory
from apt.engine.prepare import check_place
from apt.errors import AptError
from apt.locations.model_source import Source
from apt.output.card import mark_as_packed, mark_as_unpacked
from apt.output.location import check_space
from apt.output.report import carry_report, read_report
from apt.output.staging import whole_directory, write_errors
from apt.packing.compressed_tensors import write_compressed_tensors
from apt.packing.directory import OWN_CODE_FILE, Packed, Rounding, linear_tensors, pack, unpack
from apt.plugin.registry import Registry
from apt.runtime.entries import is_packed, read_entries
from apt.runtime.rounding import KINDS

COMPRESSED_TENSORS = "compressed-tensors"
FORMATS = ("apt", COMPRESSED_TENSORS)
"""The formats of `pack_model`; the first one is the default."""


def pack_model(
    source: Source,
    output: Path,
    registry: Registry,
    notice: Callable[[str], None] = lambda line: None,
    *,
    adapter: str | None = None,
    rounding: Rounding | None = None,
    form: str = FORMATS[0],
    overwrite: bool = False,
) -> Packed:
    """Write a pruned model without its zeros or as integers, and verify it on disk.

    Args:
        source: the model.
        output: the directory to write.
        registry: the plugins.
        notice: called with a line about what is replaced or left out.
        adapter: the name of an adapter; by default that of the model's type.
        rounding: the rounding of the kept weights; None keeps them as they are, as integers if the
            run that pruned them made such.
        form: one of `FORMATS`.
        overwrite: True if the output of an earlier run may be replaced.

    Raises:
        AptError: the model cannot be read, has nothing to pack, or the output cannot be written.
    """
    check_place(output, source, (), notice, overwrite=overwrite, resume=False)
    check_not_packed(source)
    shell = open_shell(source, registry, adapter)
    directory = local_directory(shell)
    shards = Shards(directory)
    check_space(output, sum(entry.size for entry in shards.entries.values()))
    rounding = rounding or _integers(directory)
    # Only the blocks are rounded: the language-model head is as it was trained.
    rounds = rounding is not None and not rounding.exact
    names = linear_tensors(shell, shards, blocks=rounds)
    if form == COMPRESSED_TENSORS and rounding is None:
        raise AptError(
            f"{form} stores integers, and {source.reference} was not quantised",
            "round its weights",
            ("quantize",),
        )
    with whole_directory(output, overwrite) as work, write_errors(output):
        if form == COMPRESSED_TENSORS and rounding is not None:
            done = write_compressed_tensors(directory, shell, work.out, rounding)
        else:
            done = pack(directory, names, work.out, rounding)
            mark_as_packed(work.out, has_code=(work.out / OWN_CODE_FILE).is_file())
        carry_report(directory, work.out, source.reference)
    return done


def unpack_model(
    source: Source,
    output: Path,
    notice: Callable[[str], None] = lambda line: None,
    *,
    overwrite: bool = False,
) -> int:
    """Write a packed model as a dense one, and return the number of matrices.

    Args:
        source: the packed model, a directory.
        output, notice, overwrite: as in `pack_model`.

    Raises:
        AptError: the model is not packed or is damaged, or the output cannot be written.
    """
    directory = Path(source.location)
    check_place(output, source, (), notice, overwrite=overwrite, resume=False)
    entries = read_entries(directory)
    check_space(output, sum(4 * e.shape[0] * e.shape[1] for e in entries.values()))
    with whole_directory(output, overwrite) as work, write_errors(output):
        count = unpack(directory, work.out)
        mark_as_unpacked(work.out)
        carry_report(directory, work.out, source.reference)
    return count


def _integers(directory: Path) -> Rounding | None:
    """The integers that a model consists of, by its report; None if it was not quantised."""
    report = read_report(directory) or {}
    options = report.get("options")
    if not isinstance(options, dict) or options.get("quantize") not in KINDS:
        return None
    group: Any = options.get("group")
    known = isinstance(group, int) or group == "row"
    return Rounding(options["quantize"], group, exact=True) if known else None


def check_not_packed(source: Source) -> None:
    """Raise if a model on disk is packed already."""
    if is_packed(Path(source.location)):
        raise AptError(f"{source.reference} is packed already", "name the pruned model")
