"""``apt-prune export``."""

from pathlib import Path
from typing import TYPE_CHECKING

from apt.cli.opening import check_new_file, find_model
from apt.options import ExportRun, PrintingOptions

if TYPE_CHECKING:
    from apt.checkpoints.exporting import Exported


def export(run: ExportRun, printing: PrintingOptions) -> None:
    """Write a model in the file format of other software: GGUF for llama.cpp.

    If the model was made from a file of that format, its metadata and its tokenizer are copied.

    For example: apt-prune export ./pruned --type q8_0 --output pruned.gguf
    """
    from apt.engine.opening import check_export
    from apt.plugin.registry import registry

    check_export(run, registry())
    check_new_file(run.output, run.model, run.source, overwrite=run.overwrite)
    find_model(run.model, run)

    from apt.cli.output import notice, say, show_json
    from apt.cli.progress import Progress
    from apt.engine.export import export_model

    with Progress("exporting"):
        exported = export_model(run, registry(), notice)
    if printing.as_json:
        show_json({"output": str(run.output), **vars(exported)})
        return
    say(exported_line(run.output, exported))


def exported_line(output: Path, exported: "Exported") -> str:
    """The size of an exported file, and its zeros."""
    zeros = "no zeros"
    if exported.zeros:
        zeros = f"{exported.kept:,} of {exported.zeros:,} zeros kept"
    if exported.kept < exported.zeros:
        zeros += f" ({exported.kept / exported.zeros:.2%})"
    return (
        f"{output}: {exported.tensors} tensors, {exported.type}, {exported.size:,} bytes, {zeros}"
    )
