"""The table of losses of a smaller model, estimated from that of the whole model."""

from collections.abc import Iterator, Mapping, Sequence

from apt.fit.levels import FileForm, Level
from apt.fit.table import LossTable, MeasuredLevel


def estimated_table(table: LossTable, form: FileForm, whole: Mapping[str, str]) -> LossTable:
    """The table of a smaller model before it exists.

    The loss of a tensor at a level is that of the whole model, times the share of the tensor that
    is kept.

    Args:
        table: the table of the whole model.
        form: what the file of the smaller model can hold.
        whole: the name in the whole model of each tensor of the smaller model.
    """
    tensors = {
        name: tuple(_estimated(levels, table.tensors[whole[name]]))
        for name, levels in form.levels.items()
    }
    return LossTable(tensors, form.rest, table.gradient)


def _estimated(
    levels: Sequence[Level], measured: Sequence[MeasuredLevel]
) -> Iterator[MeasuredLevel]:
    """The levels of a tensor with their estimated losses.

    A level that the tensor does not have in the whole model is left out, except for the stored
    values, which have no loss. A size that depends on the values is a share of that of the whole
    tensor, as the stored sizes are.
    """
    known = {level.name: level for level in measured}
    stored = known.get(levels[0].name)
    for level in levels:
        if level.grid is None and level.pattern is None:
            yield MeasuredLevel(level.name, level.size, 0.0)
        elif (whole := known.get(level.name)) is not None:
            kept, of, size = level.size, whole.size, level.size
            if level.expected is not None and stored is not None:
                kept, of = levels[0].size, stored.size
                size = min(size, round(whole.size * kept / of))
            yield MeasuredLevel(level.name, size, whole.loss * kept / of)
