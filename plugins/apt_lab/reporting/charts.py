"""Small charts as SVG, which follow the colours of the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from apt_lab.windows import Spread

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 220, 64, 34, 10


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name and its points."""

    name: str
    points: Sequence[tuple[float, float]]


class Bar(NamedTuple):
    """A bar of a chart: its name, its value, and the spread of the value if it is known."""

    name: str
    value: float
    spread: Spread | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the 95 % interval; the value twice if the interval is unknown."""
        spread = self.spread
        return (self.value, self.value) if spread is None else (spread.low, spread.high)


def line_chart(title: str, lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """A chart of lines, with a legend if there are several."""
    points = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if len(points) < 2:
        return ""
    xs, ys = _scale([x for x, _ in points]), _scale([y for _, y in points])
    parts = [_axis(xs, ys, x_label, y_label)]
    for number, line in enumerate(lines):
        path = " ".join(
            f"{_x(x, xs):.1f},{_y(y, ys):.1f}" for x, y in line.points if math.isfinite(y)
        )
        parts.append(f'<polyline class="line line{number % 4}" points="{path}"/>')
    return _svg(title, "".join(parts)) + _legend(lines)


def bar_chart(title: str, bars: Sequence[Bar], unit: str) -> str:
    """Horizontal bars with their values and intervals. A value that is not finite has no bar."""
    if not bars:
        return ""
    finite = [end for bar in bars for end in bar.ends if math.isfinite(end)]
    most = max(finite, default=0) or 1
    parts = [_bar(bar, 26 * number, most, unit) for number, bar in enumerate(bars)]
    return _svg(title, "".join(parts), 26 * len(bars) + 4)


def _bar(bar: Bar, y: int, most: float, unit: str) -> str:
    """A bar at the height ``y``; the largest value is 360 wide."""
    name = f'<text x="190" y="{y + 17}" class="name">{escape(_shortened(bar.name))}</text>'
    if not math.isfinite(bar.value):
        return f'{name}<text x="206" y="{y + 17}" class="value">{bar.value}</text>'
    width, low, high = (360 * max(value, 0) / most for value in (bar.value, *bar.ends))
    value = f"{bar.value:,.0f}" if abs(bar.value) >= 1000 else f"{bar.value:.4g}"
    parts = [
        name,
        f'<rect x="200" y="{y + 4}" width="{max(width, 1):.1f}" height="18" class="bar"/>',
        f'<text x="{206 + high:.1f}" y="{y + 17}" class="value">{value} {unit}</text>',
    ]
    if high > low:
        parts.append(
            f'<path class="interval" d="M{200 + low:.1f},{y + 13} H{200 + high:.1f}'
            f' M{200 + low:.1f},{y + 9} v8 M{200 + high:.1f},{y + 9} v8"/>'
        )
    return "".join(parts)


def _shortened(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"


def _svg(title: str, content: str, height: int = _HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{content}</svg>"
    )


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    items = "".join(
        f'<li><span class="key key{number % 4}"></span>{escape(line.name)}</li>'
        for number, line in enumerate(lines)
    )
    return f'<ul class="legend">{items}</ul>'


def _scale(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _x(value: float, scale: tuple[float, float]) -> float:
    return _LEFT + (value - scale[0]) / (scale[1] - scale[0]) * (_WIDTH - _LEFT - 10)


def _y(value: float, scale: tuple[float, float]) -> float:
    height = _HEIGHT - _BOTTOM - _TOP
    return _TOP + (1 - (value - scale[0]) / (scale[1] - scale[0])) * height


def _axis(xs: tuple[float, float], ys: tuple[float, float], x_label: str, y_label: str) -> str:
    """The frame, with the ends and the middle of both scales."""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - 10
    parts = [f'<path class="axis" d="M{_LEFT},{_TOP} V{bottom} H{right}"/>']
    for fraction, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x, y = xs[0] + fraction * (xs[1] - xs[0]), ys[0] + fraction * (ys[1] - ys[0])
        parts.append(
            f'<text x="{_x(x, xs):.1f}" y="{bottom + 15}" text-anchor="{anchor}">{x:,.4g}</text>'
            f'<text x="{_LEFT - 6}" y="{_y(y, ys) + 4:.1f}" text-anchor="end">{y:,.4g}</text>'
        )
    middle = (_LEFT + right) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(f'<text x="{_LEFT + 6}" y="{_TOP + 10}">{escape(y_label)}</text>')
    return "".join(parts)
