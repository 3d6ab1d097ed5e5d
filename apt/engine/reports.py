"""The beginning of a report: its entries before the model changes."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from apt.adapter import Samples
from apt.checkpoints.opened import Opened
from apt.locations.model_source import Source
from apt.locations.paths import portable
from apt.output.report import Report, read_report
from apt.text.datasets import digest


def model_entry(reference: str, kind: str, adapter: str) -> dict[str, Any]:
    """The entry of a model in a report: its name, ``model_type`` and adapter."""
    return {"reference": portable(reference), "type": kind, "adapter": adapter}


def in_order(record: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A record with these entries first, in this order."""
    return {name: record[name] for name in names if name in record} | record


def calibration_of(tokens: Tensor | Samples) -> dict[str, Any]:
    """The shape and hash of calibration tokens (samples, seqlen), or of other samples."""
    on_cpu = tokens.cpu() if isinstance(tokens, Tensor) else tokens
    return {"shape": list(tokens.shape), "sha256": digest(on_cpu)}


def report_beside(source: Source) -> dict[str, Any]:
    """The record in the directory of a model; empty if there is none.

    Raises:
        AptError: the record is damaged.
    """
    return {} if source.on_hub else read_report(Path(source.location, source.gguf or "")) or {}


def continued_report(record: dict[str, Any] | None, skeleton: Opened, where: Path) -> Report:
    """The report of the earlier pruning, from its record; without a record an empty report."""
    if record:
        return replace(Report.from_dict(record, f"the report in {where}"), export={})
    reference = skeleton.source.reference
    return Report({}, model_entry(reference, skeleton.config.model_type, skeleton.spec.name), {})
