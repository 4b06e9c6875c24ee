"""Line charts as SVG, written by hand: a chart of a few curves is no reason for a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 780, 440
LEFT, RIGHT, TOP, BOTTOM = 76, 210, 42, 52
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")


@dataclass(frozen=True)
class Curve:
    """Points (x, y), in order of x; ``errors`` are half-lengths of error bars, one a point."""

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()
    dashed: bool = False


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most ``most`` steps apart."""
    span = (high - low) or 1.0
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= most)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def log_axis(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis, the first no higher than ``low`` and the last no lower than ``high``, which
    are above 0."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    round_ones = [m * 10.0**n for n in decades for m in (1, 2, 5)]
    first = max(v for v in round_ones if v <= low * (1 + 1e-9))
    last = min(v for v in round_ones if v >= high * (1 - 1e-9) and v > first)
    inside = [v for v in round_ones if first <= v <= last]
    if len(inside) < 4:
        return ticks(first, last)
    # what is between tens goes first where it is too much
    return inside if len(inside) <= 8 else [v for v in inside if v in (first, last) or f"{v:e}"[0] == "1"]


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    curves: Sequence[Curve],
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    y_percent: bool = False,
    y_log: bool = False,
    marks: Sequence[float] = (),
) -> str:
    """An SVG document. ``x_range`` and ``y_range`` (default: all points, and 0) are what the axes show.

    With ``y_percent`` values are shares, shown as percentages; with ``y_log`` the y axis is logarithmic, and values are
    above 0. ``marks`` are places on the x axis with a line upwards. Raises ValueError if there is no point.
    """
    points = [point for curve in curves for point in curve.points]
    if not points:
        raise ValueError("nothing to draw")
    x_low, x_high = x_range or (min(x for x, _ in points), max(x for x, _ in points))
    x_high = x_high if x_high > x_low else x_low + 1
    if y_log:
        y_ticks = log_axis(min(y for _, y in points), max(y for _, y in points))
        y_low, y_high = y_ticks[0], y_ticks[-1]
    else:
        y_low, y_high = y_range or (min(0.0, *(y for _, y in points), 0.0), max(y for _, y in points))
        y_high = y_high if y_high > y_low else y_low + 1
        y_ticks = ticks(y_low, y_high)
    scale: Callable[[float], float] = math.log if y_log else float

    def place(x: float, y: float) -> tuple[float, float]:
        across = (min(max(x, x_low), x_high) - x_low) / (x_high - x_low)
        y = min(max(y, y_low), y_high)
        up = (scale(y) - scale(y_low)) / (scale(y_high) - scale(y_low))
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#222"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 22, title, size=15),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label, anchor="middle"),
        f'<g transform="rotate(-90 14 {HEIGHT / 2:.0f})">'
        + _text(14, HEIGHT / 2, y_label, anchor="middle")
        + "</g>",
    ]
    for value in marks:
        x, _ = place(value, y_low)
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#bbb" stroke-dasharray="2 3"/>')
    for value in y_ticks:
        _, y = place(x_low, value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        label = f"{100 * value:.4g} %" if y_percent else f"{value:,.6g}"
        parts.append(_text(LEFT - 8, y + 4, label, anchor="end"))
    for value in ticks(x_low, x_high, 8):
        x, y = place(value, y_low)
        parts.append(f'<path d="M{x:.1f} {y:.1f}v5" stroke="#222"/>')
        parts.append(_text(x, y + 19, f"{value:,.6g}", anchor="middle"))
    parts.append(f'<path d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}" stroke="#222"/>')
    for number, curve in enumerate(curves):
        parts += _drawn(curve, COLOURS[number % len(COLOURS)], [place(*point) for point in curve.points])
        parts += _bars(curve, COLOURS[number % len(COLOURS)], place)
        y = TOP + 10 + 20 * number
        parts.append(_line(f"M{WIDTH - RIGHT + 12} {y}h22", COLOURS[number % len(COLOURS)], curve.dashed))
        parts.append(_text(WIDTH - RIGHT + 40, y + 4, curve.name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def write(path: Path, chart: str) -> None:
    """Writes an SVG document, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(chart, "utf-8")


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _line(path: str, colour: str, dashed: bool) -> str:
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'


def _drawn(curve: Curve, colour: str, placed: Sequence[tuple[float, float]]) -> list[str]:
    parts = [_line("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed), colour, curve.dashed)]
    if len(placed) <= 40:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
    return parts


def _bars(curve: Curve, colour: str, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    parts = []
    for (x, y), error in zip(curve.points, curve.errors, strict=False):
        (at, low), (_, high) = place(x, y - error), place(x, y + error)
        parts.append(f'<path d="M{at:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>')
    return parts
