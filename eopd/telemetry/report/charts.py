"""Draws numbers as inline SVG. Every colour is a class of the page's style sheet, and never alone:
a mark of its own shape ends each line, and dashes tell apart what one run has two of.

A chart is a picture and, beside it, its numbers as JSON, which the page's script shows under the
pointer. A script draws no picture, so that the page shows it also where no script runs.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from markupsafe import Markup

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 22
MARKS: Final = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
    "M-3-3h6v6h-6z",
    "M0-4L4 3H-4z",
    "M0-4L4 0L0 4L-4 0z",
    "M0 4L4-3H-4z",
)
NUM_COLORS, NUM_DASHES = len(MARKS), 3
_STEPS: Final = (1.0, 2.0, 2.5, 5.0, 10.0)


def look(index: int) -> tuple[str, str]:
    """Returns the class of the colour and the mark of a run: 25 runs have different pairs."""
    return f"c{index % NUM_COLORS}", MARKS[(index + index // NUM_COLORS) % NUM_COLORS]


@dataclass(frozen=True, slots=True)
class Line:
    """A curve. A value that is None, or not finite, is a gap; ``color`` and ``dash`` count from
    0.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    color: int = 0
    dash: int = 0

    @property
    def classes(self) -> str:
        """The classes by which the style sheet draws the curve."""
        return f"{look(self.color)[0]} d{self.dash % NUM_DASHES}"

    def pieces(self) -> list[list[tuple[float, float]]]:
        """Returns the points that can be drawn, from gap to gap."""
        pieces: list[list[tuple[float, float]]] = [[]]
        for x, y in zip(self.xs, self.ys, strict=True):
            if y is not None and math.isfinite(y):
                pieces[-1].append((x, y))
            elif pieces[-1]:
                pieces.append([])

        return [piece for piece in pieces if piece]

    def points(self) -> list[tuple[float, float]]:
        """Returns the points that can be drawn."""
        return list(itertools.chain(*self.pieces()))


class Frame:
    """Maps data to pixels: x over the whole width, y from 0 (or the lowest value below it) to the
    highest.
    """

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        xs, ys = [x for x, _ in points] or [0.0], [0.0, *(y for _, y in points)]
        self.x_min, self.x_max = min(xs), max(*xs, min(xs) + 1.0)
        self.y_min, self.y_max = min(ys), max(ys)
        if self.y_max == self.y_min:
            self.y_max += 1.0

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
        """Draws the grid lines and their labels."""
        parts = []
        for tick in ticks(self.y_min, self.y_max, 4):
            y = self.y(tick)
            label = f"{100 * tick:.4g}%" if percent else f"{tick:.4g}"
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{label}</text>')

        for tick in ticks(self.x_min, self.x_max, 5):
            x = min(self.x(tick), WIDTH - RIGHT - 6)
            parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="middle">{tick:.6g}</text>')

        return "".join(parts)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """Returns the ``d`` of a path through the points, which is a dot where there is one."""
        corners = "L".join(f"{self.x(x)} {self.y(y)}" for x, y in points)
        return f"M{corners}h0" if len(points) == 1 else f"M{corners}"


