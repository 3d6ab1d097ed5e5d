"""Metrics of the model of a run, before pruning and after."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apt.engine.prepare import Prepared
from apt.errors import AptError, first_line
from apt.output.report import portable


class MeasurementError(AptError):
    """The pruned model is written and verified, but a measurement of it failed.

    Attributes:
        record: the failure without the place of the model, for the report.
    """

    def __init__(self, output: Path, error: Exception) -> None:
        cause = f"{type(error).__name__}: {first_line(error)}"
        super().__init__(
            f"{output} is written and verified, but measuring it failed: {cause}",
            f"measure it with: apt-prune eval {output}",
        )
        self.record = f"measuring it failed: {cause}"
        self.__cause__ = error


def measure(
    prepared: Prepared,
    module: nn.Module,
    held_out: Tensor,
    when: str,
    status: Callable[[str], None],
) -> dict[str, float]:
    """The metrics of a run by name, for a model within `Adapter.running`."""
    measured = {}
    for name in prepared.options.metrics:
        status(f"measuring {name} {when} pruning")
        measured[name] = prepared.registry.evaluators.get(name).measure(module, held_out)
    return measured


def scores(prepared: Prepared, held_out: Tensor | None, found: dict[str, Any]) -> dict[str, Any]:
    """The entry of the report for metrics and their text; empty if nothing was measured."""
    if held_out is None or not found:
        return {}
    source = portable(str(prepared.options.evaluation))
    return {"source": source, "shape": list(held_out.shape), **found}
