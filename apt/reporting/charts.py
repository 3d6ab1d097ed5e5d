"""Small charts as SVG, which follow the colours of the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 220, 64, 34, 10


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name and its points."""

    name: str
    points: Sequence[tuple[float, float]]


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


def bar_chart(title: str, bars: Sequence[tuple[str, float]], unit: str) -> str:
    """Horizontal bars with their values."""
    if not bars:
        return ""
    most, row = max((value for _, value in bars), default=0) or 1, 26
    parts = []
    for number, (name, value) in enumerate(bars):
        y, width = number * row, 360 * value / most
        parts.append(
            f'<text x="190" y="{y + 17}" class="name">{escape(_shortened(name))}</text>'
            f'<rect x="200" y="{y + 4}" width="{max(width, 1):.1f}" height="18" class="bar"/>'
            f'<text x="{206 + width:.1f}" y="{y + 17}" class="value">{value:,.3g} {unit}</text>'
        )
    return _svg(title, "".join(parts), row * len(bars) + 4)


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
    for place, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x, y = xs[0] + place * (xs[1] - xs[0]), ys[0] + place * (ys[1] - ys[0])
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
