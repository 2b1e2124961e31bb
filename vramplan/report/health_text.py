"""Run health in the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .console import console, printable
from .health import RunHealth
from .health_figures import smoothed
from .run_record import Curve, finite

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}
CHART_WIDTH, CHART_HEIGHT = 64, 12
FLAT = 1e-9
LEAST_SHOWN = 1e-6
"""Losses below it have no place on a logarithmic scale that shows the others."""


def print_health(health: RunHealth, out: Console | None = None) -> None:
    """Facts, a chart of the loss, the forecast, the advice with its evidence, and what was not known."""
    out = out or console()
    out.print(f"[bold]Run health[/] {_shown(health.title)}")
    for note in health.notes:
        out.print(f"  {_shown(note)}", style="dim")
    table = _table()
    for fact in health.facts:
        note = f" [dim]({_shown(fact.note)})[/]" if fact.note else ""
        table.add_row(f"  {fact.topic}", f"{_shown(fact.value)}{note}")
    out.print(table, soft_wrap=False)
    chart = loss_chart(health.train, health.validation)
    if chart:
        out.print()
        for line in chart:
            out.print(f"  {line}", markup=False)
    _print_forecast(health, out)
    out.print()
    advice = _table(3)
    for piece in health.advice:
        text = _shown(piece.text) + (f" [dim]{_shown(piece.evidence)}[/]" if piece.evidence else "")
        if piece.remedy:
            text += f"\n[bold]remedy[/]: {_shown(piece.remedy)}"
        advice.add_row(f"[{STYLES[piece.verdict]}]{piece.verdict}[/]", piece.topic, text)
    out.print(advice, soft_wrap=False)
    for missing in health.missing:
        out.print(f"[yellow]missing[/] {_shown(missing)}")
    seen = Counter(piece.verdict for piece in health.advice)
    counted = [f"{seen[v]} {v}{'s' * (seen[v] > 1)}" for v in ("problem", "warning") if seen[v]]
    out.print(f"\n{', '.join(counted) or 'Nothing is wrong'}.")


def _print_forecast(health: RunHealth, out: Console) -> None:
    if health.forecast is None:
        out.print(f"\n  No forecast: {_shown(health.forecast_refused)}.")
        return
    out.print(f"\n  Forecast: {_shown(health.forecast.words)}.")
    for step, middle, low, high in health.forecast.curve(health.forecast_steps):
        out.print(f"    step {step:>9,}  {middle:.2f}  ({low:.2f} to {high:.2f})")
    if health.forecast_caveat:
        out.print(f"    {_shown(health.forecast_caveat)}", style="dim")
    beyond = [step for step in health.forecast_steps if step > health.forecast.furthest_step]
    if beyond:
        furthest = health.forecast.furthest_step
        out.print(f"    none for {', '.join(f'{s:,}' for s in beyond)}: beyond step {furthest:,} nothing was checked")


def _table(columns: int = 2) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for _ in range(columns - 1):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _shown(text: str) -> str:
    return escape(printable(text))


def loss_chart(train: Curve, validation: Curve, width: int = CHART_WIDTH, height: int = CHART_HEIGHT) -> list[str]:
    """Lines of a chart of both curves over the steps, training ``.`` and validation ``o``; empty without two points.

    The losses' scale is logarithmic, so that the end of a long fall can still be seen.
    """
    curves = [("." if validation else "*", smoothed(train, width)), ("o", finite(validation))]
    points = [point for _, curve in curves for point in curve if point[1] > LEAST_SHOWN]
    if len({step for step, _ in points}) < 2:
        return []
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    span = math.log(high / low) or FLAT
    cells = [[" "] * width for _ in range(height)]
    for mark, curve in curves:
        for step, loss in curve:
            if loss > LEAST_SHOWN:
                column = round((step - first) / (last - first) * (width - 1))
                cells[round(math.log(high / loss) / span * (height - 1))][column] = mark
    labels = _labels(low, high, height)
    lines = [f"{label:>8} |{''.join(row).rstrip()}" for label, row in zip(labels, cells, strict=True)]
    legend = " and ".join(
        f"{mark} {name}" for (mark, curve), name in zip(curves, ("training", "validation"), strict=True) if curve
    )
    gap = " " * max(1, width - len(f"{first:,}") - len(f"{last:,}"))
    return [f"loss ({legend})", *lines, f"{'':8} +{'-' * width}", f"{'step':>8}  {first:,}{gap}{last:,}"]


def _labels(low: float, high: float, height: int) -> Sequence[str]:
    """A loss for every third line, and for the last."""
    rows = [high * (low / high) ** (row / (height - 1)) for row in range(height)]
    return [f"{loss:.2f}" if row % 3 == 0 or row == height - 1 else "" for row, loss in enumerate(rows)]
