"""The measures of a run: of the model before pruning and after."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apt.errors import AptError, first_line
from apt.output.report import portable
from apt.runs.prepare import Prepared


class Unmeasured(AptError):
    """A pruned model is written and verified, but a measure of it failed."""

    def __init__(self, output: Path, error: Exception) -> None:
        what = f"{type(error).__name__}: {first_line(error)}"
        super().__init__(
            f"{output} is written and verified, but measuring it failed: {what}",
            f"measure it with: apt-prune eval {output}",
        )
        self.__cause__ = error


def measure(
    prepared: Prepared,
    module: nn.Module,
    held_out: Tensor,
    when: str,
    status: Callable[[str], None],
) -> dict[str, float]:
    """Each of the run's metrics, of a model that is `Adapter.running`."""
    measured = {}
    for name in prepared.options.metrics:
        status(f"measuring {name} {when} pruning")
        measured[name] = float(prepared.registry.evaluators.get(name).load()(module, held_out))
    return measured


def scores(prepared: Prepared, held_out: Tensor | None, found: dict[str, Any]) -> dict[str, Any]:
    """The measures before and after with their text, for the report; empty where there are none."""
    if held_out is None or not found:
        return {}
    source = portable(str(prepared.options.evaluation))
    return {"source": source, "shape": list(held_out.shape), **found}
