"""Small charts as inline SVG: curves, and intervals on a common axis.

Written by hand because a page of twenty charts is then 100 kB, needs no script, prints sharply, and takes its
colours from the page's style sheet, so that both themes work. `Markup.format` escapes the labels. Neighbours:
`curves` and `figures` choose what is drawn, `templates/style.css` says how a class looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

Point = tuple[float, float | None]
WIDTH, HEIGHT = 320, 168
LEFT, RIGHT, TOP, BOTTOM = 44, 52, 22, 26  # margins of a curve: ticks, the last value, the unit, the steps
MOST = 240  # points of a polyline; more are averaged in buckets
STRIP = (180, 15)  # width of an interval strip, height of one of its rows


def curve(points: Sequence[Point], *, unit: str, axis: str = "free") -> Markup | None:
    """Values over steps: raw ones faint, a running mean on top, the last mean written beside it.

    `axis`: "free" shows the values' range, "zero" starts at 0 or below, "log" is logarithmic. Missing values
    (None), and those that have no logarithm, are left out; a chart without any is None.
    """
    known = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    if axis == "log":
        known = [(step, math.log10(value)) for step, value in known if value > 0]
    if not known:
        return None
    steps, raw = _buckets([step for step, _ in known]), _buckets([value for _, value in known])
    calm = _buckets(smooth([value for _, value in known]))
    low, high = _range(raw, calm, axis == "zero")
    ticks = _powers(low, high) if axis == "log" else nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first, last = known[0][0], max(known[-1][0], known[0][0] + 1)
    x = [LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT) for step in steps]

    def told(value: float) -> str:
        return short(10**value if axis == "log" else value)

    y = _height(low, high)
    grid = _grid([(y(tick), told(tick)) for tick in ticks], first, known[-1][0])
    ends = (x[-1], y(calm[-1]))
    mark = Markup(
        '<circle class="line" cx="{:.1f}" cy="{:.1f}" r="2.6"/>'
        '<text class="last" x="{:.1f}" y="{:.1f}">{}</text>'
    )
    inside = Markup('<path class="raw" d="{}"/><path class="calm" d="{}"/>').format(
        _path(x, [y(min(max(value, low), high)) for value in raw]), _path(x, [y(value) for value in calm])
    )
    return Markup(
        '<svg class="curve" viewBox="0 0 {0} {1}" role="img"><title>{2}: from {3} to {4}</title>'
        '<text class="unit" x="0" y="11">{2}</text>{5}{6}{7}</svg>'
    ).format(
        WIDTH, HEIGHT, f"{unit}, logarithmic" if axis == "log" else unit, told(calm[0]), told(calm[-1]), grid,
        inside, mark.format(*ends, ends[0] + 7, ends[1] + 4, told(calm[-1])),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A value after a step with the ends of its interval, where there is one, and whether it is marked."""

    step: float
    value: float
    low: float | None
    high: float | None
    marked: bool


