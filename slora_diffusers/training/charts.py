"""Line and bar charts as SVG text, for a page that needs neither a script nor another file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

Point = tuple[float, float]
Curves = Mapping[str, Sequence[Point]]

_COLOURS = ("#2f6fb3", "#c2541c", "#2e8b57", "#8e5ab5", "#b8860b", "#c03a6b")
STYLE = """
.chart { display: block; width: 100% } .chart text { fill: var(--faint, #69707a); font-size: 11px }
.chart line { stroke: var(--line, #dfe3e8) } .chart path { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.chart path.faint { opacity: .3; stroke-width: 1 }
.legend { color: var(--faint, #69707a); display: flex; flex-wrap: wrap; font-size: .8rem; gap: .2rem .9rem;
  margin: .3rem 0 0 }
.legend i { border-radius: 2px; display: inline-block; height: .6rem; margin-right: .35rem; width: .9rem }
""" + "".join(
    f".chart path.c{n} {{ stroke: {colour} }} .chart .c{n}:not(path) {{ fill: {colour} }} "
    f".legend .c{n} {{ background: {colour} }}\n"
    for n, colour in enumerate(_COLOURS)
)
"""What a page with charts needs among its styles."""

WIDTH, HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 30
MOST_POINTS = 600
"""Points of a curve that are drawn: more than pixels are no use, and a page of a long run stays small."""


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many points: of every stretch the lowest and the highest, so that no peak is lost; and the last."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // (most // 2 - 1))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = [p for p in points[start : start + size] if math.isfinite(p[1])] or [points[start]]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The exponential moving average over about a thirtieth of the points, without the pull of the first value."""
    decay = 1 - 1 / max(1.0, len(points) / 30)
    total = weight = 0.0
    found = []
    for x, y in points:
        if math.isfinite(y):
            total, weight = decay * total + (1 - decay) * y, decay * weight + (1 - decay)
            found.append((x, total / weight))
    return found


def line_chart(curves: Curves, label: str, smooth: bool = False, shown: Sequence[float] = ()) -> str:
    """Curves over the steps, one colour each, with a legend where there are several.

    Args:
        curves: {name: its points (x, y)}; a y that is not finite is a gap.
        label: What the chart shows, for those who cannot see it.
        smooth: Draw the moving average over the points themselves, which are then faint.
        shown: Further values that the y axis has to reach, such as 0.
    """
    finite = [(x, y) for points in curves.values() for x, y in points if math.isfinite(y)]
    if not finite:
        return "<p>no finite number yet</p>"
    plot = _Plot([x for x, _ in finite], [*shown, *(y for _, y in finite)])
    parts = []
    for number, points in enumerate(curves.values()):
        colour = f"c{number % 6}"
        parts.append(plot.line(thinned(points), f"{colour} faint" if smooth else colour))
        if smooth:
            parts.append(plot.line(thinned(smoothed(points)), colour))
        elif len(points) <= 40:
            parts += [plot.dot(point, colour) for point in points if math.isfinite(point[1])]
    legend = "" if len(curves) < 2 else _legend(list(curves))
    return _svg(plot.axes() + "".join(parts), label) + legend


def bar_chart(bars: Mapping[str, Mapping[str, float]], label: str) -> str:
    """Bars side by side: {place on the axis: {name: height}}, one colour for each name, with a legend."""
    names = list(dict.fromkeys(name for values in bars.values() for name in values))
    heights = [v for values in bars.values() for v in values.values() if math.isfinite(v)]
    if not heights:
        return "<p>no finite number yet</p>"
    plot, parts = _Plot([0, len(bars)], [0.0, *heights], digits=False), []
    wide = 0.8 / max(1, len(names))
    room = (WIDTH - _LEFT - _RIGHT) / len(bars)
    every = max(1, math.ceil((6 * max(map(len, bars)) + 8) / room))  # labels of 6 pixels a letter side by side
    for place, (block, values) in enumerate(bars.items()):
        for number, name in enumerate(names):
            value = values.get(name, math.nan)
            if math.isfinite(value):
                x, y = plot.x(place + 0.1 + number * wide), plot.y(value)
                width = plot.x(wide) - plot.x(0)
                title = f"<title>{escape(f'{block}, {name}: {value:.4g}')}</title>"
                parts.append(
                    f'<rect class="c{number % 6}" x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" '
                    f'height="{plot.y(0) - y:.1f}">{title}</rect>'
                )
        if place % every == 0:
            parts.append(_text(plot.x(place + 0.5), HEIGHT - 10, block, "middle"))
    return _svg(plot.axes() + "".join(parts), label) + _legend(names)


class _Plot:
    """Where numbers lie in the picture: the x axis spans the data; the y axis too, or decades of it."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], digits: bool = True) -> None:
        self._digits = digits
        self.left, self.right = min(xs), max(xs)
        if self.left == self.right:
            self.left, self.right = self.left - 1, self.right + 1
        low, high = min(ys), max(ys)
        self.log = low > 0 and high / low > 50
        if self.log:
            low, high = math.log10(low), math.log10(high)
        if high - low <= 1e-9 * max(abs(high), abs(low)):  # one value: a line in the middle
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        self.low, self.high = low, high

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return HEIGHT - _BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - _TOP - _BOTTOM)

    def line(self, points: Sequence[Point], style: str) -> str:
        """A curve, with gaps where it is not finite."""
        path = "".join(
            f"{'L' if drawn else 'M'}{self.x(x):.1f} {self.y(y):.1f}"
            for drawn, (x, y) in zip(_follows(points), points, strict=True)
            if math.isfinite(y)
        )
        return f'<path class="{style}" d="{path}"/>'

    def dot(self, point: Point, style: str) -> str:
        """A point of a curve that says its numbers when it is pointed at."""
        title = f"<title>step {point[0]:g}: {point[1]:.5g}</title>"
        return f'<circle class="{style}" cx="{self.x(point[0]):.1f}" cy="{self.y(point[1]):.1f}" r="3">{title}</circle>'

    def axes(self) -> str:
        """Lines and numbers of both axes."""
        parts = []
        values = [10.0**e for e in _decades(self.low, self.high)] if self.log else _ticks(self.low, self.high)
        for value in values:
            y = self.y(value)
            parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text(_LEFT - 6, y + 4, f"{value:.4g}", "end"))
        for value in _ticks(self.left, self.right) if self._digits else ():
            parts.append(_text(self.x(value), HEIGHT - 10, f"{value:g}", "middle"))
        return "".join(parts)


def _follows(points: Sequence[Point]) -> list[bool]:
    """Whether each point goes on from the one before it."""
    return [False, *(math.isfinite(a[1]) for a, _ in pairwise(points))] if points else []


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within a range: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Exponents for a logarithmic axis: whole ones, or finer where those are fewer than two."""
    whole = list(range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1))
    return list(whole[:: -(-len(whole) // 6)]) if len(whole) > 1 else [low, (low + high) / 2, high]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(content: str, label: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{content}</svg>'


def _legend(names: Sequence[str]) -> str:
    keys = "".join(f'<span><i class="c{number % 6}"></i>{escape(name)}</span>' for number, name in enumerate(names))
    return f'<p class="legend">{keys}</p>'
