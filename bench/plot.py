"""Plots as SVG, written by hand: bars with spreads, and lines over a logarithmic axis. With a ground of their own for dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH = 760
LEFT, RIGHT, TOP, BOTTOM = 150, 110, 64, 64
COLOURS = {
    "gatekeeper": "#0b6e4f",
    "haproxy": "#c8553d",
    "haproxy splice": "#e0a03a",
    "nginx": "#3d6fc8",
    "envoy": "#8a5fbf",
    "IPv4": "#0b6e4f",
    "IPv6": "#3d6fc8",
}
OTHER = "#777777"
Spread = tuple[float, float, float]  # p10, median, p90


def _colour(name: str) -> str:
    return COLOURS.get(name, OTHER)


def _text(x: float, y: float, words: str, anchor: str = "start", size: int = 12, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" {more}>{escape(words)}</text>'


def _frame(height: int, title: str, subtitle: str, notes: Sequence[str], parts: Sequence[str]) -> str:
    top = [_text(12, 24, title, size=15, more='font-weight="bold"'), _text(12, 43, subtitle, size=11)]
    bottom = [_text(12, height - 10 - 14 * i, note, size=10) for i, note in enumerate(reversed(notes))]
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    begin = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" fill="#222222">'
    ground = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([begin, ground, *top, *parts, *bottom, "</svg>", ""])


def ratios(title: str, subtitle: str, notes: Sequence[str], rows: Sequence[tuple[str, Mapping[str, Spread]]]) -> str:
    """Bars to the left (cheaper) and right (dearer) of 1 on a logarithmic axis: one for each peer of each scenario."""
    values = [value for _name, peers in rows for spread in peers.values() for value in spread]
    lowest, highest = min([0.7, *values]), max([1.3, *values])
    span = math.log(highest / lowest)

    def at(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / lowest) / span

    parts: list[str] = []
    y = TOP + 16
    for name, peers in rows:
        parts.append(_text(LEFT - 10, y + 7 * len(peers) + 2, name, "end"))
        for peer, (low, median, high) in peers.items():
            start, end = sorted((at(1), at(median)))
            middle = y + 6
            parts += [
                f'<rect x="{start:.1f}" y="{y}" width="{max(end - start, 0.5):.1f}" height="12" fill="{_colour(peer)}"/>',
                f'<path d="M{at(low):.1f} {middle}H{at(high):.1f}" stroke="#222222" stroke-width="1"/>',
                _text(WIDTH - RIGHT + 8, y + 10, f"{median:.2f}  {peer}", size=10),
            ]
            y += 14
        y += 10
    axis = [f'<path d="M{at(1):.1f} {TOP}V{y}" stroke="#222222" stroke-width="1.5"/>']
    for value in (0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0):
        if lowest <= value <= highest:
            axis.append(f'<path d="M{at(value):.1f} {TOP}V{y}" stroke="#222222" stroke-opacity="0.15"/>')
            axis.append(_text(at(value), TOP + 4, f"{value:g}", "middle", 10))
    return _frame(y + 10 + 14 * len(notes), title, subtitle, notes, axis + parts)


def lines(
    title: str, subtitle: str, notes: Sequence[str], x_name: str, curves: Mapping[str, Sequence[tuple[float, float]]]
) -> str:
    """Curves over a logarithmic x axis; the y axis starts at 0."""
    height = 360
    xs = sorted({x for points in curves.values() for x, _y in points})
    top_value = max(y for points in curves.values() for _x, y in points) * 1.1
    step = 10 ** math.floor(math.log10(top_value))
    step = next(step * part for part in (0.1, 0.2, 0.25, 0.5, 1, 2) if top_value / (step * part) <= 8)
    left, bottom = 60, height - BOTTOM - 14 * len(notes) + 14
    span = math.log(xs[-1] / xs[0]) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (WIDTH - left - RIGHT) * math.log(x / xs[0]) / span, bottom - (bottom - TOP) * y / top_value

    parts = []
    for i in range(int(top_value / step) + 1):
        _x, y = at(xs[0], i * step)
        parts.append(f'<path d="M{left} {y:.1f}H{WIDTH - RIGHT}" stroke="#222222" stroke-opacity="0.15"/>')
        parts.append(_text(left - 6, y + 4, f"{i * step:g}", "end", 10))
    parts += [_text(at(x, 0)[0], bottom + 15, f"{x:,.0f}", "middle", 10) for x in xs]
    parts.append(_text((left + WIDTH - RIGHT) / 2, bottom + 30, x_name, "middle", 11))
    used: list[float] = []
    for name, points in curves.items():
        places = [at(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(name)}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{_colour(name)}"/>' for x, y in places]
        label = places[-1][1] + 4
        while any(abs(label - other) < 13 for other in used):  # names do not cover each other
            label += 1
        used.append(label)
        parts.append(_text(places[-1][0] + 8, label, name, size=11, more=f'style="fill:{_colour(name)}"'))
    return _frame(height, title, subtitle, notes, parts)
