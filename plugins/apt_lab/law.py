"""The P² law: the loss after pruning as a function of the tokens of the recovery.

    L = L₀ + (1/ρ)^γ (1/N₀)^δ (N_C/N₀^α + D_C/D^β + E)

``L₀`` is the loss of the dense model, ``ρ`` the pruning rate, ``N₀`` the number of parameters
before pruning, and ``D`` the number of training tokens (arXiv 2411.10272, equation 6). Terms that
the points cannot identify are left out: the terms of ``N₀`` with one model size, the term of ``ρ``
with one rate. ``N₀`` and ``D`` are in millions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apt import AptError
from apt.errors import first_line
from apt.output.report import read_report
from apt.recovery.law import MILLION, THRESHOLD, Array, enough, fit

_LEAST_POINTS = 4
_FLAT = 1e-3  # nats between the losses of a curve, below which tokens have no measurable effect


@dataclass(frozen=True)
class Point:
    """A measured loss.

    Attributes:
        curve: the name of the run.
        dense: the loss of the dense model; 0 if it is not known.
        rate: the share of all parameters that was pruned.
        parameters: the number of parameters before pruning.
        tokens: the number of training tokens.
        loss: the loss, in nats per token.
    """

    curve: str
    dense: float
    rate: float
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        values: the fitted parameters by name: ``gamma``, ``delta``, ``N_C``, ``alpha``, ``D_C``,
            ``beta`` and ``E``, without those that were not identified.
        missing: the reasons why parameters were left out, one line each.
        slope_difference: the average slope difference of the curves (section 4.2 of the paper), in
            nats per million tokens.
        error: the mean absolute error of the loss on the points of the fit, in nats.
        intervals: the 90 % bootstrap interval of each parameter.
    """

    values: dict[str, float]
    missing: tuple[str, ...]
    slope_difference: float = 0.0
    error: float = 0.0
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def loss(self, point: Point, tokens: float | None = None) -> float:
        """The predicted loss at the tokens of a point, or at other ``tokens``."""
        arrays = _arrays([point])
        if tokens is not None:
            arrays["tokens"] = np.array([tokens / MILLION])
        return float(_predict(self.values, arrays)[0])

    def enough(self, point: Point, threshold: float = THRESHOLD) -> float:
        """The number of tokens at which doubling it lowers the loss by less than ``threshold``."""
        scale = float(_scale(self.values, _arrays([point]))[0])
        return enough(scale * self.values["D_C"], self.values["beta"], threshold)


def fit_law(points: Sequence[Point], *, resamples: int = 0, seed: int = 0) -> Law:
    """Fit the law by least squares with a robust loss, from several starts.

    Args:
        points: the measured losses, at tokens above 0.
        resamples: the number of bootstrap samples for the intervals. They draw whole curves, or
            points if there is one curve.

    Raises:
        AptError: there are too few points.
    """
    points = [point for point in points if point.tokens > 0 and math.isfinite(point.loss)]
    token_counts = {point.tokens for point in points}
    if len(token_counts) < _LEAST_POINTS:
        raise AptError(
            f"the law needs losses at {_LEAST_POINTS} different numbers of tokens at least, and "
            f"there are {len(token_counts)}",
            "train longer, or measure the loss more often",
            ("checks",),
        )
    names, missing = _identified(points)
    values = _fit(names, points)
    return Law(
        values, missing, _slope_difference(values, points), _mean_error(values, points),
        _intervals(values, points, 0 if _flat(points) else resamples, seed),
    )  # fmt: skip


def _identified(points: Sequence[Point]) -> tuple[list[str], tuple[str, ...]]:
    """The parameters that the points can identify, and the reasons for the others."""
    names, missing = ["D_C", "beta", "E"], []
    if len({point.rate for point in points}) > 1:
        names.append("gamma")
    else:
        missing.append("one pruning rate: no gamma")
    if len({point.parameters for point in points}) > 1:
        names += ["delta", "N_C", "alpha"]
    else:
        missing.append("one model size: no delta, N_C and alpha")
    if not all(point.dense for point in points):
        missing.append("the loss of a dense model is not known: it is a part of E")
    if _flat(points):
        missing.append("the losses do not change with the tokens: D_C and beta mean nothing")
    return names, tuple(missing)


