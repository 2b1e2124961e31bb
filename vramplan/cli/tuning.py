"""``tune``."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import rich_click as click

from ..device import compile_support, host_memory, live_gpu
from ..errors import ConfigError, Problem, command
from ..files import write_text
from ..memory_probe.ledger import default_path
from ..planner.candidates import settle_shapes
from ..planner.gpu import Budget
from ..planner.memory import context_bytes
from ..planner.shape import Shape
from ..planner.step import tokens_per_step
from ..report.exports import with_step
from ..runconfig import RunConfig
from .options import FilePath, Size, refused
from .probing import child_options, configured, keep, place_options
from .subject import read_config

SHAPES = 4
"""Shapes near the target that are tried with --shape."""


@click.command()
@click.argument("config", metavar="CONFIG|PLAN", type=FilePath())
@place_options
@click.option("--shape", "vary_shape", is_flag=True, help="Also other layers, heads and widths near the same size.")
@click.option(
    "--compile", "compile_", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True,
    help="auto: both, where torch.compile works; off on a CPU.",
)  # fmt: skip
@click.option("--vram", type=Size(2**36), help="Memory it must fit. [default: what is free]")
@click.option("--trials", type=click.IntRange(1), help="Measure at most so many arms.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Stop after so long.")
@click.option("--patience", type=click.IntRange(1), default=10, show_default=True, help="Arms without gain until then.")
@click.option("--storage", help="Where the study is kept: any Optuna URL, or a FILE.journal. [default: the user's own]")
@click.option("--study", help="Its name. [default: follows from what is tuned, so that the same command goes on]")
@click.option("--seed", type=int, default=0, show_default=True)
@child_options
@click.option("-o", "--output", type=FilePath(), help="Write the winner as a run configuration (TOML).")
@click.option("--plot", type=FilePath(), help="Draw the trials (SVG).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def tune(
    config: Path, rank: int, device: str, vary_shape: bool, compile_: str, storage: str | None, study: str | None,
    output: Path | None, plot: Path | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Measure the ways to run the same steps, guided by the planner and by Optuna, until nothing better comes.

    Tokens per step and dtype stay. Killed or interrupted, the same command goes on where it was.

    \b
    vramplan tune run.toml -o tuned.toml --plot trials.svg
    vramplan tune plan.json --rank 2 --minutes 20
    """
    from ..memory_probe.arms import TIMED_SECONDS
    from ..memory_probe.probe import card_of, probe
    from ..memory_probe.study import open_study, session_lock
    from ..memory_probe.tuner import tune as run_study
    from ..report.tuning import as_dict, print_tuned, progress_line, save_plot

    refused().finish()
    space = _space(config, rank, device, vary_shape, compile_, given["vram"], card_of(live_gpu()))
    loaded = read_config(config, rank)
    name = study or _name(space)
    where = storage or _own_storage()
    _check_place(output, "--output")
    _check_place(plot, "--plot")
    opened = open_study(where, name, given["seed"])
    measure = space.measured_by(
        lambda arm: probe(
            arm.shape, arm.step, steps=given["steps"], seconds=given["timeout"], host_bytes=given["host_memory"],
            alloc_conf=arm.alloc_conf, timed_seconds=TIMED_SECONDS,
        ),
        lambda found: keep(given["ledger_path"], [found]),
    )  # fmt: skip
    again = command("vramplan", *sys.argv[1:])
    try:
        tuned = run_study(
            opened, space.arms(), measure, ruled_out=space.ruled_out,
            budget_bytes=space.budget_bytes, lock=session_lock(where),
            seconds=(given["minutes"] or math.inf) * 60, trials=given["trials"],
            patience=given["patience"], on_trial=lambda trial, best: click.echo(progress_line(trial, best), err=True),
        )  # fmt: skip
    except KeyboardInterrupt:
        click.echo(f"Stopped; every finished trial is kept in {where}. Go on with: {again}", err=True)
        raise SystemExit(130) from None
    if output is not None and tuned.best is not None:
        _write_winner(loaded, tuned.best, output)
    if as_json:
        click.echo(json.dumps(as_dict(tuned, name)))
    else:
        print_tuned(tuned, f"{name} in {where}", again)
        if output is not None and tuned.best is not None:
            click.echo(f"Wrote {output}.")
    if plot is not None:
        save_plot(tuned, plot)
    if tuned.best is None:
        raise SystemExit(3)


def _space(config: Path, rank: int, device: str, vary_shape: bool, compile_: str, vram: int | None, card: Any) -> Any:
    """What may vary, and the memory it must fit."""
    from ..memory_probe.arms import Space

    shape, step = configured(config, rank, device, None)
    if step.workload != "vramplan":
        remedy = "tune a configuration of this trainer"
        raise ConfigError(Problem("workload", step.workload, "is another script's", remedy))
    live = live_gpu() if step.device == "cuda" else None
    free = vram or (live.free_bytes if live is not None else host_memory().available_bytes)
    budget = Budget(total_bytes=free, reserve_bytes=0)
    if budget.budget_bytes <= context_bytes(card if live else None, step.device):
        raise ConfigError(Problem("--vram", free, "leaves nothing beside the context", "give more"))
    can, why = (False, "") if live is None else compile_support(live.capability, here=True)
    if compile_ == "on" and step.device == "cuda" and not can:
        raise ConfigError(Problem("--compile", "on", "is not possible here", why))
    compiles = {"on": (True,), "off": (False,), "auto": (True, False) if can else (False,)}[compile_]
    shapes: tuple[Shape, ...] = (shape,)
    if vary_shape:
        near, _ = settle_shapes(int(shape.parameters), 0.05, {}, shape)
        shapes = (shape, *[s for s in near if s != shape][:SHAPES])
    return Space(
        shapes=shapes, step=replace(step, compile=False), gpu=card if live else None,
        budget_bytes=budget.budget_bytes, compiles=compiles,
    )  # fmt: skip


def _name(space: Any) -> str:
    """The same for the same question on the same kind of device."""
    step = asdict(
        replace(space.step, batch_size=1, grad_accum=1, loss_chunk_tokens=1, checkpointing="none", loss="full")
    )
    total = int(tokens_per_step(space.shapes[0], space.step))
    text = json.dumps(
        [[asdict(s) for s in space.shapes], step, total, space.compiles, getattr(space.gpu, "name", platform.node())]
    )
    return f"tune-{space.shapes[0].label.replace('/', '-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _own_storage() -> str:
    path = default_path().with_name("studies.sqlite")
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path}"


def _check_place(path: Path | None, field: str) -> None:
    """Raise ConfigError before anything is measured when a file could not be written there."""
    if path is not None and not path.resolve().parent.is_dir():
        raise ConfigError(Problem(field, str(path), "is in a directory that does not exist", "create it first"))


def _write_winner(config: RunConfig, best: Any, output: Path) -> None:
    """The run configuration of the best arm; what is no setting of a run stands above it as a comment."""
    plan = config.plan.model_dump() | {"tokens_per_second": best.result.tokens_per_second}
    for name in ("process_bytes", "peak_allocated_bytes", "oom_risk"):  # those of the configuration it began with
        plan[name] = None
    text = with_step(config, best.arm.shape, best.arm.step, plan).to_toml()
    if best.arm.alloc_conf:
        text = f"# measured with PYTORCH_ALLOC_CONF={best.arm.alloc_conf}: set it for the run as well\n{text}"
    write_text(output, text, "--output")
