"""Curves as data: their points, gaps and bands, thinned and smoothed, before anything is drawn."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from eopd.telemetry.report.healthy import Range

MARKS: Final = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
    "M-3-3h6v6h-6z",
    "M0-4L4 3H-4z",
    "M0-4L4 0L0 4L-4 0z",
    "M0 4L4-3H-4z",
)
NUM_COLORS, NUM_DASHES = len(MARKS), 3

Points: TypeAlias = Sequence[tuple[float, float]]
Values: TypeAlias = Sequence[float | None]


def look(index: int) -> tuple[str, str]:
    """Returns the class of the colour and the mark of a run: 25 runs have different pairs."""
    return f"c{index % NUM_COLORS}", MARKS[(index + index // NUM_COLORS) % NUM_COLORS]


@dataclass(frozen=True, slots=True)
class Line:
    """A curve. A value that is None, or not finite, is a gap; ``color`` and ``dash`` count from
    0.

    ``lows`` and ``highs`` are the edges of a band around the values, where there is one, with the
    same gaps; ``healthy`` is the range in which a sound run keeps the values.
    """

    label: str
    xs: Sequence[float]
    ys: Values
    color: int = 0
    dash: int = 0
    lows: Values = ()
    highs: Values = ()
    healthy: Range | None = None

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

    def band(self) -> list[tuple[Points, Points]]:
        """Returns the lower and the upper edge of the band, from gap to gap."""
        if not self.lows:
            return []

        below, above = replace(self, ys=self.lows).pieces(), replace(self, ys=self.highs).pieces()
        return list(zip(below, above, strict=True))

    def unhealthy(self) -> list[list[tuple[float, float]]]:
        """Returns the pieces that lie outside of the healthy range."""
        healthy = self.healthy
        if healthy is None:
            return []

        ys = [y if y is None or not healthy.holds(y) else None for y in self.ys]
        return replace(self, ys=ys).pieces()


def is_flat(line: Line) -> bool:
    """Returns whether a line has no two values that differ."""
    return len({y for _, y in line.points()}) < 2


def extremes(line: Line, num_points: int) -> Line:
    """Returns the curve with about ``num_points`` points: its ends and gaps, and the lowest and
    the highest of every stretch, in their order.
    """
    if len(line.xs) <= num_points:
        return line

    size = math.ceil(2 * len(line.xs) / max(num_points - 2, 1))
    ys = [math.nan if y is None else y for y in line.ys]
    drawn = [i for i, y in enumerate(ys) if math.isfinite(y)]
    indices = {*drawn[:1], *drawn[-1:], *set(range(len(ys))).difference(drawn)}
    for _, group in itertools.groupby(drawn, key=lambda i: i // size):
        stretch = list(group)
        indices |= {min(stretch, key=ys.__getitem__), max(stretch, key=ys.__getitem__)}

    order = sorted(indices)

    return replace(
        line,
        xs=[line.xs[i] for i in order],
        ys=[line.ys[i] for i in order],
        lows=[line.lows[i] for i in order if line.lows],
        highs=[line.highs[i] for i in order if line.highs],
    )


def thinned(line: Line, num_points: int) -> Line:
    """Returns the curve with at most ``num_points`` points, each the mean of a stretch, or a gap
    where nothing of the stretch can be drawn.
    """
    size = max(1, math.ceil(len(line.xs) / num_points))
    stretches = [slice(i, i + size) for i in range(0, len(line.xs), size)]
    thin = _averaged(line, stretches)
    return replace(thin, xs=[line.xs[stretch][-1] for stretch in stretches])


def smoothed(line: Line) -> Line:
    """Returns the running mean over a tenth of the curve, centred; gaps stay.

    It begins with the first value itself, and takes in more as there is more behind it: what falls
    fast at the beginning of a run is not hidden.
    """
    half = len(line.points()) // 20
    windows = [slice(max(0, i - half), i + min(half, i) + 1) for i in range(len(line.xs))]
    means = _averaged(line, windows)
    ys = [
        None if mean([y]) is None else smooth for y, smooth in zip(line.ys, means.ys, strict=True)
    ]
    return replace(means, ys=ys)


def _averaged(line: Line, stretches: Sequence[slice]) -> Line:
    """Returns the curve and its band averaged over stretches; the caller says where they are."""
    return replace(
        line,
        ys=[mean(line.ys[stretch]) for stretch in stretches],
        lows=[mean(line.lows[stretch]) for stretch in stretches if line.lows],
        highs=[mean(line.highs[stretch]) for stretch in stretches if line.highs],
    )


def mean(ys: Values) -> float | None:
    """Returns the mean of the values that are finite numbers; None without any."""
    numbers = finite(ys)
    return sum(numbers) / len(numbers) if numbers else None


def finite(ys: Values) -> list[float]:
    """Returns the values that are finite numbers."""
    return [y for y in ys if y is not None and math.isfinite(y)]
