"""The tables of losses of earlier runs, from their reports."""

from pathlib import Path

from apt.errors import AptError
from apt.fit.levels import FileForm, Level
from apt.fit.table import LossTable, MeasuredLevel
from apt.output.report import read_report

MEASURE = "leave it out: the losses are then measured"
"""The hint for a table that does not serve."""


def read_table(output: Path, form: FileForm) -> tuple[LossTable, str]:
    """The table of losses in the report of an earlier run, and the hash of the model's weights.

    Raises:
        AptError: there is none, or it has other tensors, sizes or levels.
    """
    record, hint = read_report(output) or {}, MEASURE
    if not record.get("fit"):
        raise AptError(f"{output} has no table of losses", hint, ("table_from",))
    try:
        table = LossTable.read(record["fit"].get("table"))
    except ValueError as error:
        message = f"the report of {output} is damaged: {error}"
        raise AptError(message, hint, ("table_from",)) from error
    part = _part(table, form)
    if part is None:
        message = f"{output} was made from another model, or for another output"
        raise AptError(message, hint, ("table_from",))
    return part, str(record["model"].get("sha256", ""))


def _part(table: LossTable, form: FileForm) -> LossTable | None:
    """The levels of a form in a table; None if a tensor, a level or a size differs.

    The table may have more levels, such as those with zeros.
    """
    if table.tensors.keys() != form.levels.keys():
        return None
    tensors = dict[str, tuple[MeasuredLevel, ...]]()
    for name, levels in form.levels.items():
        measured = {level.name: level for level in table.tensors[name]}
        found = [measured[level.name] for level in levels if level.name in measured]
        if len(found) < len(levels) or not all(map(_fits, levels, found)):
            return None
        tensors[name] = tuple(found)
    return LossTable(tensors, form.rest, table.gradient)


def _fits(level: Level, measured: MeasuredLevel) -> bool:
    """True if a measured level has the size of a level, or an expected size."""
    return measured.size == level.size or (
        level.expected is not None and measured.size < level.size
    )
