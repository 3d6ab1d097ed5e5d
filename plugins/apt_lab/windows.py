"""A metric of each window of a text, or of each sample.

The windows of a text differ more from each other than methods do. So a model is compared with the
dense model window by window.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from apt.adapter import Samples
from apt.evaluation.outputs import Outputs
from apt.hookspecs import EvaluatorSpec

# The 97.5 % quantiles of Student's t distribution with 1 to 30 degrees of freedom.
_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences.

    Attributes:
        value: the mean difference.
        error: its standard error.
        low, high: the 95 % confidence interval by Student's t distribution. Neighbouring windows of
            one text are correlated, so that the true interval is somewhat wider.
    """

    value: float
    error: float
    low: float
    high: float


def mean_difference(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """The mean of ``first`` − ``second``, pair by pair; None for fewer than two values."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if len(differences) < 2:
        return None
    mean = math.fsum(differences) / len(differences)
    variance = math.fsum((e - mean) ** 2 for e in differences) / (len(differences) - 1)
    error = math.sqrt(variance / len(differences))
    margin = quantile(len(differences) - 1) * error
    return Difference(mean, error, mean - margin, mean + margin)


def quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution with ``degrees`` of freedom, at least 1."""
    if degrees <= len(_QUANTILES):
        return _QUANTILES[degrees - 1]
    return 1.95996 + 2.3723 / degrees  # the normal quantile z, and (z³ + z) / 4


Mean = Literal["arithmetic", "geometric"]


@dataclass(frozen=True)
class Spread:
    """The standard error of a metric, and its 95 % confidence interval from ``low`` to ``high``."""

    error: float
    low: float
    high: float


@dataclass(frozen=True)
class Windows:
    """A metric of each window.

    Attributes:
        mean: the kind of mean over the windows that equals the metric of the complete text.
        values: the metric of each window; above zero for a geometric mean.
    """

    mean: Mean
    values: Sequence[float]

    @classmethod
    def of(cls, row: Mapping[str, Any], text: str, metric: str) -> "Windows | None":
        """The windows of a text and a metric in a row of a comparison; None without windows."""
        record = row.get("windows", {}).get(text, {}).get(metric)
        if record is None:
            return None
        return cls(record["mean"], [float(value) for value in record["values"]])

    def record(self) -> dict[str, Any]:
        """The windows as values for JSON."""
        return {"mean": self.mean, "values": list(self.values)}

    @property
    def value(self) -> float:
        """The metric of the complete text."""
        scaled = self._scaled
        return self._unscaled(math.fsum(scaled) / len(scaled))

    def spread(self, dense: "Windows | None") -> Spread | None:
        """The uncertainty of `value`, from the differences between this model and the dense one.

        The mean of the dense model counts as exact. Only the difference from it is uncertain. A
        metric that is itself a difference from the dense model has no ``dense`` windows. The result
        is None if there are fewer than two windows, or if a value is not finite.
        """
        if dense is None:
            dense = Windows(self.mean, [self.value] * len(self.values))
        if len(self.values) != len(dense.values):
            return None
        delta = mean_difference(self._scaled, dense._scaled)
        if delta is None or not math.isfinite(delta.error):
            return None
        start = math.fsum(dense._scaled) / len(dense.values)
        error = delta.error if self.mean == "arithmetic" else self.value * delta.error
        return Spread(error, self._unscaled(start + delta.low), self._unscaled(start + delta.high))

    @property
    def _scaled(self) -> list[float]:
        """The values on a scale on which their mean is arithmetic."""
        if self.mean == "arithmetic":
            return list(self.values)
        return [math.log(value) for value in self.values]

    def _unscaled(self, value: float) -> float:
        return value if self.mean == "arithmetic" else math.exp(min(value, 700.0))


@dataclass(frozen=True)
class Score:
    """A metric of a model, with the metric of the dense model.

    Attributes:
        value: the metric of the model.
        dense: the metric of the dense model; None for a metric that itself compares with it.
        spread: the uncertainty of ``value``; None if it is unknown.
    """

    value: float
    dense: float | None = None
    spread: Spread | None = None


def score_beside(
    spec: EvaluatorSpec,
    model: nn.Module,
    inputs: Tensor | Samples,
    dense: nn.Module,
    outputs: Outputs | None = None,
) -> Score:
    """A metric of a model and of the dense one, or of their difference, on (windows, seqlen).

    Args:
        inputs: token ids (windows, seqlen), or samples.
        outputs: what the dense model returns for samples.
    """
    value, windows = score(spec, model, inputs, outputs or dense)
    dense_value, dense_windows = (None, None) if spec.dense else score(spec, dense, inputs, None)
    return Score(value, dense_value, None if windows is None else windows.spread(dense_windows))


def score(
    spec: EvaluatorSpec,
    model: nn.Module,
    inputs: Tensor | Samples,
    dense: nn.Module | Outputs | None,
) -> tuple[float, Windows | None]:
    """A metric, and the metric of each window or sample if it is a mean over them.

    Args:
        inputs: token ids (windows, seqlen), or samples.
        dense: the dense model; for samples what it returns.
    """
    if spec.mean is None:
        return spec.measure(model, inputs, *([dense] if spec.dense else [])), None

    def beside(part: slice) -> list[nn.Module | Outputs | None]:
        if not spec.dense:
            return []
        return [dense[part] if isinstance(dense, Outputs) else dense]

    parts = [slice(index, index + 1) for index in range(len(inputs))]
    values = [spec.measure(model, inputs[part], *beside(part)) for part in parts]
    windows = Windows(spec.mean, values)
    return windows.value, windows


def spread(
    row: Mapping[str, Any], dense: Mapping[str, Any], text: str, metric: str
) -> Spread | None:
    """The uncertainty of a metric of a row, see `Windows.spread`; None if it is unknown."""
    windows, dense_windows = Windows.of(row, text, metric), Windows.of(dense, text, metric)
    return None if windows is None or dense_windows is None else windows.spread(dense_windows)


def size_of(setting: Mapping[str, Any], shape: Sequence[int]) -> str:
    """The size of a calibration or of a text in words, from its shape in a comparison."""
    if "reads" in setting:
        return f"{shape[0]} samples"
    return f"{' × '.join(map(str, shape))} tokens"
