"""``health``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import rich_click as click

from ..device import live_gpu
from ..errors import ConfigError, Problem
from ..files import check_not_over, write_text
from ..planner.gpu import Gpu, find_gpu
from .options import LONGEST_NAME, Count, FilePath, refused


def _card(name: str | None) -> Gpu | None:
    """The card of that name; ``auto`` is the one in this machine. Raises ConfigError for an unknown one."""
    if name is None or name.lower() != "auto":
        return find_gpu(name) if name is not None else None
    live = live_gpu()
    if live is None:
        raise ConfigError(Problem("--gpu", "auto", "finds no NVIDIA card", "name the one that it ran on: --gpu 4070"))
    return find_gpu(live.name, total_bytes=live.total_bytes)


@click.command()
@click.argument("run", metavar="RUN|LOG")
@click.option("--config", help="Of a log: nanoGPT's config file or command line, or our TOML.")
@click.option("--gpu", metavar="NAME|auto", help="Card that it ran on. [default: what the run directory says]")
@click.option("--params", type=Count(), help="Parameters that were wanted, such as 125M.")
@click.option("--data-tokens", type=Count(), help="Tokens of the training data, each counted once.")
@click.option("--at", type=Count(), multiple=True, help="Forecast the loss at this step. May be repeated.")
@click.option("--html", type=FilePath(), help="Write it as one HTML file that needs no network.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def health(
    run: str,
    config: str | None,
    gpu: str | None,
    params: int | None,
    data_tokens: int | None,
    at: tuple[int, ...],
    html: Path | None,
    as_json: bool,
) -> None:
    """Is this run healthy? True size, tokens and epochs, loss and where it is heading, MFU of your card, what is wrong.

    RUN is a run directory; LOG what nanoGPT's train.py printed, or - for standard input. A log says little of the
    configuration: --config takes nanoGPT's file, or its command line in quotation marks.

    Exit code: 1 if anything is a problem, otherwise 0.
    """
    problems = refused()
    card = None
    with problems:
        card = _card(gpu)
    if html is not None:
        with problems:
            check_not_over(html, "--html", [Path(name) for name in (run, config) if name and len(name) < LONGEST_NAME])
    problems.finish()
    from ..report.health import build_health
    from ..report.run_log import read_record

    record = read_record(run, config)
    result = build_health(record, card, asked=params, unique_tokens=data_tokens, forecast_steps=tuple(sorted(set(at))))
    if html is not None:
        from ..report.html import render_health

        write_text(html, render_health(result), "--html")
    if as_json:
        click.echo(json.dumps(result.as_dict()))
    elif html is not None:
        click.echo(f"The worst verdict is {result.verdict}. Wrote {html}.")
    else:
        from ..report.health_text import print_health

        print_health(result)
    if result.verdict == "problem":
        sys.exit(1)