def ticks(low: float, high: float, number: int) -> list[float]:
    """Returns about ``number`` round values from ``low`` to ``high``, both included where they are
    round.
    """
    rough = (high - low) / number
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * factor for factor in _STEPS if scale * factor >= rough * 0.999)
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def extremes(line: Line, num_points: int) -> Line:
    """Returns the curve with about ``num_points`` points: its ends and gaps, and the lowest and
    the highest of every stretch, in their order.
    """
    if len(line.xs) <= num_points:
        return line

    size = math.ceil(2 * len(line.xs) / max(num_points - 2, 1))
    ys = [math.nan if y is None else y for y in line.ys]
    finite = [i for i, y in enumerate(ys) if math.isfinite(y)]
    indices = {*finite[:1], *finite[-1:], *set(range(len(ys))).difference(finite)}
    for _, group in itertools.groupby(finite, key=lambda i: i // size):
        stretch = list(group)
        indices |= {min(stretch, key=ys.__getitem__), max(stretch, key=ys.__getitem__)}

    order = sorted(indices)

    return replace(line, xs=[line.xs[i] for i in order], ys=[line.ys[i] for i in order])


def thinned(line: Line, num_points: int) -> Line:
    """Returns the curve with at most ``num_points`` points, each the mean of a stretch, or a gap
    where nothing of the stretch can be drawn.
    """
    size = max(1, math.ceil(len(line.xs) / num_points))
    stretches = [slice(i, i + size) for i in range(0, len(line.xs), size)]
    xs = [line.xs[stretch][-1] for stretch in stretches]
    return replace(line, xs=xs, ys=[_mean(line.ys[stretch]) for stretch in stretches])


def smoothed(line: Line) -> Line:
    """Returns the running mean over a tenth of the curve, centred; gaps stay."""
    half = len(line.points()) // 20
    windows = [slice(max(0, i - half), i + half + 1) for i in range(len(line.xs))]
    means = [_mean(line.ys[window]) for window in windows]
    gaps = [_mean([y]) is None for y in line.ys]
    return replace(line, ys=[None if gap else mean for gap, mean in zip(gaps, means, strict=True)])


def _mean(ys: Sequence[float | None]) -> float | None:
    finite = [y for y in ys if y is not None and math.isfinite(y)]
    return sum(finite) / len(finite) if finite else None


def curves(
    title: str,
    lines: Sequence[Line],
    *,
    percent: bool = False,
    num_points: int = 300,
    marks: Sequence[float] = (),
) -> Markup:
    """Draws lines over steps: what was measured, faint, and its running mean.

    Args:
        title: What the chart shows, for those who hear the page.
        lines: One for each metric and run.
        percent: Whether the values are shares.
        num_points: The most points of a line that are drawn.
        marks: Steps at which something changed.
    """
    raw = [extremes(line, num_points) for line in lines]
    frame = Frame([point for line in raw for point in line.points()])
    parts = [frame.axes(percent)]
    for x in (frame.x(step) for step in marks if frame.x_min <= step <= frame.x_max):
        parts.append(f'<line class="changed" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')

    for line, measured in zip(lines, raw, strict=True):
        mean = smoothed(thinned(line, num_points))
        for name, curve in (("raw", measured), ("line", mean)):
            if pieces := curve.pieces():
                path = "".join(frame.path(piece) for piece in pieces)
                parts.append(f'<path class="{name} {line.classes}" d="{path}"/>')

        for x, y in mean.points()[-1:]:
            place = f"translate({frame.x(x)} {frame.y(y)})"
            parts.append(
                f'<path class="mark {line.classes}" transform="{place}" d="{look(line.color)[1]}"/>'
            )

    return _svg(title, parts, raw, frame, percent=percent)


Points: TypeAlias = Sequence[tuple[float, float]]


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

    for line, (below, above), name in zip(lines, itertools.pairwise(edges), classes, strict=True):
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
    frame = Frame([(0.0, 0.0), (right, 0.0), *filled])
    parts = [frame.axes(percent=True)]

    for line in lines:
        outline = [(0.0, 0.0)]
        for x, y in line.points():
            outline += [(x, y), (x + bin_width, y)]

        path = frame.path([*outline, (right, 0.0)])
        parts.append(f'<path class="bars {line.classes}" d="{path}"/>')

    if threshold is not None and threshold < right:
        x = frame.x(threshold)
        parts.append(
            f'<line class="threshold" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
        parts.append(f'<text class="threshold" x="{x + 4}" y="{TOP + 9}">gate opens</text>')

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
        if points := [(x, float(f"{y:.4g}")) for x, y in line.points()]:
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
    ends = "; ".join(f"{label}: {points[0][1]:g} to {points[-1][1]:g}" for label, points in curves)
    picture = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        WIDTH, HEIGHT, f"{title}. {ends or 'no numbers yet'}"
    )

    return picture + Markup("".join(parts)) + Markup("</svg>") + as_json(numbers)


def as_json(value: object) -> Markup:
    """Returns a script element that holds data; no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    safe = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Markup('<script type="application/json">') + Markup(safe) + Markup("</script>")


@dataclass(frozen=True, slots=True)
class Lane:
    """A row of a timeline: ``spans`` of (from, to, class, activity), in seconds; None where they
    were not recorded.
    """

    label: str
    spans: Sequence[tuple[float, float, str, str]] | None


def timeline(title: str, lanes: Sequence[Lane], seconds: float) -> Markup:
    """Draws who was at work when, from 0 to ``seconds``. Positions are shares of the width, so
    that text keeps its size.
    """
    row = 46
    height = row * len(lanes) + 24
    parts = []

    for index, lane in enumerate(lanes):
        y = index * row
        parts.append(Markup('<text x="0" y="{}" class="lane">{}</text>').format(y + 14, lane.label))
        if lane.spans is not None:
            parts.append(
                Markup('<rect x="0" width="100%" y="{}" height="18" class="idle"/>').format(y + 20)
            )

        for start, stop, name, activity in lane.spans or ():
            shape = Markup(
                '<rect x="{:.3f}%" width="{:.3f}%" y="{}" height="18" class="{}"><title>{}</title></rect>'
            )
            share, width = 100 * start / seconds, 100 * (stop - start) / seconds
            parts.append(
                shape.format(share, width, y + 20, name, f"{activity}: {start:.2f} to {stop:.2f} s")
            )

    for tick in ticks(0.0, seconds, 4):
        share = 100 * tick / seconds
        anchor = "start" if share < 5 else "end" if share > 95 else "middle"
        parts.append(
            Markup('<text x="{:.2f}%" y="{}" text-anchor="{}">{:g} s</text>').format(
                share, height - 4, anchor, tick
            )
        )

    opening = Markup('<svg class="timeline" width="100%" height="{}" role="img" aria-label="{}">')

    return opening.format(height, title) + Markup("").join(parts) + Markup("</svg>")
