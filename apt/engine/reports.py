"""The reports with which runs begin."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from apt.checkpoints.opened import Opened
from apt.locations.model_source import Source
from apt.locations.paths import portable
from apt.output.report import Report, read_report
from apt.text.datasets import digest


def described(reference: str, kind: str, adapter: str) -> dict[str, Any]:
    """The entry for a model: its name, ``model_type`` and adapter."""
    return {"reference": portable(reference), "type": kind, "adapter": adapter}


def in_order(record: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A record with these entries first, in this order."""
    return {name: record[name] for name in names if name in record} | record


def calibration_of(tokens: Tensor) -> dict[str, Any]:
    """The shape and hash of calibration tokens (samples, seqlen)."""
    return {"shape": list(tokens.shape), "sha256": digest(tokens.cpu())}


def report_beside(source: Source) -> dict[str, Any]:
    """The record beside the given model; empty if there is none.

    Raises:
        AptError: it is damaged.
    """
    return {} if source.on_hub else read_report(Path(source.location, source.gguf or "")) or {}


def continued(record: dict[str, Any] | None, skeleton: Opened, where: Path) -> Report:
    """The report of the pruning before this run, from ``where``; an empty one without it."""
    if record:
        return Report.from_dict(record, f"the report in {where}")
    reference = skeleton.source.reference
    return Report({}, described(reference, skeleton.config.model_type, skeleton.spec.name), {})
