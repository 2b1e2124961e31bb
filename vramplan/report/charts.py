"""Charts as SVG: a step's memory over time, ways to run it by memory and speed, and a run's losses.

Colours are names of CSS variables, which the page defines for light and dark (:data:`GROUP_COLOURS`). Every chart has a
table beside it on the page.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..planner.timeline import GROUPS
from ..planner.ways import Way
from ..units import GIB, count, gib
from .risk import RiskReport

if TYPE_CHECKING:
    import pygal

GROUP_COLOURS = {
    "context": "--context", "workspace": "--workspace", "weights": "--weights", "optimizer state": "--optimizer",
    "gradients": "--gradients", "activations": "--activations", "logits and loss": "--logits",
    "temporaries": "--temporaries",
}  # fmt: skip
"""CSS variables. Their values are Paul Tol's bright scheme, which colour-blind readers can tell apart
(sronpersonalpages.nl/~pault, 2021)."""

WIDTH, HEIGHT = 900, 400
SHORT = {"embedding backward": "embedding", "optimizer step": "optimizer"}
"""Names of phases that are wider than their share of the chart; the table has them whole."""
Points = list[tuple[float, float] | None]
T = TypeVar("T")


def thinned(points: tuple[T, ...], most: int) -> tuple[T, ...]:
    """At most so many of them, evenly taken, the last one included."""
    every = -(-len(points) // most) if points else 1
    return points[::-1][::every][::-1]


def timeline_chart(report: RiskReport) -> str:
    """What is alive in the course of one step, stacked by category over the context, against the budget."""
    base = report.estimate.context_bytes / GIB
    x: list[float] = []
    stacks: list[list[float]] = []
    middles, edges = [], []
    at = 0.0
    for stretch in report.timeline:
        edges.append(at)
        middles.append({"label": SHORT.get(stretch.phase, stretch.phase), "value": at + stretch.width / 2})
        for i, moment in enumerate(stretch.moments):
            x.append(at + stretch.width * i / len(stretch.moments))
            levels = [base]
            for size in moment:
                levels.append(levels[-1] + size / GIB)
            stacks.append(levels)
        at += stretch.width
    x.append(at)
    budget = report.budget_bytes / GIB
    highest = max(range(len(stacks)), key=lambda i: stacks[i][-1])
    top = max(budget, stacks[highest][-1]) * 1.08
    names = ("context", *(name for name, _ in GROUPS))
    colours = [GROUP_COLOURS[name] for name in reversed(names)] + ["--edge", "--budget", "--ink"]
    chart = _xy("memory-timeline", colours, y_title="GiB", range=(0, top), xrange=(0, at), x_labels=middles)
    chart.y_labels = _ticks(top)
    lines = [_steps(x, [stack[level] for stack in stacks], top / HEIGHT) for level in range(len(names))]
    longest = max(map(len, lines))
    for name, line in reversed(list(zip(names, lines, strict=True))):  # the whole stack first, then what lies before it
        line += line[-1:] * (longest - len(line))  # pygal would fill up with points at the origin
        chart.add(name, line, fill=True, show_dots=False)
    verticals: Points = [point for edge in edges[1:] for point in ((edge, 0.0), (edge, top), None)]
    chart.add("phases", verticals, show_dots=False, stroke_style={"width": 1})
    chart.add("budget", [(0, budget), (at, budget)], show_dots=False, stroke_style={"width": 2, "dasharray": "7,4"})
    middle = (x[highest] + x[highest + 1]) / 2
    peak = {"value": (middle, stacks[highest][-1]), "label": f"tensors {gib(report.drawn_peak_bytes)}"}
    chart.add("peak", [peak], dots_size=4, stroke=False)
    return _svg(chart)


def _steps(x: Sequence[float], y: Sequence[float], visible: float) -> Points:
    """A line that keeps each value until the next; changes too small to be ``visible`` wait until they add up."""
    points: Points = [(x[0], y[0])]
    now = y[0]
    for at, value in zip(x[1:], y[1:], strict=False):
        if abs(value - now) >= visible:
            points += [(at, now), (at, value)]
            now = value
    return [*points, (x[-1], now)]


def furthest_shown(report: RiskReport) -> int:
    """Bytes at the right edge of the chart of ways: more than thrice the budget would press the rest together."""
    return min(
        max(way.process_bytes for way in report.ways), max(3 * report.budget_bytes, report.ways[0].process_bytes)
    )


def ways_chart(report: RiskReport) -> str:
    """Memory against expected tokens/s: the chosen way, its neighbours, and the line of those that none beats."""
    furthest = furthest_shown(report)
    shown = [way for way in report.ways if way.process_bytes <= furthest]
    chosen, *others = shown
    front = sorted((way for way in shown if way.on_front), key=lambda way: way.process_bytes)

    def points(ways: Iterable[Way]) -> Points:
        return [(way.process_bytes / GIB, way.tokens_per_second or 0.0) for way in ways]

    rates = [way.tokens_per_second or 0.0 for way in shown]
    low, fast, far, budget = min(rates) * 0.94, max(rates) * 1.06, furthest / GIB * 1.03, report.budget_bytes / GIB
    plain = [way for way in others if not way.changes_result]
    chart = _xy(
        "memory-and-speed", ["--front", "--temporaries", "--weights", "--logits", "--budget", "--ink"],
        x_title="GiB for the process", y_title="tokens/s", range=(low, fast), xrange=(0, far),
        y_labels=_ticks(fast, low), value_formatter=count,
    )  # fmt: skip
    chart.x_value_formatter = lambda x: f"{x:.0f}"
    chart.x_labels = _ticks(far)
    chart.add("Pareto front", points(front), show_dots=False, stroke_style={"width": 2})
    chart.add("costs numerics", points(way for way in others if way.changes_result), stroke=False, dots_size=3)
    chart.add("fits", points(way for way in plain if way.fits), stroke=False, dots_size=4)
    chart.add("does not fit", points(way for way in plain if not way.fits), stroke=False, dots_size=4)
    if budget <= far:
        dashes = {"width": 2, "dasharray": "7,4"}
        chart.add("budget", [(budget, low), (budget, fast)], show_dots=False, stroke_style=dashes)
    else:
        chart.add("budget", [])
    chart.add("chosen", [{"value": points([chosen])[0], "label": "chosen"}], stroke=False, dots_size=7)
    return _svg(chart)


def loss_chart(
    train: Iterable[tuple[int, float | None]], validation: Iterable[tuple[int, float | None]],
    forecast: Sequence[tuple[float, float, float, float]] = (),
) -> str:  # fmt: skip
    """Losses over steps, with a forecast's middle and interval as (step, middle, low, high)."""
    lines: list[Points] = [[(s, v) for s, v in points if v is not None] for points in (train, validation)]
    lines.append([(s, middle) for s, middle, _, _ in forecast])
    lines += [[(s, low) for s, _, low, _ in forecast], [(s, high) for s, _, _, high in forecast]]
    values = [point for line in lines for point in line if point is not None]
    if not values:
        return ""
    low, high = (pick(y for _, y in values) for pick in (min, max))
    margin = 0.05 * (high - low) or 0.1
    right = max(s for s, _ in values) or 1
    chart = _xy(
        "losses", ["--weights", "--logits", "--ink", "--ink", "--ink"], x_title="steps", y_title="loss",
        range=(low - margin, high + margin), xrange=(0, right), y_labels=_ticks(high + margin, low - margin),
    )  # fmt: skip
    chart.x_value_formatter = count
    chart.x_labels = _ticks(right)
    chart.add("training", lines[0], show_dots=len(lines[0]) == 1)
    chart.add("validation", lines[1], dots_size=3)
    chart.add("forecast", lines[2], show_dots=False, stroke_style={"width": 2, "dasharray": "6,4"})
    for name, line in zip(("low", "high"), lines[3:], strict=True):
        chart.add(name, line, show_dots=False, stroke_style={"width": 1, "dasharray": "2,3"})
    return _svg(chart)


