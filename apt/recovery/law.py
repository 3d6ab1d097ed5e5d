"""The P² law of one training: the loss as a function of the tokens, and enough tokens.

    L = D_C/D^β + E

``D`` are the tokens in millions. This is one curve of the law of arXiv 2411.10272, equation 6. The
command ``apt-prune law`` fits the whole law to several recoveries.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from apt.recovery.record import Training

Array = Any  # of numpy
MILLION = 1e6
THRESHOLD = 0.01
"""Nats per token: a smaller gain from twice the tokens does not justify them."""

_LEAST_CHECKS = 5  # measurements before the first fit of the law
_STARTS = 8
_EVALUATIONS = 200  # of the residuals for each start: a fit of a flat curve may not converge
_FREE = ("gamma", "delta", "E")  # the other parameters are positive: their logarithms are fitted
_START = {
    "D_C": -1.0, "beta": -1.0, "E": 0.1, "gamma": 0.0, "delta": 0.0, "N_C": -1.0, "alpha": -1.0,
}  # fmt: skip


def fit(
    names: Sequence[str],
    predict: Callable[[dict[str, float]], Array],
    losses: Array,
    near: dict[str, float] | None = None,
) -> dict[str, float]:
    """Fit parameters of the law by least squares with a robust loss.

    Args:
        names: the names of the parameters, as in the equation.
        predict: a function from parameters to predicted losses.
        losses: the measured losses.
        near: parameters to start from; by default there are several starts.
    """
    from scipy.optimize import least_squares

    def values(vector: Array) -> dict[str, float]:
        pairs = zip(names, vector, strict=True)
        return {name: float(v if name in _FREE else np.exp(v)) for name, v in pairs}

    lower = [-20.0 if name in _FREE else -12.0 for name in names]
    upper = [20.0 if name in _FREE else 6.0 if name in ("D_C", "N_C") else 1.1 for name in names]
    best = None
    for start in _starts(names, near):
        clipped = np.clip(start, np.add(lower, 1e-6), np.subtract(upper, 1e-6))
        result = least_squares(
            lambda vector: predict(values(vector)) - losses, clipped, bounds=(lower, upper),
            loss="soft_l1", f_scale=0.05, max_nfev=_EVALUATIONS,
        )  # fmt: skip
        if best is None or result.cost < best.cost:
            best = result
    assert best is not None
    return values(best.x)


def _starts(names: Sequence[str], near: dict[str, float] | None) -> list[list[float]]:
    """The starts of the fit, in the scale of the fitted parameters."""
    if near is not None:
        values = ((name, near[name]) for name in names)
        return [[v if name in _FREE else math.log(max(v, 1e-12)) for name, v in values]]
    draw = np.random.default_rng(0)
    return [
        [_START[name] + (draw.normal() * 0.5 if number else 0.0) for name in names]
        for number in range(_STARTS)
    ]


def enough(size: float, beta: float, threshold: float = THRESHOLD) -> float:
    """The least tokens for which twice as many lower ``size/D^β`` by less than ``threshold``."""
    gain = size * (1 - 2**-beta)
    if gain <= 0:
        return 0.0
    power = math.log(gain / threshold) / beta
    return MILLION * math.exp(power) if power < 600 else math.inf


def enough_tokens(training: Training) -> str | None:
    """A rule that ends a training if, by the law of its curve, more tokens hardly help."""
    points = [
        (step * training.tokens, loss)
        for step, loss in training.held_back.items()
        if step and math.isfinite(loss)
    ]
    if len(points) < _LEAST_CHECKS:
        return None
    tokens = np.array([tokens / MILLION for tokens, _ in points])
    values = fit(
        ("D_C", "beta", "E"),
        lambda given: given["D_C"] * tokens ** -given["beta"] + given["E"],
        np.array([loss for _, loss in points]),
    )
    least = enough(values["D_C"], values["beta"])
    if points[-1][0] < least:
        return None
    message = f"enough tokens: the law predicts {THRESHOLD:g} nats less from twice as many"
    return f"{message} as {least:,.0f}"
