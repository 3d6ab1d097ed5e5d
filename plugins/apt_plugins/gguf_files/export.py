"""The export: the metadata of a GGUF file or of a checkpoint, and the tensors one by one."""

from collections.abc import Sequence
from pathlib import Path

import gguf

from apt.extending import Exportable, Exported
from apt_plugins.gguf_files.checkpoint import from_checkpoint
from apt_plugins.gguf_files.grids import type_name
from apt_plugins.gguf_files.layouts import architecture_of
from apt_plugins.gguf_files.original import from_original
from apt_plugins.gguf_files.tensors import has_partial_blocks, most_common_type, weight_type
from apt_plugins.gguf_files.writing import Counts, Planned, write_file


def export(model: Exportable, target: Path) -> Exported:
    """Write a model as a GGUF file; `apt.extending.Export`.

    If the model was made from a GGUF file, unchanged metadata and tensors are copied from that
    file. Otherwise the metadata and the tokenizer are made from the checkpoint, for the supported
    families and tokenizers.

    Raises:
        AptError: the format cannot express the model, or its family or tokenizer is not supported.
    """
    kind = weight_type(model)
    writer, tensors = plan_file(model, target, kind)
    counts = write_file(writer, tensors, versioned=model.is_fitted)
    written = most_common_type(tensors) if kind is None or model.is_fitted else kind
    return Exported(
        type_name(written), len(tensors), target.stat().st_size,
        counts.zeros, counts.kept, _notes(tensors, kind, counts),
    )  # fmt: skip


def check(model: Exportable) -> None:
    """Raise `AptError` if the format cannot express a model, or the model is not supported."""
    architecture_of(model)
    if model.is_stored:  # else the tensors are only known after the run
        plan_file(model, Path(model.name), weight_type(model))


def plan_file(
    model: Exportable, target: Path, kind: gguf.GGMLQuantizationType | None
) -> tuple[gguf.GGUFWriter, list[Planned]]:
    """A writer with all metadata, which has written nothing yet, and the tensors to write.

    Args:
        kind: the type of the weights; None for the types of the tensors in the original file.
    """
    if model.original is not None:
        return from_original(model, target, kind)
    assert kind is not None
    return from_checkpoint(model, target, kind)


def _notes(
    tensors: Sequence[Planned], kind: gguf.GGMLQuantizationType | None, counts: Counts
) -> list[str]:
    """Notes on matrices of another type than the requested one, copied integers, lost zeros."""
    f16_tensors = [planned for planned in tensors if planned.type is gguf.GGMLQuantizationType.F16]
    partial = sum(kind is not None and has_partial_blocks(t.shape, kind) for t in f16_tensors)
    name = "" if kind is None else kind.name
    lines = {
        f"matrices are f16: their rows are not multiples of {name}'s blocks": partial,
        "matrices have the integers of the model": counts.integers,
    }
    notes = [f"{count} {line}" for line, count in lines.items() if count]
    if counts.without_zero:
        types = " and ".join(sorted(map(type_name, counts.without_zero)))
        lost = counts.zeros - counts.kept
        notes.append(
            f"{lost:,} zeros are small numbers in the file: not every block of {types} has a zero, "
            "as each block of q8_0, q6_K, q5_0 and q4_0 has"
        )
    return notes
