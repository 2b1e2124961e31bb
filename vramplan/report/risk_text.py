"""The OOM-risk report in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..planner.card_memory import Part
from ..planner.memory import STEP_PARTS
from ..planner.step import StepConfig
from ..planner.timeline import GROUPS, Moment
from ..planner.ways import Way
from ..units import KIB, gib, gib_needed
from .console import console, printable
from .plans import breakdown_table
from .risk import RiskReport, measured_bytes

LETTERS = dict(zip((name for name, _ in GROUPS), "#WOGALT", strict=True))
"""Stand for the groups in a bar of characters."""

BAR_WIDTH = 56
EVIDENCE_SHOWN = 12
"""Measurements listed; the JSON has all of them."""


def print_report(report: RiskReport, out: Console | None = None) -> None:
    """The whole report."""
    out = out or console()
    full = report.estimate
    out.print(f"[bold]OOM-risk report[/] {escape(printable(report.title))}")
    out.print(f"  [{'green' if report.fits else 'red'}]{report.verdict}[/]")
    out.print(f"  [dim]{report.risk.reason}[/]")
    if report.run_sentence:
        out.print(f"  {report.run_sentence}", markup=False)
    for note in report.notes:
        out.print(f"  [dim]{escape(note)}[/]")
    for note in full.caveats:
        out.print(f"  [yellow]warning[/]: {note}")
    needs = f"needs at least {gib_needed(report.needs_bytes)} free"
    out.print(f"  headroom   {gib(report.headroom_bytes)}; {needs}")
    if report.tokens_per_second and report.mfu is not None:
        out.print(f"  speed      {report.tokens_per_second:,.0f} tokens/s expected, MFU {report.mfu:.0%}")
    out.print()
    out.print(breakdown_table(full, report.budget_bytes))
    out.print(f"  The peak, {gib(full.peak_allocated_bytes)} allocated, comes during {full.peak_phase}. Largest then:")
    for row in report.top_tensors[:5]:
        share = row.n_bytes / full.peak_allocated_bytes
        out.print(f"    {gib(row.n_bytes):>10}  {share:>4.0%}  {row.name} ({row.category.replace('_', ' ')})")
    _print_timeline(out, report)
    _print_card(out, report.card, on_card=report.step.device == "cuda")
    _print_evidence(out, report)
    if report.repair is not None:
        out.print(f"\n  Smallest change that fits: {report.repair.sentence()}.")
    elif not report.fits:
        out.print(
            "\n  No other way to run the same optimizer step fits: a smaller model or block_size, or another card."
        )
    out.print(_lever_table(report))
    out.print("  * changes the optimisation itself (numerics or context length).")
    out.print(
        "  The largest batch divides the step's sequences; (all) is the whole step at once, without accumulation."
    )
    _print_ways(out, report)
    _print_measured(out, report)


def _print_timeline(out: Console, report: RiskReport) -> None:
    """The highest moment of each phase as a bar of letters against the budget."""
    other = report.estimate.context_bytes
    most = max(report.budget_bytes, *(sum(stretch.top) + other for stretch in report.timeline))
    out.print("\n[bold]One step, phase by phase[/]: the most that is allocated in each, with the process's context")
    for stretch in report.timeline:
        total = gib(sum(stretch.top) + other)
        bar = _stack(stretch.top, other, most)
        if report.budget_bytes == most:
            bar = f"{bar:<{BAR_WIDTH}}|"
        out.print(f"  {stretch.phase:<19}{total:>9}  {bar}", markup=False)
    legend = ", ".join(f"{LETTERS[name]} {name}" for name, _ in GROUPS)
    out.print(f"  # context and {legend.removeprefix('# ')}; | is the budget. Not counted: the allocator's slack.")
    if report.beside_the_tensors:
        out.print(f"  At the peak there are also {report.beside_the_tensors}.")
    beside = ", ".join(f"{name} {gib(size)}" for name, size in report.beside_the_step)
    out.print(f"  Beside a usual step, without context: {beside}.")


def _stack(moment: Moment, context_bytes: int, most: int) -> str:
    """One letter for each share of the width, rounded so that the whole bar has the right length."""
    bar, so_far = "", context_bytes
    bar += "#" * round(so_far / most * BAR_WIDTH)
    for (name, _), size in zip(GROUPS, moment, strict=True):
        so_far += size
        bar += LETTERS[name] * (round(so_far / most * BAR_WIDTH) - len(bar))
    return bar


def _print_card(out: Console, parts: tuple[Part, ...], *, on_card: bool) -> None:
    out.print(f"\n[bold]Where the {'card' if on_card else 'machine'}'s memory goes[/]")
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for part in parts:
        name = f"[red]{part.name}[/]" if part.kind == "missing" else escape(printable(part.name))
        table.add_row(name, gib(part.n_bytes), f"[dim]{escape(part.note)}[/]")
    out.print(table, soft_wrap=False)


def _print_evidence(out: Console, report: RiskReport) -> None:
    if not report.evidence:
        if report.step.device == "cuda":
            out.print("\n  No measurements of this architecture yet: `vramplan probe` on the card makes them.")
        return
    out.print(f"\n[bold]Measured before[/] on this architecture: {len(report.evidence)} configurations")
    for residual in report.evidence[-EVIDENCE_SHOWN:]:
        least = "at least " if residual.at_least else ""
        sizes = f"expected {gib(residual.expected_bytes)}, measured {least}{gib(measured_bytes(residual))}"
        out.print(f"    {sizes} ({residual.error:+.2%})")
    if len(report.evidence) > EVIDENCE_SHOWN:
        out.print(f"    and {len(report.evidence) - EVIDENCE_SHOWN} smaller ones; --json has them all")


def _lever_table(report: RiskReport) -> Table:
    table = Table(title="\nLevers, one at a time", title_justify="left", box=None, padding=(0, 2))
    for name in ("change", "needs", "saves", "speed", "largest batch"):
        table.add_column(name, justify="left" if name == "change" else "right", no_wrap=True)
    table.add_row(
        "as it is", gib(report.estimate.process_bytes), "", "", batch_words(report.largest_batch, report.step)
    )
    for lever in report.levers:
        speed = "n/a" if lever.speed_ratio is None else f"{lever.speed_ratio:.2f}x"
        largest = batch_words(lever.largest_batch, lever.step)
        name = f"{lever.name}{' *' if lever.changes_result else ''}"
        table.add_row(name, gib(lever.process_bytes), saved_words(lever.saved_bytes), speed, largest)
    return table


def saved_words(n_bytes: int) -> str:
    """Bytes saved; with a minus sign what more is needed, and plain zero for none."""
    shown = gib(abs(n_bytes) if abs(n_bytes) >= KIB else 0)
    return f"-{shown}" if n_bytes <= -KIB else shown


def batch_words(largest: int | None, step: StepConfig) -> str:
    """The largest batch in words: it divides the step's sequences, so the whole step is the most there is."""
    if largest is None:
        return "n/a"
    if largest == step.batch_size * step.grad_accum:
        return f"{largest} (all)"
    return str(largest) if largest else "none fits"


