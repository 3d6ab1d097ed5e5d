"""The losses in the reports of recoveries, as points of the P² law."""

import math
from pathlib import Path
from typing import Any

from apt.errors import AptError, first_line
from apt.output.report import read_report
from apt.recovery.law import Point


def read_points(directory: Path) -> list[Point]:
    """The losses that a recovery measured, at tokens above 0.

    Raises:
        AptError: there is no report of a recovery, or it is damaged.
    """
    report = read_report(directory) if directory.is_dir() else None
    record: Any = (report or {}).get("recovery")
    if not record:
        raise AptError(
            f"{directory} has no report of a recovery", "name a directory that recover wrote"
        )
    try:
        training = record["training"]
        each, dense = float(training["tokens"]), float(record.get("dense_loss") or 0)
        size, rate = float(record["parameters_before"]), float(record["rate"])
        return [
            Point(str(directory), dense, rate, size, each * int(step), float(loss))
            for step, loss in training["held_back"]
            if int(step) > 0 and math.isfinite(float(loss))
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise AptError(
            f"the report in {directory} is damaged: {first_line(error)}", "recover the model again"
        ) from error