def measurements(points: Sequence[Measurement], *, unit: str, most: float) -> Markup:
    """Values over steps with their intervals, the marked ones ringed and written out; within [0, most]."""
    ends = [end for one in points for end in (one.low, one.value, one.high) if end is not None]
    room = 0.05 * most if min(ends) == max(ends) else 0.0
    ticks = nice_ticks(max(0.0, min(ends) - room), min(most, max(ends) + room))
    y = _height(ticks[0], ticks[-1])
    first, last = points[0].step, max(points[-1].step, points[0].step + 1)
    places = [
        (LEFT + (one.step - first) / (last - first) * (WIDTH - LEFT - RIGHT), y(one.value)) for one in points
    ]
    whisker = Markup('<path class="whisker" d="M{:.1f} {:.1f}V{:.1f}"/>')
    dot = Markup('<circle class="line" cx="{:.1f}" cy="{:.1f}" r="2.6"/>')
    ring = Markup(
        '<circle class="ring" cx="{0:.1f}" cy="{1:.1f}" r="6"/>'
        '<text class="last" x="{2:.1f}" y="{3:.1f}">{4}</text>'
    )
    inside = [Markup('<path class="raw" d="{}"/>').format(_path(*zip(*places, strict=True)))]
    for one, (x, middle) in zip(points, places, strict=True):
        if one.low is not None and one.high is not None:
            inside.append(whisker.format(x, y(one.low), y(one.high)))
        inside.append(dot.format(x, middle))
        if one.marked:
            inside.append(ring.format(x, middle, x + 9, middle - 6, short(one.value)))
    return Markup(
        '<svg class="exams" viewBox="0 0 {0} {1}" role="img"><title>{2}: from {3} to {4}</title>'
        '<text class="unit" x="0" y="11">{2}</text>{5}{6}</svg>'
    ).format(
        WIDTH, HEIGHT, unit, short(points[0].value), short(points[-1].value),
        _grid([(y(tick), short(tick)) for tick in ticks], first, points[-1].step), Markup().join(inside),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with the ends of its interval; `kind` is a class of the style sheet: base, sft or grpo."""

    kind: str
    value: float
    low: float
    high: float


def strip(
    intervals: Sequence[Interval], *, tick: float | None = None, low: float = 0.0, high: float = 1.0
) -> Markup:
    """Intervals under each other on the axis [low, high], with a line at `tick` (a baseline), if any."""
    width, row = STRIP
    height = row * max(len(intervals), 1) + 4

    def x(value: float) -> float:
        return 4 + (min(max(value, low), high) - low) / (high - low) * (width - 8)

    grid = Markup().join(
        Markup('<path class="grid" d="M{:.1f} 0V{}"/>').format(x(low + part * (high - low)), height)
        for part in (0, 0.25, 0.5, 0.75, 1)
    )
    if tick is not None:
        grid += Markup('<path class="baseline" d="M{:.1f} 0V{}"/>').format(x(tick), height)
    marks = Markup().join(
        Markup(
            '<path class="span {0}" d="M{1:.1f} {2}H{3:.1f}"/><path class="mark {0}" d="M{4:.1f} {5}v10"/>'
        ).format(one.kind, x(one.low), middle, x(one.high), x(one.value), middle - 5)
        for one, middle in zip(intervals, (2 + row * (i + 0.5) for i in range(len(intervals))), strict=True)
    )
    return Markup(
        '<svg class="strip" viewBox="0 0 {0} {1}" width="{0}" height="{1}" aria-hidden="true">{2}{3}</svg>'
    ).format(width, height, grid, marks)


def smooth(values: Sequence[float]) -> list[float]:
    """A centred running mean over about an eighth of the values, one-sided at both ends."""
    reach = len(values) // 16
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    edges = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(total[end] - total[start]) / (end - start) for start, end in edges]


def nice_ticks(low: float, high: float, count: int = 3) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten) that cover [low, high] in about `count` intervals."""
    span = max(high - low, 1e-12)
    power = 10 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, max(last, first + 1) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """The whole powers of ten around [low, high], which are logarithms; at most six."""
    first, last = math.floor(low + 1e-9), math.ceil(high - 1e-9)
    step = math.ceil(max(last - first, 1) / 5)
    return [float(power) for power in range(first, max(last, first + 1) + step, step)]


def short(value: float) -> str:
    """A number for an axis: as few digits as tell it apart, powers of ten for very small ones."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}".replace("-", "−")
    text = f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def _range(raw: Sequence[float], calm: Sequence[float], zero: bool) -> tuple[float, float]:
    """What the axis shows: all of the running mean, and the raw values but the outermost 2 per cent."""
    ordered = sorted(raw)
    cut = len(ordered) // 50
    low, high = min(ordered[cut], *calm), max(ordered[len(ordered) - 1 - cut], *calm)
    low = min(low, 0.0) if zero else low
    return (low, high) if high > low else (low - (0 if zero else abs(low) / 2), high + (abs(high) / 2 or 1.0))


def _buckets(values: Sequence[float]) -> list[float]:
    if len(values) <= MOST:
        return list(values)
    edges = [round(i * len(values) / MOST) for i in range(MOST + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]


def _height(low: float, high: float) -> Callable[[float], float]:
    """Value -> y of a curve whose axis is [low, high]."""
    return lambda value: HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _grid(ticks: Sequence[tuple[float, str]], first: float, last: float) -> Markup:
    """The lines (y, what stands beside it) of a curve, and the steps under it."""
    lines = Markup().join(
        Markup(
            '<path class="grid" d="M{} {:.1f}H{}"/><text class="tick end" x="{}" y="{:.1f}">{}</text>'
        ).format(LEFT, y, WIDTH - RIGHT, LEFT - 6, y + 3.5, told)
        for y, told in ticks
    )
    foot = Markup(
        '<text class="tick" x="{0}" y="{1}">{2}</text><text class="tick end" x="{3}" y="{1}">{4}</text>'
    )
    return lines + foot.format(LEFT, HEIGHT - 8, f"step {short(first)}", WIDTH - RIGHT, short(last))


def _path(x: Sequence[float], y: Sequence[float]) -> str:
    return "M" + "L".join(f"{one:.1f} {two:.1f}" for one, two in zip(x, y, strict=True))
