"""What a GGUF file of a model can hold: the levels of each tensor, and the bytes of the rest."""

import math
import tempfile
from pathlib import Path

from apt.extending import Exportable, FileForm, Level
from apt_plugins.gguf_files.export import plan_file
from apt_plugins.gguf_files.grids import BlockGrid, grids_for, type_name
from apt_plugins.gguf_files.tensors import PLAIN_TYPES, is_always_f32, weight_type
from apt_plugins.gguf_files.writing import Planned, write_header


def file_form(model: Exportable) -> FileForm:
    """The levels of the matrices of a model in a GGUF file.

    A tensor keeps its values at the level with its stored type. The first dimension of a matrix is
    the outputs, so that its rows have the blocks of the grids.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer, tensors = plan_file(model, path, weight_type(model))
        write_header(writer, tensors, versioned=True)
        alignment = int(writer.data_alignment)
        writer.close()
        rest = _padded(path.stat().st_size, alignment)
    levels = dict[str, tuple[Level, ...]]()
    for planned in tensors:
        if planned.parameter is None or is_always_f32(planned.name, planned.shape):
            rest += _padded(planned.size, alignment)
        else:
            levels[planned.parameter] = _levels(planned, alignment, changed=model.changed)
    return FileForm(levels, rest)


def _levels(planned: Planned, alignment: int, *, changed: bool) -> tuple[Level, ...]:
    """The levels of a matrix: its stored type, and all grids.

    A changed matrix has no values in a quantised type before it is rounded.
    """
    rows, columns = math.prod(planned.shape[:-1]), planned.shape[-1]
    stored = Level(type_name(planned.type), _padded(planned.size, alignment))
    grids = grids_for(columns)
    if changed and planned.type not in PLAIN_TYPES:
        return tuple(_level(grid, rows, columns, alignment) for grid in grids)
    others = (grid for grid in grids if grid.type is not planned.type)
    return (stored, *(_level(grid, rows, columns, alignment) for grid in others))


def _level(grid: BlockGrid, rows: int, columns: int, alignment: int) -> Level:
    return Level(grid.name, _padded(rows * grid.row_bytes(columns), alignment), grid)


def _padded(size: int, alignment: int) -> int:
    return math.ceil(size / alignment) * alignment
