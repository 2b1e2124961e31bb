"""``doctor``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import rich_click as click

from .options import FilePath, refused


@click.command()
@click.option("--out", type=FilePath(), help="Where runs will be written: its disk is looked at. [default: here]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(out: Path | None, as_json: bool) -> None:
    """Look at this machine: card, driver, torch, free memory, bfloat16, compile, allocator, disk, tokenizer.

    Each topic has a verdict (ok, warning, problem; unknown where there is nothing to judge) and a remedy. Nothing is
    changed, downloaded or put on the card.

    Exit code: 1 if anything is a problem, otherwise 0. A machine without a card is a warning.
    """
    refused().finish()
    from ..memory_probe.doctor import examine
    from ..report.doctor import findings_dict, print_findings

    findings = examine(out)
    if as_json:
        click.echo(json.dumps(findings_dict(findings)))
    else:
        print_findings(findings)
    if any(finding.verdict == "problem" for finding in findings):
        sys.exit(1)
