"""The OOM-risk report as one HTML file that needs no network, and the parts that the planner's page takes from it."""

from __future__ import annotations

from datetime import date
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from .. import __version__
from ..units import gib, gib_needed
from .charts import GROUP_COLOURS, furthest_shown, loss_chart, thinned, timeline_chart, ways_chart
from .console import printable
from .plans import percent
from .risk import RiskReport, measured_bytes
from .risk_text import batch_words, measured_lines, measured_phases, saved_words, way_words

if TYPE_CHECKING:
    import jinja2

    from .health import RunHealth

PART_COLOURS = {"outside": "var(--temporaries)", "free": "var(--panel)", "missing": "var(--bad)"}
NAMED_COLOURS = {
    "driver": "var(--workspace)", "kept back": "var(--optimizer)",
    "CUDA context": "var(--context)", "Python and torch": "var(--context)",
    "tensors at the peak": "var(--weights)", "allocator slack": "var(--activations)",
    "tuning kernels": "var(--logits)",
}  # fmt: skip


CURVE_POINTS = 400
"""Of a run's losses, drawn and listed at the most."""


def render_report(report: RiskReport, health: RunHealth | None = None) -> str:
    """The whole page; with the health of the run where there is one."""
    context = {
        **sections_context(report),
        **(_health_context(health) if health else {"health": None}),
        "measured_lines": measured_lines(report) if report.measured else [],
        "measured_phases": measured_phases(report) if report.measured else [],
    }
    return _page("report.html", context)


def render_health(health: RunHealth) -> str:
    """The health of a run as a page of its own."""
    return _page("page_health.html", _health_context(health))


def _page(template: str, context: dict[str, Any]) -> str:
    about = {"version": __version__, "date": date.today().isoformat(), "style": Markup(style())}
    return environment().get_template(template).render(context | about)


def _health_context(health: RunHealth) -> dict[str, Any]:
    train, validation = thinned(health.train, CURVE_POINTS), thinned(health.validation, CURVE_POINTS)
    rows = {step: [loss, None] for step, loss in train}
    for step, loss in validation:
        rows.setdefault(step, [None, None])[1] = loss
    curve: list[tuple[int, float, float, float]] = []
    if health.forecast:
        last, furthest = health.forecast.last_step, max((health.forecast.last_step, *health.forecast_steps))
        curve = health.forecast.curve([last + (furthest - last) * i // 20 for i in range(21)])
    chart = loss_chart(train, validation, curve)
    return {
        "health": health,
        "loss_chart": Markup(_labelled(chart, "Losses of the run over its steps.")) if chart else "",
        "curve_rows": [(step, *losses) for step, losses in sorted(rows.items())],
    }


def sections_context(report: RiskReport) -> dict[str, Any]:
    """What the templates need beside the report: charts, widths of the card's parts, and the style."""
    whole = sum(part.n_bytes for part in report.card if part.kind != "missing") or 1
    has_speed = bool(report.ways) and report.tokens_per_second is not None
    return {
        "report": report,
        "timeline_chart": Markup(_labelled(timeline_chart(report), _timeline_words(report))),
        "ways_chart": Markup(_labelled(ways_chart(report), _ways_words(report))) if has_speed else "",
        "groups": list(GROUP_COLOURS.items()),
        "shares": [
            (part, part.n_bytes / whole, NAMED_COLOURS.get(part.name) or PART_COLOURS[part.kind])
            for part in report.card
        ],
        "measured_bytes": measured_bytes,
        "way_words": way_words,
        "beyond": sum(way.process_bytes > furthest_shown(report) for way in report.ways) if has_speed else 0,
    }


def _timeline_words(report: RiskReport) -> str:
    full = report.estimate
    return (
        f"Memory of one training step. It peaks at {gib(full.peak_allocated_bytes)} during {full.peak_phase}; the "
        f"budget is {gib(report.budget_bytes)}. The table below has the figures."
    )


def _ways_words(report: RiskReport) -> str:
    front = sum(way.on_front for way in report.ways)
    return (
        f"Memory against speed of {len(report.ways)} ways, {front} of them on the Pareto front. The table has them all."
    )


def _labelled(svg: str, words: str) -> str:
    """A chart that a screen reader announces with these words instead of reading its numbers one by one."""
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(words)}" ', 1)


@cache
def style() -> str:
    """The style sheet, for both colour schemes, phones and paper."""
    return (files(__package__) / "templates" / "style.css").read_text(encoding="utf-8")


@cache
def environment() -> jinja2.Environment:
    """The templates; whatever they print is escaped unless it is marked as safe."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.PackageLoader("vramplan.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    found.filters |= {
        "gib": gib, "gib_needed": gib_needed, "percent": percent, "printable": printable, "saved": saved_words,
        "batch": batch_words, "sentence": lambda text: text[:1].upper() + text[1:],
    }  # fmt: skip
    return found