def _ticks(top: float, low: float = 0.0) -> list[float]:
    """About six round numbers from the lowest to the highest."""
    rough = (top - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5, 10) if m * power >= rough), 10 * power)
    first = -(-low // step) * step
    return [round(first + i * step, 10) for i in range(int((top - first) / step) + 1)]


def _pygal() -> Any:
    """The library without the finder that it adds to ``sys.meta_path``.

    The finder serves plugins, and has only the method that Python 3.12 no longer asks for: every later import of
    something that is missing would warn about it.
    """
    import pygal
    import pygal.style

    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("pygal")]
    return pygal


def _xy(name: str, colours: Sequence[str], **settings: Any) -> pygal.XY:
    pygal = _pygal()

    style = pygal.style.Style(
        background="transparent", plot_background="transparent", foreground="var(--ink)",
        foreground_strong="var(--ink)", foreground_subtle="var(--line)", opacity="1", opacity_hover="1",
        colors=tuple(f"var({colour})" for colour in colours), font_family="inherit", transition="none",
        label_font_size=13, major_label_font_size=13, title_font_size=13, value_label_font_size=14,
        value_font_size=14,
    )  # fmt: skip
    chart = pygal.XY(
        style=style, js=[], width=WIDTH, height=HEIGHT, show_legend=False, disable_xml_declaration=True,
        allow_interruptions=True, print_labels=True, include_x_axis=False, show_y_guides=True, margin=6, **settings,
    )  # fmt: skip
    chart.uuid = name
    return chart


def _svg(chart: pygal.XY) -> str:
    """The picture without comments (they hold a date), pygal's script, and titles that would only show bare numbers."""
    return re.sub(
        r"<!--.*?-->|<script.*?</script>|<title>.*?</title>", "", str(chart.render(is_unicode=True)), flags=re.DOTALL
    )
