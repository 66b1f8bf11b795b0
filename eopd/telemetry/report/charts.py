"""Draws numbers as inline SVG. Every colour is a class of the page's style sheet, and never alone:
a mark of its own shape ends each line, and dashes tell apart what one run has two of.

A chart is a picture and, beside it, its numbers as JSON, which the page's script shows under the
pointer. A script draws no picture, so that the page shows it also where no script runs.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from markupsafe import Markup

from eopd.telemetry.report.healthy import minus
from eopd.telemetry.report.lines import Line, Points, extremes, look, smoothed, thinned

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 22
_STEPS: Final = (1.0, 2.0, 2.5, 5.0, 10.0)
# What a mark of a kind means, and whether it is a line through the chart or a tick at its foot.
MARK_KINDS: Final = {
    "changed": "other settings from there on",
    "restart": "the learner started again",
    "collapse": "signs of collapse",
    "best": "best checkpoint",
    "checkpoint": "checkpoint",
}


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """Something that happened at a step; ``kind`` is one of ``MARK_KINDS``."""

    step: float
    kind: str


class Frame:
    """Maps data to pixels: x over the whole width, y from 0 (or the lowest value below it) to the
    highest, rounded so that both ends have a label.
    """

    def __init__(self, points: Points, x_title: str = "step") -> None:
        xs, ys = [x for x, _ in points] or [0.0], [0.0, *(y for _, y in points)]
        self.x_title = x_title
        self.x_min, self.x_max = min(xs), max(*xs, min(xs) + 1.0)
        low, high = min(ys), max(ys)
        self._step = tick_step(low, high if high > low else low + 1.0, 5)
        self.y_min = math.floor(low / self._step + 1e-9) * self._step
        self.y_max = math.ceil(high / self._step - 1e-9) * self._step
        if self.y_max <= self.y_min:
            self.y_max = self.y_min + 1.0

    def x(self, value: float) -> float:
        """Returns how many pixels from the left a value is drawn."""
        return round(
            LEFT + (value - self.x_min) / (self.x_max - self.x_min) * (WIDTH - LEFT - RIGHT), 1
        )

    def y(self, value: float) -> float:
        """Returns how many pixels from the top a value is drawn."""
        return round(
            TOP + (self.y_max - value) / (self.y_max - self.y_min) * (HEIGHT - TOP - BOTTOM), 1
        )

    def axes(self, percent: bool = False) -> str:
        """Draws the grid lines and their labels, and what the steps are called."""
        parts = []
        for tick in multiples(self.y_min, self.y_max, self._step):
            y = self.y(tick)
            short = f"{100 * tick:.4g}%" if percent else f"{tick:.4g}".replace("e-0", "e-")
            label = minus(short)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{label}</text>')

        base = HEIGHT - 6
        parts.append(f'<text x="{LEFT - 12}" y="{base}" text-anchor="end">{self.x_title}</text>')
        for tick in ticks(self.x_min, self.x_max, 5):
            x = min(self.x(tick), WIDTH - RIGHT - 6)
            parts.append(f'<text x="{x}" y="{base}" text-anchor="middle">{tick:.6g}</text>')

        return "".join(parts)

    def path(self, points: Points) -> str:
        """Returns the ``d`` of a path through the points, which is a dot where there is one."""
        corners = "L".join(f"{self.x(x)} {self.y(y)}" for x, y in points)
        return f"M{corners}h0" if len(points) == 1 else f"M{corners}"

    def paths(self, pieces: Sequence[Points]) -> str:
        """Returns the ``d`` of a path through every piece."""
        return "".join(map(self.path, pieces))

    def upright(self, x: float, classes: str) -> str:
        """Draws a line from the top to the bottom."""
        at = self.x(x)
        return f'<line class="{classes}" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'


def tick_step(low: float, high: float, number: int) -> float:
    """Returns a round distance that divides a range into at most ``number`` parts."""
    rough = (high - low) / number
    scale = 10.0 ** math.floor(math.log10(rough))
    return next(scale * factor for factor in _STEPS if scale * factor >= rough * 0.999)


def multiples(low: float, high: float, step: float) -> list[float]:
    """Returns the multiples of ``step`` from ``low`` to ``high``, both included."""
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def ticks(low: float, high: float, number: int) -> list[float]:
    """Returns about ``number`` round values from ``low`` to ``high``, both included where they are
    round.
    """
    return multiples(low, high, tick_step(low, high, number))


def curves(
    title: str,
    lines: Sequence[Line],
    *,
    percent: bool = False,
    num_points: int = 300,
    marks: Sequence[Mark] = (),
    smooth: bool = True,
) -> Markup:
    """Draws lines over steps: what was measured, faint, and its running mean; behind them the
    healthy range, with a shadow under what lies outside.

    Args:
        title: What the chart shows, for those who hear the page.
        lines: One for each metric and run.
        percent: Whether the values are shares.
        num_points: The most points of a line that are drawn.
        marks: What happened on the way.
        smooth: Whether the running mean is drawn; else the values alone.
    """
    raw = [extremes(line, num_points) for line in lines]
    strong = [smoothed(thinned(line, num_points)) if smooth else line for line in lines]
    frame = Frame([*itertools.chain(*map(_corners, raw)), *_towards_health(raw)])
    parts = [*_healthy(frame, raw), frame.axes(percent)]
    for line in strong:
        for below, above in line.band():
            outline = frame.path([*below, *reversed(above)])
            parts.append(f'<path class="band {line.classes}" d="{outline}Z"/>')

    parts += [_mark(frame, mark) for mark in marks if frame.x_min <= mark.step <= frame.x_max]
    for line, measured in zip(strong, raw, strict=True):
        drawn = [("outside", line.unhealthy()), ("line", line.pieces())]
        for name, pieces in [("raw", measured.pieces()), *drawn] if smooth else drawn:
            if pieces:
                parts.append(f'<path class="{name} {line.classes}" d="{frame.paths(pieces)}"/>')

        for x, y in line.points()[-1:] if smooth else line.points():
            place = f"translate({frame.x(x)} {frame.y(y)})"
            parts.append(
                f'<path class="mark {line.classes}" transform="{place}" d="{look(line.color)[1]}"/>'
            )

    return _svg(title, parts, raw, frame, percent=percent)


def _corners(line: Line) -> Points:
    """Returns everything of a line that must be inside of the frame."""
    edges = itertools.chain(*line.band())
    return list(itertools.chain(line.points(), *edges))


def _towards_health(lines: Sequence[Line]) -> Points:
    """Returns the points that bring a healthy range into the frame, where all values lie below
    it.
    """
    points = []
    for line in lines:
        if line.healthy and all(y < line.healthy.low for _, y in line.points()):
            points += [
                (x, min(line.healthy.high, 1.1 * line.healthy.low)) for x, _ in line.points()
            ]

    return points


def _healthy(frame: Frame, lines: Sequence[Line]) -> list[str]:
    """Draws the healthy ranges, as far as they are inside of the frame."""
    parts = []
    for healthy in dict.fromkeys(line.healthy for line in lines if line.healthy is not None):
        top = frame.y(min(healthy.high, frame.y_max))
        bottom = frame.y(max(healthy.low, frame.y_min))
        parts.append(
            f'<rect class="healthy" x="{LEFT}" width="{WIDTH - LEFT - RIGHT}" y="{top}" '
            f'height="{max(bottom - top, 0.0):.1f}"/>'
        )

    return parts


def _mark(frame: Frame, mark: Mark) -> str:
    """Draws what happened at a step: a tick at the foot for a checkpoint, else an upright line."""
    title = f"<title>step {mark.step:g}: {MARK_KINDS[mark.kind]}</title>"
    if mark.kind == "checkpoint":
        place = f"translate({frame.x(mark.step)} {HEIGHT - BOTTOM})"
        return f'<path class="tick" transform="{place}" d="M0 0L3.5 6H-3.5z">{title}</path>'

    return f"<g>{title}{frame.upright(mark.step, mark.kind)}</g>"


def totals(lines: Sequence[Line]) -> Points:
    """Returns the sum of lines that have the same steps and no gaps."""
    stacks = zip(*(line.ys for line in lines), strict=True)
    return [(x, sum(filter(None, ys))) for x, ys in zip(lines[0].xs, stacks, strict=True)]


def stacked(
    title: str, lines: Sequence[Line], classes: Sequence[str], axis_points: Points = ()
) -> Markup:
    """Draws areas on top of each other, from below.

    Args:
        title: What the chart shows, for those who hear the page.
        lines: Heights of the areas; they have the same steps and no gaps.
        classes: The class of each area.
        axis_points: What the axes hold besides, since the charts beside this one show it.
    """
    floors = [0.0] * len(lines[0].xs)
    edges = [floors]
    for line in lines:
        floors = [floor + y for floor, (_, y) in zip(floors, line.points(), strict=True)]
        edges.append(floors)

    frame = Frame([*axis_points, *totals(lines)])
    parts = [frame.axes()]

    for line, (below, above), name in zip(
        lines,
        itertools.pairwise(edges),
        classes,
        strict=True,
    ):
        xs = [*line.xs, *reversed(line.xs)]
        outline = frame.path(list(zip(xs, [*above, *reversed(below)], strict=True)))
        parts.append(f'<path class="area {name}" d="{outline}Z"/>')

    return _svg(title, parts, lines, frame)


def histogram(
    title: str,
    lines: Sequence[Line],
    bin_width: float,
    threshold: float | None,
    axis_points: Points = (),
) -> Markup:
    """Draws shares of tokens by bin, as steps.

    Args:
        title: What the chart shows, for those who hear the page.
        lines: Left edges of the bins in nats, and the shares.
        bin_width: Nats.
        threshold: The entropy in nats above which the gate opens, if it has one.
        axis_points: What the axes hold besides, since the charts beside this one show it.
    """
    points = itertools.chain(axis_points, *(line.points() for line in lines))
    filled = [(x, y) for x, y in points if y > 0.0]
    right = bin_width + max([1.0, *(x for x, _ in filled)])
    num_bins = round(right / bin_width)
    lines = [replace(line, xs=line.xs[:num_bins], ys=line.ys[:num_bins]) for line in lines]
    frame = Frame([(0.0, 0.0), (right, 0.0), *filled], "nats")
    parts = [frame.axes(percent=True)]

    for line in lines:
        outline = [(0.0, 0.0)]
        for x, y in line.points():
            outline += [(x, y), (x + bin_width, y)]

        path = frame.path([*outline, (right, 0.0)])
        parts.append(f'<path class="bars {line.classes}" d="{path}"/>')

    if threshold is not None and threshold < right:
        x = frame.x(threshold) + 4
        parts.append(frame.upright(threshold, "threshold"))
        parts.append(f'<text class="threshold" x="{x}" y="{TOP + 9}">gate opens</text>')

    return _svg(title, parts, lines, frame, percent=True, bin_width=bin_width)


def _svg(
    title: str,
    parts: Sequence[str],
    lines: Sequence[Line],
    frame: Frame,
    *,
    percent: bool = False,
    bin_width: float | None = None,
) -> Markup:
    curves = []
    for line in lines:
        if points := list(_numbers(line)):
            curves.append((line.label, points))

    numbers = {
        "x": "nats from" if bin_width else "step",
        "grid": bin_width or 1,
        "box": (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
        "from": frame.x_min,
        "to": frame.x_max,
        "percent": percent,
        "lines": [{"label": label, "points": points} for label, points in curves],
    }
    spans = [(label, points[0][1], points[-1][1]) for label, points in curves]
    ends = "; ".join(f"{label}: {minus(f'{first:g} to {last:g}')}" for label, first, last in spans)
    picture = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        WIDTH, HEIGHT, f"{title}. {ends or 'no numbers yet'}"
    )

    return picture + Markup("".join(parts)) + Markup("</svg>") + as_json(numbers)


def _numbers(line: Line) -> Iterator[tuple[float, ...]]:
    """Yields x and y of every point, and the edges of the band where there is one."""
    lows = dict(zip(line.xs, line.lows, strict=False))
    highs = dict(zip(line.xs, line.highs, strict=False))
    for x, y in line.points():
        edges = [edge for edge in (lows.get(x), highs.get(x)) if edge is not None]
        yield (x, *(float(f"{number:.4g}") for number in (y, *edges)))


def as_json(value: object) -> Markup:
    """Returns a script element that holds data; no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    safe = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Markup('<script type="application/json">') + Markup(safe) + Markup("</script>")
