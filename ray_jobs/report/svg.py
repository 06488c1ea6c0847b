"""Line charts as inline SVG: curves over training steps, with error bars and marks.

A chart has a title and a description for screen readers, one tooltip per point, and one marker shape per
curve, so that curves do not differ in colour alone. Colours of text and lines come from the page.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ray_jobs.run.records import RungRow, Winner

# Units of a chart's own view box; the page scales it.
WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 58, 422, 30, 246
# Readable on both white and near-black; in order of the learning rate.
PALETTE = ("#3b82f6", "#e0861a", "#10a37f", "#d6498f", "#8b6cf0", "#c2a000", "#0fa5c4", "#e0523f")
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",  # circle
    "M-3.7-3.7h7.4v7.4h-7.4z",  # square
    "M0-5L4.8 3.6H-4.8z",  # triangle
    "M0-5.4L5.4 0L0 5.4L-5.4 0z",  # diamond
    "M-4.8-3.6H4.8L0 5z",  # triangle on its tip
)
STAR = "M0-11L2.6-3.6L10.5-3.4L4.2 1.4L6.5 8.9L0 4.4L-6.5 8.9L-4.2 1.4L-10.5-3.4L-2.6-3.6z"
CROSS = "M-5.5-5.5L5.5 5.5M-5.5 5.5L5.5-5.5"
CHARACTER = 8.3  # width of a digit of a tick label, at a phone's font size


def number(value: float | None, digits: int, error: float | None = None) -> str:
    """Format a value as `12.3 ± 0.4`; a dash if it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def describe_settings(row: RungRow | Winner) -> str:
    """Format a row's learning rate and other searched settings: `0.001, rank 8`."""
    others = (f"{name.rpartition('.')[2]} {value}" for name, value in row.settings.items())
    return ", ".join([f"{row.learning_rate:g}", *others])


@dataclass(frozen=True)
class Point:
    """A value at a step; `error` is its standard error, if known."""

    step: int
    value: float
    error: float | None = None


@dataclass(frozen=True)
class Curve:
    """A line of the chart: its finite points in step order.

    Attributes:
        color: number of its colour and marker.
        stopped: True to end the line with a cross.
        star: step of the point with a star.
        dots: whether every point has a marker and a tooltip; else only the last one, for curves of many.
    """

    label: str
    points: Sequence[Point]
    color: int
    stopped: bool = False
    star: int | None = None
    dots: bool = True


@dataclass(frozen=True)
class Chart:
    """Texts and reference lines of a chart.

    Attributes:
        name: ID of the element, unique on the page.
        unit: unit of the vertical axis.
        digits: decimal places of a value in a tooltip.
        level: name and value of a dashed horizontal line.
        mark: step and label of a dotted vertical line.
    """

    name: str
    title: str
    description: str
    unit: str
    digits: int
    level: tuple[str, float] | None = None
    mark: tuple[int, str] | None = None


@dataclass(frozen=True)
class Axes:
    """Map values to positions. Steps have a logarithmic scale, since ladders double."""

    steps: tuple[float, float]
    values: tuple[float, float]

    def x(self, step: float) -> float:
        low, high = (math.log(step) for step in self.steps)
        return LEFT + (RIGHT - LEFT) * ((math.log(step) - low) / (high - low) if high > low else 0.5)

    def y(self, value: float) -> float:
        low, high = self.values
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that cover low..high, low < high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    apart = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.floor(low / apart), math.ceil(high / apart)
    return [round(number * apart, 12) for number in range(first, last + 1)]


