"""The export of models to the file formats of other software."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from apt.checkpoints.exporting import Export, Exportable, Exported
from apt.checkpoints.load import open_skeleton
from apt.checkpoints.opened import Opened
from apt.checkpoints.stored import local_directory
from apt.engine.opening import check_export, find_source
from apt.engine.packing import integers_of
from apt.engine.prepare import Notice
from apt.engine.task import Task
from apt.errors import AptError, plugin_error
from apt.files.writing import check_file
from apt.options import ExportRun, PruneRun, RecoverRun, ShrinkRun
from apt.output.report import read_report
from apt.output.staging import staged_file
from apt.plugin.registry import Registry
from apt.plugin.specs import ExportSpec
from apt.runtime.entries import is_packed


def export_model(
    run: ExportRun, registry: Registry, notice: Notice = lambda line: None, title: str | None = None
) -> Exported:
    """Write a model as a file of another format, in one step.

    Args:
        title: the name of the model in the file; by default the name of its directory.

    Raises:
        AptError: the model cannot be read, the format cannot express it, or the file cannot be
            written.
    """
    spec = check_export(run, registry)
    source = find_source(run.model, run, registry)
    output, sources = run.output, [run.source] if run.source else []
    for path in sources:
        if not path.is_file():
            raise AptError(f"no such file: {path}", "check the path", ("source",))
    check_file(
        output, overwrite=run.overwrite, inputs=[*source.files(), *sources], options=("output",)
    )
    if source.gguf:
        raise AptError(f"{source.reference} is not a directory", "convert it, or prune it, first")
    if not source.on_hub and is_packed(Path(source.location)):
        raise AptError(f"{source.reference} is packed", "write it dense first: apt-prune unpack")
    opened = open_skeleton(source, registry, run.adapter)
    directory = local_directory(opened)
    original = sources[0] if sources else original_file(directory, spec)
    integers = integers_of(directory)
    write: Export = spec.load()
    with staged_file(output, run.overwrite) as partial:
        kind = integers.kind if integers else None
        model = Exportable(opened, run.type, original, kind, title=title)
        exported = write(model, partial)
        if not isinstance(exported, Exported) or not partial.is_file():
            message = "does not write a file, or does not say what it wrote"
            raise plugin_error(f"export format {spec.name}", message, "format", "format")
    if original is not None:
        notice(f"metadata and tokenizer: from {original}")
    for line in exported.notes:
        notice(line)
    return exported


def check_exportable(
    run: PruneRun | ShrinkRun | RecoverRun, opened: Opened, registry: Registry
) -> None:
    """Raise if the output of a run is to be exported to a format that cannot express the model.

    Raises:
        AptError: see `export_model`.
    """
    if run.export is None:
        return
    exporting = ExportRun(model=run.model, output=run.export, type=run.export_type)
    spec = check_export(exporting, registry)
    if spec.check is not None:
        original = None if opened.source.gguf else original_file(local_directory(opened), spec)
        spec.examine(Exportable(opened, run.export_type, original))


def export_output(task: Task, directory: Path, file: Path, notice: Notice) -> Exported:
    """Export the directory of a run with the option ``export``.

    The original is the file that the run has read, or from which the model of the run was made.

    Args:
        task: the task of the run.
        directory: the directory that the run has written.
        file: the file to write.

    Raises:
        AptError: see `export_model`. The directory is complete then.
    """
    run, opened = task.options, task.skeleton
    exporting = ExportRun(
        model=str(directory), output=file, type=run.export_type, adapter=run.adapter,
        overwrite=run.overwrite, trust_remote_code=run.trust_remote_code,
    )  # fmt: skip
    spec, source = check_export(exporting, task.registry), opened.source
    original = source.files()[0] if source.gguf else original_file(local_directory(opened), spec)
    exporting = replace(exporting, source=original)
    return export_model(exporting, task.registry, notice, title=run.export.stem)


def original_file(directory: Path, spec: ExportSpec) -> Path | None:
    """The file of this format from which a model was made, by its report; None if there is none.

    The report has the name of the file alone.

    Raises:
        AptError: the file is neither in the working directory nor beside the model.
    """
    name = next(
        filter(lambda reference: reference.endswith(spec.suffix), _references(directory)), None
    )
    if name is None:
        return None
    for place in (Path(name), directory.resolve().parent / name):
        if place.is_file():
            return place
    raise AptError(
        f"{directory} was made from {name}, which is neither here nor beside it",
        "name it: its metadata and its tokenizer are needed",
        ("source",),
    )


def _references(directory: Path) -> Iterator[str]:
    """The models from which a model was made, from the last to the first, by its reports."""
    record: Mapping[str, Any] | None = read_report(directory)
    while isinstance(record, dict) and record:
        model = record.get("model")
        yield str(model.get("reference", "")) if isinstance(model, dict) else ""
        record = record.get("earlier")
