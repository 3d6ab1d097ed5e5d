"""The export: the metadata of a GGUF file or of a checkpoint, and the tensors one by one."""

from collections.abc import Sequence
from pathlib import Path

import gguf

from apt.extending import Exportable, Exported
from apt_plugins.gguf_files.checkpoint import from_checkpoint
from apt_plugins.gguf_files.layouts import architecture_of
from apt_plugins.gguf_files.number_types import own_type, smaller_rows
from apt_plugins.gguf_files.original import from_original
from apt_plugins.gguf_files.writing import Counts, Planned, write_file


def export(model: Exportable, target: Path) -> Exported:
    """Write a model as a GGUF file; `apt.extending.Export`.

    If the model was made from such a file, all that need not differ is copied from it. Otherwise
    the metadata and the tokenizer are those of the checkpoint, for the families and tokenizers of
    which they are known.

    Raises:
        AptError: the format cannot express the model, or a family or tokenizer is not known.
    """
    kind = own_type(model)
    writer, tensors = _planned(model, target, kind)
    counts = write_file(writer, tensors, kind)
    return Exported(
        kind.name.lower(), len(tensors), target.stat().st_size, counts.zeros, counts.kept,
        _notes(tensors, kind, counts),
    )  # fmt: skip


def check(model: Exportable) -> None:
    """Raise `AptError` if the format cannot express a model, or it is not known here."""
    architecture_of(model)
    if model.is_stored:  # else a run writes it anew, in another form
        _planned(model, Path(model.name), own_type(model))


def _planned(
    model: Exportable, target: Path, kind: gguf.GGMLQuantizationType
) -> tuple[gguf.GGUFWriter, list[Planned]]:
    """A writer, which has written nothing yet, and the tensors to write."""
    described = from_checkpoint if model.original is None else from_original
    return described(model, target, kind)


def _notes(
    tensors: Sequence[Planned], kind: gguf.GGMLQuantizationType, counts: Counts
) -> list[str]:
    """Lines about rows that are too short for the type, and about a model's own integers."""
    whole = (planned for planned in tensors if planned.type is gguf.GGMLQuantizationType.F16)
    short = sum(smaller_rows(planned.shape, kind) for planned in whole)
    lines = {
        f"matrices are f16: their rows are not multiples of {kind.name}'s blocks": short,
        "matrices have the integers of the model": counts.integers,
    }
    return [f"{count} {line}" for line, count in lines.items() if count]