def _round_steps(low: float, high: float) -> list[int]:
    """1, 2 or 5 times a power of ten from low to high, with both."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [int(factor * 10**power) for power in powers for factor in (1, 2, 5)]
    return sorted({int(low), *(step for step in found if low < step < high), int(high)})


def line_chart(chart: Chart, curves: Sequence[Curve]) -> str:
    """Draw a figure with its legend; without any points, return a sentence that says so."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        return f'<p class="note">{escape(chart.title)}: no value is finite.</p>'
    spread = [point.value + sign * (point.error or 0.0) for point in points for sign in (-1, 1)]
    spread += [chart.level[1]] if chart.level and math.isfinite(chart.level[1]) else []
    low, high = min(spread), max(spread)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    grid = ticks(low, high)
    axes = Axes(
        (min(point.step for point in points), max(point.step for point in points)), (grid[0], grid[-1])
    )
    marked = sorted({point.step for curve in curves if curve.dots for point in curve.points})
    parts = [_grid(axes, grid, marked or _round_steps(*axes.steps), chart.unit)]
    if chart.level and math.isfinite(chart.level[1]):
        at = axes.y(chart.level[1])
        parts.append(f'<line class="level" x1="{LEFT}" x2="{RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    if chart.mark:
        parts.append(_mark(axes, chart.mark))
    parts += [_curve(axes, chart, curve) for curve in curves]
    return framed(chart.name, chart.title, chart.description, "".join(parts), _legend(chart, curves))


def framed(name: str, title: str, description: str, content: str, legend: str, height: float = HEIGHT) -> str:
    """Compose a figure: the drawing with its title and description, its caption, and its legend."""
    return (
        f'<figure class="chart" id="{name}"><figcaption>{escape(title)}</figcaption>'
        f'<svg role="img" aria-labelledby="{name}-title {name}-desc" viewBox="0 0 {WIDTH} {height:g}">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
        f"{content}</svg>{legend}</figure>"
    )


def _grid(axes: Axes, grid: Sequence[float], steps: Sequence[int], unit: str) -> str:
    parts = [f'<text x="4" y="10" class="unit">{escape(unit)}</text>']
    for value in grid:
        at = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:,g}</text>')
    free = -math.inf
    for step in steps:
        at, label = axes.x(step), f"{step:,}"
        parts.append(f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        half = CHARACTER * len(label) / 2
        if at - half > free:  # label only ticks with enough space
            parts.append(f'<text x="{at:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{label}</text>')
            free = at + half + CHARACTER
    parts.append(
        f'<text x="{(LEFT + RIGHT) / 2:g}" y="{BOTTOM + 36}" text-anchor="middle">training steps</text>'
    )
    return "".join(parts)


def _mark(axes: Axes, mark: tuple[int, str]) -> str:
    step, words = mark
    at = axes.x(step)
    anchor, side = ("end", -5) if at > (LEFT + RIGHT) / 2 else ("start", 5)
    return (
        f'<g class="mark"><line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{BOTTOM}"/>'
        f'<text x="{at + side:.1f}" y="{TOP + 10}" text-anchor="{anchor}">{escape(words)}</text></g>'
    )


def _curve(axes: Axes, chart: Chart, curve: Curve) -> str:
    line = " ".join(f"{axes.x(point.step):.1f},{axes.y(point.value):.1f}" for point in curve.points)
    parts = [f'<polyline points="{line}"/>']
    for point in curve.points if curve.dots else curve.points[-1:]:
        x, y = axes.x(point.step), axes.y(point.value)
        value = number(point.value, chart.digits, point.error)
        says = f"{curve.label}, {point.step:,} steps: {value}"
        if point.error is not None:
            top, foot = axes.y(point.value + point.error), axes.y(point.value - point.error)
            bar = f"M{x:.1f} {top:.1f}V{foot:.1f}M{x - 4:.1f} {top:.1f}h8M{x - 4:.1f} {foot:.1f}h8"
            parts.append(f'<path class="error" d="{bar}"/>')
        shape, kind = (STAR, "star") if point.step == curve.star else (MARKERS[curve.color % 5], "point")
        place = f'transform="translate({x:.1f} {y:.1f})"'
        parts.append(f'<path class="{kind}" d="{shape}" {place}><title>{escape(says)}</title></path>')
        if curve.stopped and point is curve.points[-1]:
            parts.append(f'<path class="stopped" d="{CROSS}" {place}/>')
    return f'<g class="curve" style="color:{PALETTE[curve.color % len(PALETTE)]}">{"".join(parts)}</g>'


def _legend(chart: Chart, curves: Sequence[Curve]) -> str:
    def entry(color: str, drawing: str, words: str) -> str:
        box = '<svg viewBox="-12 -8 24 16" aria-hidden="true">'
        return f'<li style="color:{color}">{box}{drawing}</svg><span>{escape(words)}</span></li>'

    entries = [
        entry(
            PALETTE[curve.color % len(PALETTE)],
            f'<path class="sample" d="M-12 0H12"/><path class="point" d="{MARKERS[curve.color % 5]}"/>',
            curve.label + (" (stopped)" if curve.stopped else ""),
        )
        for curve in curves
    ]
    if chart.level:
        entries.append(entry("inherit", '<path class="sample level" d="M-12 0H12"/>', chart.level[0]))
    return f'<ul class="legend">{"".join(entries)}</ul>'
