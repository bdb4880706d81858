"""Charts as inline SVG: colours come from the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 420
"""Units of a chart's width; small, so that its text stays readable on a phone."""
LEFT, RIGHT, TOP, BOTTOM = 60, 10, 10, 34


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: of the legend.
        points: (x, y); a y of NaN or infinity is left out.
        style: class of the style sheet, such as "s1" or "faint".
        right: whether y belongs to the axis at the right.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "s1"
    right: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar: name, value, half width of its interval (None where there is none), class of the style sheet."""

    name: str
    value: float
    interval: float | None = None
    style: str = "s1"


def line_chart(
    lines: Sequence[Line], *, title: str, x_label: str, y_label: str, right_label: str = "", height: int = 220
) -> str:
    """Lines over a common x axis, with an axis at the right where one of them asks for it."""
    kept = [
        (line, [(x, y) for x, y in line.points if math.isfinite(y)]) for line in lines if any(map(_finite, line.points))
    ]
    if not kept:
        return '<p class="quiet">Nothing to draw.</p>'
    two = any(line.right for line, _ in kept)
    right = WIDTH - (LEFT if two else RIGHT)
    xs = [x for _, points in kept for x, _ in points]
    to_x = _scale(min(xs), max(xs), LEFT, right)
    parts = []
    for at_right in (False, True):
        ys = [y for line, points in kept if line.right == at_right for _, y in points]
        if not ys:
            continue
        ticks = nice_ticks(min(0.0, *ys), max(ys))
        to_y = _scale(ticks[0], ticks[-1], height - BOTTOM, TOP)
        for tick in ticks:
            y = to_y(tick)
            if not at_right:
                parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            side = f'x="{right + 5}"' if at_right else f'x="{LEFT - 5}" text-anchor="end"'
            parts.append(f'<text {side} y="{y + 4:.1f}">{number(tick)}</text>')
        for line, points in kept:
            if line.right == at_right:
                path = "M" + "L".join(f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in thinned(points))
                parts.append(f'<path class="line {line.style}" d="{path}"/>')
    for tick in nice_ticks(min(xs), max(xs)):
        if min(xs) <= tick <= max(xs):
            parts.append(f'<text x="{to_x(tick):.1f}" y="{height - 18}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text class="name" x="{(LEFT + right) / 2}" y="{height - 3}" text-anchor="middle">{x_label}</text>')
    left_name = f'<text class="name" transform="translate(10 {(height - BOTTOM) / 2}) rotate(-90)"'
    parts.append(f'{left_name} text-anchor="middle">{y_label}</text>')
    if two and right_label:
        right_name = f'<text class="name" transform="translate({WIDTH - 4} {(height - BOTTOM) / 2}) rotate(-90)"'
        parts.append(f'{right_name} text-anchor="middle">{right_label}</text>')
    shown = [(line.name, line.style) for line, _ in kept if line.name]
    return _figure(parts, title, height) + (legend(shown) if len(shown) > 1 else "")


def bar_chart(bars: Sequence[Bar], *, title: str, unit: str = "", low: float = 0.0, digits: int = 1) -> str:
    """Horizontal bars, each with its name above it and its value at its end, with a whisker for its interval."""
    top = max((bar.value + (bar.interval or 0) for bar in bars), default=1.0)
    bottom = min([low, *(bar.value for bar in bars)])
    to_x = _scale(bottom, top if top > bottom else bottom + 1, 2, WIDTH - 112)
    parts, y, zero = [], 2, to_x(max(bottom, 0.0))
    for bar in bars:
        end = to_x(bar.value)
        parts.append(f'<text class="label" x="2" y="{y + 12}">{escape(bar.name)}</text>')
        start, width = min(zero, end), max(abs(end - zero), 1)
        parts.append(f'<rect class="bar {bar.style}" x="{start:.1f}" y="{y + 17}" width="{width:.1f}" height="14"/>')
        text, after = f"{bar.value:.{digits}f}{unit}", end
        if bar.interval is not None and math.isfinite(bar.interval):
            first, last = to_x(max(bar.value - bar.interval, bottom)), to_x(bar.value + bar.interval)
            parts.append(f'<path class="whisker" d="M{first:.1f} {y + 24}H{last:.1f}M{last:.1f} {y + 20}v8"/>')
            text, after = f"{text} ± {bar.interval:.{digits}f}", last
        parts.append(f'<text class="value" x="{max(after, zero) + 5:.1f}" y="{y + 28}">{text}</text>')
        y += 40
    return _figure(parts, title, y)


def scatter(points: Sequence[tuple[float, float]], styles: Sequence[str], *, title: str, side: int = 260) -> str:
    """Points in a square without axes.

    Args:
        points: (x, y).
        styles: for each point a class of the style sheet, or a colour such as "#a0b0c0".
        title: for those who cannot see it.
        side: units.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    to_x, to_y = _scale(min(xs), max(xs), 6, side - 6), _scale(min(ys), max(ys), 6, side - 6)
    parts = [f'<rect class="frame" x="0.5" y="0.5" width="{side - 1}" height="{side - 1}"/>']
    for (x, y), style in zip(points, styles, strict=True):
        look = f'fill="{style}"' if style.startswith("#") else f'class="dot {style}"'
        parts.append(f'<circle cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="3.4" {look}/>')
    return _figure(parts, title, side, side)


def heat_map(rows: Sequence[Sequence[float]], names: Sequence[str], *, title: str) -> str:
    """A square table of shares 0 to 1, a row for each truth and a column for each answer."""
    n, left = len(names), 92
    cell = max(14.0, min(44.0, (WIDTH - left - 2) / n))
    top, parts = 20 if n <= 12 else 4, []
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + i * cell
        parts.append(f'<text x="{left - 6}" y="{y + cell / 2 + 4:.1f}" text-anchor="end">{escape(_short(name))}</text>')
        if n <= 12:
            x = left + (i + 0.5) * cell
            parts.append(f'<text x="{x:.1f}" y="14" text-anchor="middle">{escape(_short(name, 5))}</text>')
        for j, share in enumerate(row):
            x = left + j * cell
            tip = f"{escape(names[i])} taken for {escape(names[j])}: {100 * share:.1f} %"
            kind = "cell right" if i == j else "cell wrong"
            box = f'x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}"'
            parts.append(
                f'<rect class="{kind}" {box} fill-opacity="{max(share, 0.04):.3f}"><title>{tip}</title></rect>'
            )
            if cell >= 26:
                where = f'x="{x + cell / 2 - 0.5:.1f}" y="{y + cell / 2 + 4:.1f}" text-anchor="middle"'
                dark = " over" if share > 0.5 else ""
                parts.append(f'<text class="share{dark}" {where}>{100 * share:.0f}</text>')
    return _figure(parts, title, math.ceil(top + n * cell + 2))


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Names with a patch of their colour."""
    keys = "".join(f'<li><span class="key {style}"></span>{escape(name)}</li>' for name, style in entries)
    return f'<ul class="legend">{keys}</ul>'


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / about))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's label: at most three digits, no exponent between 0.001 and 100,000."""
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1000 else f"{value:g}"


def thinned(points: Sequence[tuple[float, float]], most: int = 400) -> Sequence[tuple[float, float]]:
    """At most `most` of them, evenly chosen; all where there are fewer."""
    every = math.ceil(len(points) / most)
    return points[::every] if every > 1 else points


def _finite(point: tuple[float, float]) -> bool:
    return math.isfinite(point[1])


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (stop - start) * (value - low) / span


def _short(name: str, most: int = 13) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _figure(parts: Sequence[str], title: str, height: float, width: int = WIDTH) -> str:
    label = escape(title)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
