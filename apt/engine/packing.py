"""Packed copies of checkpoints, and dense copies of packed ones."""

from math import prod
from pathlib import Path
from typing import Any

from apt.checkpoints.load import open_skeleton
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.stored import layout_of, local_directory
from apt.engine.opening import find_source
from apt.engine.prepare import Notice, check_place
from apt.errors import AptError
from apt.layouts.pieces import Layout
from apt.options import PackRun, PruneRun, RemoteOptions, UnpackRun
from apt.output.card import mark_as_packed, mark_as_unpacked
from apt.output.location import check_output, check_space
from apt.output.report import carry_report, read_report
from apt.output.staging import staged_directory, write_errors
from apt.packing.compressed_tensors import write_compressed_tensors
from apt.packing.directory import (
    OWN_CODE_FILE,
    Packed,
    Rounding,
    expert_tensors,
    linear_tensors,
    pack,
    unpack,
)
from apt.patterns import COLUMNS
from apt.plugin.registry import Registry
from apt.runtime.entries import is_packed, read_entries
from apt.runtime.rounding import KINDS


def pack_model(run: PackRun, registry: Registry, notice: Notice = lambda line: None) -> Packed:
    """Write a pruned model without its zeros or as integers, and verify it on disk.

    Without ``quantize`` the weights do not change: if the pruning has rounded them to integers,
    they are packed as integers.

    Raises:
        AptError: the model cannot be read, has nothing to pack, or the output cannot be written.
    """
    source = find_source(run.model, run, registry)
    check_place(run, source, (), notice)
    if is_packed(Path(source.location)):
        raise AptError(f"{source.reference} is packed already", "name the pruned model")
    skeleton = open_skeleton(source, registry, run.adapter)
    directory = local_directory(skeleton)
    shards = Shards(directory)
    size = sum(entry.size for entry in shards.entries.values())
    check_space({"output": (run.output, size)})
    requested = Rounding(run.quantize, run.scale_group) if run.quantize else None
    rounding = requested or integers_of(directory)
    # Only the blocks are rounded: the language-model head keeps its trained weights.
    only_blocks = rounding is not None and not rounding.exact
    layout = layout_of(skeleton, shards)
    names = {
        *linear_tensors(skeleton, layout, blocks=only_blocks),
        *expert_tensors(skeleton, layout),
    }
    roundings = dict.fromkeys(names, rounding)
    if rounding is None:
        fitted = fitted_integers(directory, layout)
        roundings |= {name: each for name, each in fitted.items() if name in names}
    group = rounding.scale_group if rounding is not None else COLUMNS
    if run.format == "apt" and isinstance(group, int) and group % COLUMNS:
        notice(f"scale group {group}: no multiple of {COLUMNS}, so torch expands each matrix")
    if run.format != "apt" and rounding is None:
        raise AptError(
            f"{run.format} stores integers, and {source.reference} was not quantised",
            "round its weights",
            ("quantize",),
        )
    with staged_directory(run.output, run.overwrite) as work, write_errors(run.output):
        if run.format != "apt" and rounding is not None:
            modules = linear_tensors(skeleton, layout, blocks=True)
            integers = dict.fromkeys(modules, rounding)
            packed = write_compressed_tensors(directory, skeleton, work.out, integers)
        else:
            packed = pack(directory, roundings, work.out)
            mark_as_packed(work.out, has_code=(work.out / OWN_CODE_FILE).is_file())
        carry_report(directory, work.out, source.reference)
    return packed


def check_packed_place(run: PruneRun, inputs: list[Path]) -> None:
    """Raise if the packed model of a run cannot be written, before the run.

    Raises:
        AptError: the directory exists; or it is, contains or is inside the output or an input.
    """
    if run.pack is None:
        return
    place, output = run.pack.resolve(), run.directory.resolve()
    if place.is_relative_to(output) or output.is_relative_to(place):
        raise AptError(
            f"pack {run.pack} is the output itself, inside it or around it",
            "choose another directory",
            ("pack",),
        )
    check_output(run.pack, run.overwrite, inputs, "pack")


def pack_output(run: PruneRun, directory: Path, registry: Registry, notice: Notice) -> Packed:
    """Write the packed form of the directory of a run with the option ``pack``."""
    assert run.pack is not None
    remote = run.trust_remote_code
    packing = PackRun(
        model=str(directory), output=run.pack, adapter=run.adapter, overwrite=run.overwrite,
        trust_remote_code=remote,
    )  # fmt: skip
    return pack_model(packing, registry, notice)


def unpack_model(run: UnpackRun, registry: Registry, notice: Notice = lambda line: None) -> int:
    """Write a packed model as a dense one, and return the number of matrices.

    Raises:
        AptError: the model is not packed or is damaged, or the output cannot be written.
    """
    source = find_source(run.model, RemoteOptions(), registry)
    directory = Path(source.location)
    check_place(run, source, (), notice)
    entries = read_entries(directory)
    size = sum(4 * prod(entry.shape) for entry in entries.values())
    check_space({"output": (run.output, size)})
    with staged_directory(run.output, run.overwrite) as work, write_errors(run.output):
        count = unpack(directory, work.out)
        mark_as_unpacked(work.out)
        carry_report(directory, work.out, source.reference)
    return count


def fitted_integers(directory: Path, layout: Layout) -> dict[str, Rounding]:
    """The integers of the tensors of a model that `apt-prune fit` made, by its report.

    A model that was trained afterwards has none.
    """
    report = read_report(directory) or {}
    if not report.get("fit") or report.get("recovery") or report.get("reapplied"):
        return {}
    group, levels = report["options"].get("scale_group"), report["fit"]["levels"]
    kinds = {name: level.partition(" ")[0] for name, level in levels.items()}
    return {
        piece.key: Rounding(kind, group, exact=True)
        for name, kind in kinds.items()
        for piece in layout.get(name, ())
        if kind in KINDS and (isinstance(group, int) or group == "row")
    }


def integers_of(directory: Path) -> Rounding | None:
    """The integers of a quantised model, by its report; None for other models.

    A model that was trained afterwards has no integers.
    """
    report = read_report(directory) or {}
    options = report.get("options")
    if not isinstance(options, dict) or options.get("quantize") not in KINDS:
        return None
    if report.get("recovery") or report.get("reapplied"):
        return None
    group: Any = options.get("group")
    is_valid = isinstance(group, int) or group == "row"
    return Rounding(options["quantize"], group, exact=True) if is_valid else None