def way_words(way: Way) -> str:
    """A way's differences from the chosen one; the slice size of the loss where that is what differs."""
    words = [
        f"{word} in slices of {way.step.loss_chunk_tokens}" if word == "chunked loss" else word for word in way.changes
    ]
    return (", ".join(words) or "as it is") + (" *" if way.changes_result else "")


def _print_ways(out: Console, report: RiskReport) -> None:
    front = sorted((way for way in report.ways if way.on_front), key=lambda way: way.process_bytes)
    if not front or report.tokens_per_second is None:
        return
    fitting = sum(way.fits for way in report.ways)
    out.print(
        f"\n[bold]The same step run otherwise[/]: {len(report.ways)} neighbouring ways, {fitting} fit; those that none "
        "beats in memory and speed at once:"
    )
    for way in front:
        mark = "" if way.fits else "  [red]does not fit[/]"
        rate = f"{way.tokens_per_second:,.0f} tokens/s"
        out.print(f"    {gib(way.process_bytes):>10}  {rate:>17}  {way_words(way)}{mark}")
    if report.ways[0] not in front:
        out.print("    The chosen one is beaten by at least one of them.")


def _print_measured(out: Console, report: RiskReport) -> None:
    if not report.measured:
        return
    out.print(f"\n[bold]Measured[/] in {report.measured['steps']:,} steps of the run")
    for line in measured_lines(report):
        out.print(f"  {escape(printable(line))}")


def measured_lines(report: RiskReport) -> list[str]:
    """What the run measured, beside what was expected of it; sentences."""
    found = report.measured
    allocated, full = found.get("peak_allocated_bytes"), report.estimate
    lines = []
    if allocated is None and report.step.device == "cuda":
        lines.append("No step was logged with its peak.")
    elif allocated is None:
        lines.append(
            "A CPU run records no peak; `estimate` counts tensors that a CPU pass confirms in the tests, and "
            "`vramplan probe` counts them in real steps here."
        )
    else:
        error = full.peak_allocated_bytes / allocated - 1
        lines.append(f"Peak {gib(allocated)} allocated; the estimate is {error:+.2%} off.")
    lines += [
        f"{phase}: {gib(measured)} measured, {gib(expected)} expected"
        if expected
        else f"{phase}: {gib(measured)} measured"
        for phase, measured, expected in measured_phases(report)
    ]
    retries = found.get("alloc_retries")
    if retries:
        lines.append(f"The allocator gave back its cache and tried again {retries:,} times: memory was all but full.")
    elif retries == 0:
        lines.append("No allocator retries.")
    guard: list[dict[str, Any]] = found.get("guard") or []
    lines += [f"step {event['step']:,}: {event['reason']}" for event in guard]
    if not guard:
        lines.append("The guard had nothing to do.")
    return lines


def measured_phases(report: RiskReport) -> list[tuple[str, int, int | None]]:
    """Each phase a run measured: its most allocated bytes, and those expected of it (None where nothing was)."""
    peaks: dict[str, int] = report.measured.get("phase_peaks") or {}
    expected = report.estimate.every_peak
    found = []
    for phase, size in peaks.items():
        parts = [p for p in STEP_PARTS.get(phase, (phase,)) if p in expected]
        most = max((expected[p] for p in parts), default=None)
        if report.estimate.peak_phase in parts:  # with what is allocated there beside the tensors
            most = report.estimate.peak_allocated_bytes
        found.append((phase, size, most))
    return found
