"""A measurement, and the ledger's list of them, in the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich import markup
from rich.console import Console
from rich.table import Table

from ..errors import command
from ..memory_probe.confirm import Confirmation
from ..memory_probe.measurement import Measurement
from ..planner.step import CHECKPOINTING_WORDS, tokens_per_step
from ..units import count, duration, gib
from .console import console, printable

VERDICTS = {
    "fits": "[green]fits[/green]",
    "out_of_memory": "[red]out of memory[/red]",
    "spilled": "[red]spilled into host memory[/red]",
    "not_memory": "[yellow]failed, and not for want of memory[/yellow]",
    "timed_out": "[yellow]timed out[/yellow]",
    "killed": "[yellow]killed[/yellow]",
}
METHODS = {
    "tensors counted": "Every tensor was counted by the dispatcher, byte for byte; a CPU has no allocator statistics.",
    "allocator events": "Sizes are the CPU allocator's own events: inside a compiled graph no tensor can be counted.",
    "allocator statistics": "Sizes are torch's allocator statistics; the process is what the driver says.",
}


def escape(text: str) -> str:
    """Text that somebody else may have written, as it is: neither markup nor a command to the terminal."""
    return markup.escape(printable(text))


def what(m: Measurement) -> str:
    """The configuration in a line."""
    step = m.step
    words = [
        f"{m.shape.label}, {count(int(m.shape.parameters))} parameters", f"batch {step.batch_size} x {step.grad_accum}",
        step.dtype, m.mode, f"{step.loss} loss", CHECKPOINTING_WORDS[step.checkpointing], step.optimizer,
    ]  # fmt: skip
    words += [f"{step.workload} workload"] if step.workload != "vramplan" else []
    words += [m.alloc_conf] if m.alloc_conf else []
    return ", ".join(words)


def print_probe(m: Measurement, to: Console | None = None) -> None:
    """What was run, how it ended, and estimate beside measurement."""
    out = to or console()
    out.print(escape(what(m)))
    where = " on " + escape(m.device) if m.device else ""
    cap = f", under a cap of {gib(m.cap_bytes)}" if m.cap_bytes else ""
    out.print(f"{VERDICTS[m.outcome]}{where}{cap}: {escape(m.reason)}")
    if m.method:
        out.print(_sizes(m))
        out.print(METHODS[m.method])
    if m.phase_peaks:
        peaks = ", ".join(f"{escape(name)} {gib(size)}" for name, size in m.phase_peaks.items())
        out.print(f"Peaks by phase: {peaks}.")
    if m.retries:
        out.print(f"The allocator gave cached memory back and tried again {m.retries} times: it was tight.")
    _speed(m, out)


def _sizes(m: Measurement) -> Table:
    table = Table(box=None, pad_edge=False)
    for name, where in (("", "left"), ("measured", "right"), ("estimated", "right"), ("error", "right")):
        table.add_column(name, justify=where)  # type: ignore[arg-type]
    rows = [("allocated", m.allocated_bytes, m.expected_allocated_bytes)]
    if m.architecture != "cpu":
        rows += [
            ("reserved", m.reserved_bytes, m.expected_reserved_bytes),
            ("process", m.process_bytes, m.expected_process_bytes),
        ]
    for name, measured, expected in rows:
        shown = "not known" if measured is None else gib(measured)
        error = f"{measured / expected - 1:+.2%}" if measured and expected and m.completed else ""
        table.add_row(name, shown, gib(expected), error)
    return table


def _speed(m: Measurement, out: Console) -> None:
    if not m.step_seconds or m.tokens_per_second is None:
        return
    median = statistics.median(m.step_seconds)
    spread = max(m.step_seconds) / min(m.step_seconds) - 1 if min(m.step_seconds) > 0 else 0.0
    tokens = int(tokens_per_step(m.shape, m.step_config))
    timed = f"{len(m.step_seconds)} steps timed, {spread:.0%} apart"
    expected = f"; {count(m.expected_tokens_per_second)} expected" if m.expected_tokens_per_second else ""
    rate = f"{count(m.tokens_per_second)} tokens/s{expected}"
    out.print(f"{duration(median)} for a step of {tokens:,} tokens ({timed}): {rate}.")
    if m.step.compile and m.first_step_seconds is not None:
        compiling = max(0.0, m.first_step_seconds - median)
        peak = f", its peak {gib(m.first_step_peak_bytes)}" if m.first_step_peak_bytes else ""
        out.print(f"The first step compiled for {duration(compiling)}{peak}.")


def print_ledger(measurements: Sequence[Measurement], kept: int, path: str) -> None:
    """The ledger, or a part of the measurements that are kept in it, as a table."""
    out = console()
    table = Table(box=None, pad_edge=False)
    for name in ("id", "when", "device", "configuration", "outcome", "error"):
        table.add_column(name, overflow="fold")
    for m in measurements:
        error = m.residual
        table.add_row(
            m.id[:8], escape(m.when[:16].replace("T", " ")), escape(m.device or m.architecture), escape(what(m)),
            m.outcome.replace("_", " "), "" if error is None else f"{error:+.2%}",
        )  # fmt: skip
    if measurements:
        out.print(table)
    shown = f"{len(measurements)} of " if len(measurements) != kept else ""
    total = f"{kept or 'No'} measurement{'' if kept == 1 else 's'}"
    out.print(f"{shown}{total} in {escape(path)}.")


def print_confirmation(confirmation: Confirmation, plan_file: str, out: Console | None = None) -> None:
    """What was run to confirm a plan, and what no pass has shown."""
    out = out or console()
    out.print("\n[bold]Confirmation[/] by real passes")
    for tried in confirmation.tried:
        mark = "[green]holds[/]" if tried.holds else "[red]does not hold[/]"
        m = tried.measurement
        where = f" on {escape(m.device)}" if m.device else ""
        sizes = f"; {gib(m.allocated_bytes)} allocated, {gib(m.expected_allocated_bytes)} estimated" if (
            m.allocated_bytes
        ) else ""  # fmt: skip
        out.print(f"  plan {tried.rank} {mark}{where}: {escape(tried.why)}{sizes}")
    if confirmation.unconfirmed:
        out.print(f"  not confirmed: {escape(', '.join(confirmation.unconfirmed))}")
    if confirmation.rank is None:
        out.print("  [red]No plan is confirmed.[/]")
    elif confirmation.rank > 1:
        words = command("vramplan", "apply", plan_file, "--rank", confirmation.rank)
        out.print(f"  Take plan {confirmation.rank}: {escape(words)}")
