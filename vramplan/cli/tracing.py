"""``trace``: what a compiled step keeps under the installed torch."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import rich_click as click

from ..errors import ConfigError, Problem
from ..planner.memory import is_traced, kept_in_a_layer
from ..planner.partitions import family, short
from ..planner.step import check
from .options import FilePath, refused
from .probing import progress
from .subject import read_subject


@click.command()
@click.argument("config", metavar="CONFIG|PLAN|RUN", type=FilePath())
@click.option("--rank", type=click.IntRange(1), default=1, show_default=True, help="Which plan of a plan file.")
@click.option("--no-keep", is_flag=True, help="Show it only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def trace(config: Path, rank: int, no_keep: bool, as_json: bool) -> None:
    """Read off the installed torch what a compiled layer keeps from forward to backward. No GPU is needed.

    The model goes through torch.compile on fake tensors, up to where inductor parts forward and backward; that takes
    seconds. What is found is kept for estimates (for a card that is named with --gpu) of this kind of model under this
    release of torch, which are otherwise outside the model when the release does not come with a trace.

    \b
    vramplan trace run.toml
    """
    refused().finish()
    shape, step, _, _ = read_subject(config, rank)
    step = replace(step, compile=True, device="cuda")
    if problems := check(shape, step):
        raise ConfigError(problems)
    from ..memory_probe.traced import keep_traced, made_folder

    if not no_keep:
        made_folder()  # what cannot be kept is not worth the time
    progress()("tracing")
    import torch

    from ..memory_probe.partition import partition

    release, kind = short(torch.__version__), family(shape, step)
    try:
        found = partition(shape, step)
    except ValueError as error:
        rule = f"is not traced: {error}"
        raise ConfigError(Problem("model", shape.label, rule, "use another layout, or compile=false")) from None
    kept_at = None if no_keep else keep_traced(release, kind, found)
    listed, traced = int(kept_in_a_layer(shape, step)), int(found.layer_bytes(shape, step))
    if as_json:
        result = {"torch": torch.__version__, "family": kind, **asdict(found), "layer_bytes": traced}
        result |= {"listed_layer_bytes": listed, "kept": None if kept_at is None else str(kept_at)}
        click.echo(json.dumps(result))
        return
    from ..report.traces import print_trace

    print_trace(torch.__version__, shape, step, found, listed)
    if is_traced(release):
        click.echo(f"Estimates for torch {release} come with a trace of their own, made when this version was.")
    elif kept_at is not None:
        click.echo(f"Kept in {kept_at}: compiled estimates for torch {release} and a named card take it from now on.")
