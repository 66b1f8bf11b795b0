"""Draws simulations of growing numbers of devices as one SVG: steps an hour, and shares of time."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from eopd.planning.simulate import Simulated
from eopd.telemetry.report.charts import ticks

_WIDTH, _PANEL, _LEFT, _RIGHT, _TOP, _GAP = 640, 200, 60, 150, 30, 50
_COLOURS: Final = ("#1b6ca8", "#c8553d", "#3a7d44", "#7d5ba6", "#8a8a8a")
_STYLE: Final = "text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd}polyline{fill:none}"

Lines = Mapping[str, Sequence[float]]


def draw(rows: Sequence[Simulated]) -> str:
    """Returns an SVG of two panels over the devices, which double from one row to the next."""
    devices = [row.balance.devices for row in rows]
    steps = {
        "formula": [row.closed_steps for row in rows],
        "simulated": [row.simulation.steps_per_hour for row in rows],
    }
    shares = {
        "engines at work": [row.simulation.busy["generate"] for row in rows],
        "engines full": [row.simulation.engines_full for row in rows],
        "replicas at work": [row.simulation.busy.get("score", 0.0) for row in rows],
        "learner trains": [row.simulation.busy["train"] for row in rows],
    }
    height = _TOP + 2 * (_PANEL + _GAP)
    panels = [
        _panel("steps an hour", devices, steps, _TOP, 1.05 * max(map(max, steps.values()))),
        _panel("share of time, by devices", devices, shares, _TOP + _PANEL + _GAP, 1.0),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}">'
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(panels)}</svg>\n"
    )


def _panel(title: str, devices: Sequence[int], lines: Lines, top: float, most: float) -> str:
    """Draws lines from 0 to ``most`` over the logarithm of the devices."""
    right, doublings = _WIDTH - _RIGHT, max(1.0, math.log2(devices[-1] / devices[0]))
    xs = [_LEFT + (right - _LEFT) * math.log2(n / devices[0]) / doublings for n in devices]
    parts = [f'<text x="{_LEFT}" y="{top - 10}">{title}</text>']
    for tick in ticks(0.0, most, 5):
        y = top + _PANEL * (1.0 - tick / most)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:,.6g}</text>')

    for x, number in zip(xs, devices, strict=True):
        parts.append(
            f'<text x="{x:.1f}" y="{top + _PANEL + 18}" text-anchor="middle">{number}</text>'
        )

    for place, (name, values) in enumerate(lines.items()):
        ys = [top + _PANEL * (1.0 - value / most) for value in values]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        look = f'stroke="{_COLOURS[place]}" stroke-width="2"'
        at = top + 12 + 18 * place
        parts.append(f'<polyline points="{points}" {look}/>')
        ends = f'x1="{right + 12}" x2="{right + 32}" y1="{at}" y2="{at}"'
        parts.append(f"<line {ends} {look}/>")
        parts.append(f'<text x="{right + 38}" y="{at + 4}">{name}</text>')

    return "".join(parts)
