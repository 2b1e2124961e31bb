"""``ui``."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import rich_click as click

from ..device import live_gpu
from ..errors import ConfigError, Problem
from .options import DEFAULT_MAX_RISK, Share, refused, resolve_target, torch_option, torch_release, with_evidence


@click.command()
@click.option("--gpu", metavar="NAME", help="Card that is chosen at first. [default: the one here, else RTX 4070]")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on. [default: any that is free]")
@click.option("--browser/--no-browser", default=True, show_default=True, help="Open the page in a browser.")
@click.option(
    "--max-risk", type=Share(1e-6, 0.5), default=DEFAULT_MAX_RISK, help="Largest accepted OOM risk. [default: 1%]"
)
@torch_option
def ui(gpu: str | None, port: int, browser: bool, max_risk: float, torch: str | None) -> None:
    """A planner's page in the browser: move sliders, and see at once whether it fits.

    It listens on this machine's loopback address only, sends nothing anywhere and keeps nothing. What it shows comes
    from the same code as plan, estimate and report. It ends with Ctrl-C.
    """
    from ..report.page import Page
    from ..report.page_server import PageServer

    refused().finish()
    page = Page(_offers(gpu), max_risk, torch_release(torch), _best)
    with PageServer(page, port) as server:
        click.echo(f"The planner's page: {server.url}  (Ctrl-C ends it)")
        if browser:
            import webbrowser

            with contextlib.suppress(webbrowser.Error):
                webbrowser.open(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    click.echo("Stopped.")


DEFAULT_CARD = "4070"


def _offers(first: str | None) -> list[Any]:
    """Every card of the catalogue with its usual budget; first the one that was named, or is in this machine."""
    from ..planner.evidence import NO_EVIDENCE, Evidence
    from ..planner.gpu import budget, load_gpus
    from ..report.page import Offer

    name = first or ("auto" if live_gpu() is not None else DEFAULT_CARD)
    target = resolve_target(name, None, None, False)
    if target.device == "cpu":
        raise ConfigError(Problem("--gpu", name, "is no card", "the page plans for cards; name one"))
    offers = [] if target.gpu is None else [Offer(target.gpu, target.budget.budget_bytes)]
    evidence: dict[tuple[int, int], Evidence] = {}
    for card in load_gpus():
        if card.capability not in evidence:
            found = with_evidence(card)
            evidence[card.capability] = found.evidence if found else NO_EVIDENCE
        if not offers or card.name != offers[0].gpu.name:
            known = replace(card, evidence=evidence[card.capability])
            offers.append(Offer(known, budget(card).budget_bytes))
    return offers


def _best(words: list[str]) -> Any:
    """The search of ``plan`` for the words of its command line."""
    from .planning import plan, search_plans

    with plan.make_context("plan", words) as context:
        _, _, plans = search_plans(context.params, refused())
    return plans
