"""Charts as SVG text: lines over ordered places, intervals, squares of shares. Nothing but strings, none to install."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from metarec_fast.text import printable

# Okabe and Ito's colours, distinguishable by the colour-blind too
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#888888")
DASHES = ("", "6 3", "2 2")
MOST_PLACES = 12  # that are named under a chart


class Point(NamedTuple):
    """A value at a named place."""

    place: str
    value: float


class Interval(NamedTuple):
    """A value with its interval; strong ones are filled."""

    label: str
    value: float
    low: float
    high: float
    strong: bool = False


class Band(NamedTuple):
    """A range of values behind the lines."""

    label: str
    low: float
    high: float


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers in [low, high]."""
    if not low < high:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= min((1, 2, 5, 10), key=lambda m: abs((high - low) / (m * step) - count))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(
    lines: Mapping[str, Sequence[Point]],
    *,
    title: str,
    y_from_zero: bool = False,
    band: Band | None = None,
    width: int = 720,
    height: int = 340,
) -> str:
    """Lines over places in the order in which they come up. Raises ValueError for nothing to draw."""
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("lines must hold at least one point, got none")
    places = list(dict.fromkeys(point.place for point in points))
    values = [p.value for p in points] + ([] if band is None else [band.low, band.high])
    low, high = 0.0 if y_from_zero else min(values), max(values)
    high = high if high > low else low + 1
    legend = 18 * (len(lines) + (band is not None))
    left, right, top, bottom = 60, 20, 34, 30 + legend
    height += legend
    across = (width - left - right) / max(1, len(places))
    x = {place: left + across * (i + 0.5) for i, place in enumerate(places)}

    def y(value: float) -> float:
        return height - bottom - (value - low) / (high - low) * (height - top - bottom)

    parts = [_text(left, 20, title, bold=True)]
    if band is not None:
        parts.append(_rectangle(left, y(band.high), width - left - right, y(band.low) - y(band.high), "#e8e8e8"))
    for tick in ticks(low, high):
        parts.append(_line(left, y(tick), width - right, y(tick), "#ddd"))
        parts.append(_text(left - 6, y(tick) + 4, f"{tick:.6g}", anchor="end"))
    every = -(-len(places) // MOST_PLACES)
    named = places[every - 1 :: every]
    parts += [_text(x[place], height - bottom + 16, place, anchor="middle") for place in named]
    for i, (name, line) in enumerate(lines.items()):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        path = " ".join(f"{x[p.place]:.1f},{y(p.value):.1f}" for p in line)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        parts += [f'<circle cx="{x[p.place]:.1f}" cy="{y(p.value):.1f}" r="3" fill="{colour}"/>' for p in line]
        at = height - bottom + 36 + 18 * i
        parts.append(_line(left, at - 4, left + 24, at - 4, colour, 2))
        parts.append(_text(left + 30, at, name))
    if band is not None:
        at = height - bottom + 36 + 18 * len(lines)
        parts += [_rectangle(left, at - 10, 24, 12, "#e8e8e8"), _text(left + 30, at, band.label)]
    return _svg(parts, width, height)


def interval_chart(rows: Sequence[Interval], *, title: str, percent: bool = False, width: int = 860) -> str:
    """One row an interval, with a line at zero. Raises ValueError for nothing to draw."""
    if not rows:
        raise ValueError("rows must hold at least one interval, got none")
    low, high = min(0.0, *(r.low for r in rows)), max(0.0, *(r.high for r in rows))
    if low == high:
        low, high = -1.0, 1.0
    left, right, top, each = 430, 90, 54, 20
    height = top + each * len(rows) + 14

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    parts = [_text(14, 20, title, bold=True)]
    for tick in ticks(low, high):
        parts.append(_line(x(tick), top - 8, x(tick), height - 12, "#ddd"))
        parts.append(_text(x(tick), top - 14, f"{tick:+.0%}" if percent else f"{tick:.4g}", anchor="middle"))
    parts.append(_line(x(0), top - 8, x(0), height - 12, "#444"))
    for i, row in enumerate(rows):
        at = top + each * (i + 0.5)
        colour = COLOURS[0] if row.value >= 0 else COLOURS[1]
        parts.append(_text(14, at + 4, shorten(row.label, 66)))
        parts.append(_line(x(row.low), at, x(row.high), at, colour, 2))
        fill = colour if row.strong else "#fff"
        parts.append(f'<circle cx="{x(row.value):.1f}" cy="{at:.1f}" r="4" fill="{fill}" stroke="{colour}"/>')
        parts.append(_text(width - right + 16, at + 4, f"{row.value:+.1%}" if percent else f"{row.value:.4g}"))
    return _svg(parts, width, height)


def heat_map(names: Sequence[str], shares: Sequence[Sequence[float]], *, title: str, cell: int = 64) -> str:
    """A square of shares in [0, 1] between all pairs of names; columns by number. Raises ValueError otherwise."""
    if not names or any(len(row) != len(names) for row in (shares, *shares)):
        raise ValueError(f"shares must be a square over {len(names)} names, at least one")
    labels = [f"{printable(name)}  {i}" for i, name in enumerate(names, 1)]
    left, top = 30 + 7 * max(map(len, labels)), 60
    parts = [_text(14, 20, title, bold=True)]
    for i, (label, row) in enumerate(zip(labels, shares, strict=True)):
        middle = top + cell * (i + 0.5)
        parts.append(_text(left - 8, middle + 4, label, anchor="end"))
        parts.append(_text(left + cell * (i + 0.5), top - 10, f"{i + 1}", anchor="middle"))
        for j, share in enumerate(row):
            # from white to the first colour; the figure stands on it in what can be read there
            mixed = "".join(f"{round(255 + (c - 255) * share):02x}" for c in bytes.fromhex(COLOURS[0][1:]))
            parts.append(_rectangle(left + cell * j, top + cell * i, cell - 2, cell - 2, f"#{mixed}"))
            ink = "#fff" if share > 0.6 else "#000"
            parts.append(_text(left + cell * (j + 0.5), middle + 4, f"{share:.2f}", anchor="middle", fill=ink))
    return _svg(parts, max(left + cell * len(names) + 14, 14 + 8 * len(title)), top + cell * len(names) + 14)


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(0, length - 1)] + "…"


def _svg(parts: Sequence[str], width: float, height: float) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    style = 'font-family="sans-serif" font-size="12"'
    return "\n".join([f"{head} {style}>", '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"])


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False, fill: str = "#000") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}"{weight}>{escape(printable(text))}</text>'
    )


def _rectangle(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'
