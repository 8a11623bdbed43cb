"""Line and bar charts as inline SVG, with round ticks and a legend."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

WIDTH, HEIGHT = 640, 220  # of a chart in SVG units
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 8, 34  # margins around the plot
Points = Sequence[tuple[float, float]]
STYLE = """
svg{width:100%;height:auto}.grid{stroke:#ddd}.axis{fill:#666;font-size:11px}
.a{stroke:#2563eb;fill:none;stroke-width:1.6}.faint{stroke:#93b4f5;fill:none}.b{stroke:#dc2626;fill:none;stroke-width:1.6}
.bar{fill:#2563eb}.legend{color:#666;font-size:.85rem;margin:0}
.legend svg{width:1.6rem;height:.7rem;margin:0 .3rem 0 1rem}
@media(prefers-color-scheme:dark){.grid{stroke:#333}.axis,.legend{fill:#999;color:#999}}
"""


@dataclass(frozen=True)
class Series:
    """A line, or with `dots` its points: `kind` is its CSS class, `name` its entry in the legend."""

    name: str
    points: Points
    kind: str = "a"
    dots: bool = False


@dataclass(frozen=True)
class _Axes:
    """From values to SVG units, over ranges that begin and end at round numbers."""

    left: float
    right: float
    low: float
    high: float

    def position(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.left) / ((self.right - self.left) or 1)
        up = (y - self.low) / ((self.high - self.low) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def line_chart(title: str, series: Sequence[Series], x_name: str = "step") -> str:
    """The series in one chart, without points that are NaN or infinite; "" if there are none left."""
    finite = [replace(one, points=[(x, y) for x, y in one.points if math.isfinite(y)]) for one in series]
    shown = [one for one in finite if one.points]
    points = [point for one in shown for point in one.points]
    if not points:
        return ""
    y_ticks = round_ticks(min(y for _, y in points), max(y for _, y in points))
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    x_ticks = [tick for tick in round_ticks(left, right, 8) if left <= tick <= right] or [left]
    axes = _Axes(left, right, y_ticks[0], y_ticks[-1])
    body = _grid(axes, x_ticks, y_ticks, x_name) + "".join(_draw(axes, one) for one in shown)
    return f"<h2>{html.escape(title)}</h2>{_svg(body)}{_legend(shown)}"


def bar_chart(title: str, bars: Sequence[tuple[int, int]], x_name: str) -> str:
    """Bars of (upper bound, count); "" without bars."""
    if not bars:
        return ""
    y_ticks = round_ticks(0, max(count for _, count in bars))
    axes = _Axes(0, len(bars), y_ticks[0], y_ticks[-1])
    body = _grid(axes, [], y_ticks, x_name)
    for index, (bound, count) in enumerate(bars):
        (x, y), (end, bottom) = axes.position(index, count), axes.position(index + 1, 0)
        box = f'x="{x:.1f}" y="{y:.1f}" width="{(end - x) * 0.9:.1f}" height="{bottom - y:.1f}"'
        body += f'<rect class="bar" {box}><title>up to {bound}: {count}</title></rect>'
        if index % max(1, len(bars) // 8) == 0:
            body += _text((x + end) / 2, HEIGHT - BOTTOM + 14, f"{bound:g}", "middle")
    return f"<h2>{html.escape(title)}</h2>{_svg(body)}"


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def smooth(points: Points) -> list[tuple[float, float]]:
    """Mean over a window that is symmetric around each point and shrinks towards both ends, so it lags nowhere."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smoothed = []
    for index, (x, _) in enumerate(points):
        reach = min(index, len(points) - 1 - index, max(1, len(points) // 20))
        smoothed.append((x, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return smoothed


def _draw(axes: _Axes, series: Series) -> str:
    positions = [axes.position(*point) for point in series.points]
    if series.dots or len(positions) == 1:
        values = zip(positions, series.points, strict=True)
        return "".join(
            f'<circle class="{series.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{at:g}: {value:.4g}</title></circle>'
            for (x, y), (at, value) in values
        )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in positions)
    return f'<polyline class="{series.kind}" points="{path}"/>'


def _grid(axes: _Axes, x_ticks: Sequence[float], y_ticks: Sequence[float], x_name: str) -> str:
    lines = []
    for tick in y_ticks:
        _, y = axes.position(axes.left, tick)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(_text(LEFT - 6, y + 4, _number(tick), "end"))
    for tick in x_ticks:
        x, _ = axes.position(tick, axes.low)
        lines.append(_text(x, HEIGHT - BOTTOM + 14, _number(tick), "middle"))
    lines.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_name, "middle"))
    return "".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _legend(series: Sequence[Series]) -> str:
    entries = "".join(
        f'<svg viewBox="0 0 16 7">{_mark(one)}</svg>{html.escape(one.name)}' for one in series if one.name
    )
    return f'<p class="legend">{entries}</p>' if entries else ""


def _mark(series: Series) -> str:
    if series.dots:
        return f'<circle class="{series.kind}" cx="8" cy="3.5" r="3"/>'
    return f'<polyline class="{series.kind}" points="0,3.5 16,3.5"/>'


def _svg(body: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{body}</svg>'
