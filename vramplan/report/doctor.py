"""An examination of the machine, for a person or a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..memory_probe.finding import Finding, worst
from .console import console

STYLES = {"ok": "green", "unknown": "dim", "warning": "yellow", "problem": "bold red"}


def findings_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """The worst verdict and every finding, as plain data."""
    return {
        "verdict": worst(finding.verdict for finding in findings),
        "findings": [finding.as_dict() for finding in findings],
    }


def print_findings(findings: Sequence[Finding], out: Console | None = None) -> None:
    """One line for each topic, what to do under those that have a remedy, and a count."""
    out = out or console()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        style = STYLES[finding.verdict]
        text = escape(finding.text)
        if finding.remedy:
            text += f"\n[bold]remedy[/]: {escape(finding.remedy)}"
        table.add_row(finding.topic.replace("_", " "), f"[{style}]{finding.verdict}[/]", text)
    out.print(table, soft_wrap=False)
    seen = Counter(finding.verdict for finding in findings)
    counted = [
        f"{seen[verdict]} {verdict}{'s' * (seen[verdict] > 1)}" for verdict in ("problem", "warning") if seen[verdict]
    ]
    out.print(f"\n{', '.join(counted) or 'Nothing is wrong'}.")