def _flat(points: Sequence[Point]) -> bool:
    """True if the loss of no curve depends on the tokens."""
    curves = ([point.loss for point in curve] for curve in _curves(points))
    return all(max(losses) - min(losses) < _FLAT for losses in curves)


def _arrays(points: Sequence[Point]) -> dict[str, Array]:
    return {
        "dense": np.array([point.dense for point in points]),
        "rate": np.array([max(point.rate, 1e-6) for point in points]),
        "size": np.array([point.parameters / MILLION for point in points]),
        "tokens": np.array([point.tokens / MILLION for point in points]),
        "loss": np.array([point.loss for point in points]),
    }


def _scale(values: dict[str, float], arrays: dict[str, Array]) -> Array:
    """``(1/ρ)^γ (1/N₀)^δ``."""
    rate = arrays["rate"] ** -values.get("gamma", 0.0)
    return rate * arrays["size"] ** -values.get("delta", 0.0)


def _predict(values: dict[str, float], arrays: dict[str, Array]) -> Array:
    size = values.get("N_C", 0.0) * arrays["size"] ** -values.get("alpha", 0.0)
    tokens = values["D_C"] * arrays["tokens"] ** -values["beta"]
    return arrays["dense"] + _scale(values, arrays) * (size + tokens + values["E"])


def _fit(
    names: Sequence[str], points: Sequence[Point], start: dict[str, float] | None = None
) -> dict[str, float]:
    arrays = _arrays(points)
    return fit(names, lambda values: _predict(values, arrays), arrays["loss"], start)


def _slope_difference(values: dict[str, float], points: Sequence[Point]) -> float:
    """The mean difference of measured and fitted slopes, in nats per million tokens."""
    differences = []
    for curve in _curves(points):
        arrays = _arrays(curve)
        if len(curve) > 1:
            tokens = np.diff(arrays["tokens"])
            measured = np.diff(arrays["loss"]) / tokens
            differences.append(np.abs(measured - np.diff(_predict(values, arrays)) / tokens))
    return float(np.concatenate(differences).mean()) if differences else 0.0


def _curves(points: Sequence[Point]) -> list[list[Point]]:
    names = dict.fromkeys(point.curve for point in points)
    return [
        sorted((p for p in points if p.curve == name), key=lambda p: p.tokens) for name in names
    ]


def _mean_error(values: dict[str, float], points: Sequence[Point]) -> float:
    arrays = _arrays(points)
    return float(np.abs(_predict(values, arrays) - arrays["loss"]).mean())


def _intervals(
    values: dict[str, float], points: Sequence[Point], resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """The 90 % intervals of the parameters over bootstrap samples; fits start from ``values``."""
    names = list(values)
    draw, fits = np.random.default_rng(seed), list[dict[str, float]]()
    curves = _curves(points)
    units: list[list[Point]] = curves if len(curves) > 1 else [[point] for point in points]
    for _ in range(resamples):
        drawn = [units[i] for i in draw.integers(len(units), size=len(units))]
        sample = [point for unit in drawn for point in unit]
        if set(_identified(sample)[0]) >= set(names) and len({p.tokens for p in sample}) > 1:
            fits.append(_fit(names, sample, values))
    if not fits:
        return {}
    ends = {name: np.quantile([fitted[name] for fitted in fits], [0.05, 0.95]) for name in names}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def read_points(directory: Path) -> list[Point]:
    """The losses that a recovery measured, at tokens above 0.

    Raises:
        AptError: there is no report of a recovery, it is damaged, or its losses are divergences.
    """
    report = read_report(directory) if directory.is_dir() else None
    record: Any = (report or {}).get("recovery")
    if not record:
        raise AptError(
            f"{directory} has no report of a recovery", "name a directory that recover wrote"
        )
    if record.get("dense_loss") == 0:  # of a divergence from the dense model
        message = f"law needs models that predict the next token, unlike that of {directory}"
        raise AptError(message, "leave it out")
    try:
        training = record["training"]
        tokens_per_step, dense = float(training["tokens"]), float(record.get("dense_loss") or 0)
        size, rate = float(record["parameters_before"]), float(record["rate"])
        return [
            Point(str(directory), dense, rate, size, tokens_per_step * int(step), float(loss))
            for step, loss in training["held_back"]
            if int(step) > 0 and math.isfinite(float(loss))
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise AptError(
            f"the report in {directory} is damaged: {first_line(error)}", "recover the model again"
        ) from error
