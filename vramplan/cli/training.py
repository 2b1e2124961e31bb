"""``train`` and ``sample``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import rich_click as click

from ..device import host_memory, live_gpu
from ..errors import Collector, ConfigError, DoesNotFitError, Problem, command
from ..planner.gpu import Gpu
from ..planner.memory import estimate
from ..planner.plan import refit
from ..planner.risk import needed_for
from ..runconfig import DataSection, RunConfig
from ..units import gib, gib_needed
from .options import DEFAULT_MAX_RISK, FilePath, refused, with_evidence


@click.command()
@click.argument("config", required=False, metavar="[CONFIG|RUN]", type=FilePath())
@click.option("--data", metavar="FILE|DIR|GLOB", help="Parquet files with a text column.")
@click.option("--out", type=FilePath(), help="The run directory.")
@click.option("--resume", is_flag=True, help="Continue the run in --out (or: vramplan train --resume RUN).")
@click.option(
    "--replan", is_flag=True, help="If the plan no longer fits the free memory, train the best one that does."
)
@click.option("--shards", type=FilePath(), help="Where the tokens go. [default: beside the run]")
@click.option("--max-steps", type=click.IntRange(1), help="Stop after so many optimizer steps.")
@click.option(
    "--max-hours",
    type=click.FloatRange(0, min_open=True),
    help="Stop, saved and evaluated, after so many hours of work on this run in all its sessions; --resume with more "
    "goes on. The learning rate follows the steps all the same, and may not have come down by then.",
)
@click.option(
    "--track",
    multiple=True,
    metavar="tensorboard|wandb[:PROJECT]|trackio[:PROJECT]|none",
    help="Show the curves there too; can be given several times. A resumed run goes on with its own.",
)
@click.option("--tensorboard", is_flag=True, help="The same as --track tensorboard.")
@click.option(
    "--compile",
    "compilation",
    metavar="on|off|later:N",
    help="Compile from the first step, never, or after N eager steps if it fits. [default: as the configuration says]",
)
@click.option(
    "--guard/--no-guard",
    default=None,
    help="When memory runs out, go on in smaller micro-batches, or end. [default: on]",
)
@click.option("--grow", is_flag=True, help="With --resume: back to the micro-batches that memory had reduced.")
@click.option("--quiet", is_flag=True, help="Print only problems and the end.")
def train(
    config: Path | None, data: str | None, out: Path | None, resume: bool, replan: bool, shards: Path | None,
    max_steps: int | None, max_hours: float | None, track: tuple[str, ...], tensorboard: bool, compilation: str | None,
    guard: bool | None, grow: bool, quiet: bool,
) -> None:  # fmt: skip
    """Train from Parquet files: tokenise once, train, evaluate, save; Ctrl-C saves and says how to resume.

    \b
    vramplan train run.toml --data fineweb.parquet --out runs/first
    vramplan train --resume runs/first
    """
    collect = refused()
    bad = {problem.field for problem in collect.problems}
    out, config = None if "--out" in bad else out, None if "CONFIG|RUN" in bad else config
    if resume and out is None and config is not None and config.is_dir():
        out, config = config, None
    if out is None and "--out" not in bad:
        remedy = f"name the run directory: {command('vramplan', 'train', '--resume', 'RUN')}" if resume else ""
        collect.problems.append(Problem("--out", "missing", "is required", remedy or "name the run directory"))
    if config is None and not resume and "CONFIG|RUN" not in bad:
        collect.problems.append(Problem("CONFIG", "missing", "is required", "write one with `vramplan apply`"))
    loaded = None
    with collect:
        loaded = _stored(out) if config is None and out is not None else RunConfig.load(config) if config else None
    if out is None or loaded is None or collect.problems:
        if data is not None:  # its column is not known for certain, but the files can be looked at
            from ..trainer.parquet import find_sources

            with collect:
                find_sources(data, loaded.data.text_column if loaded else DataSection().text_column)
        raise collect.error()
    if "none" in track and (len(track) > 1 or tensorboard):
        raise ConfigError(Problem("--track", "none", "cannot be combined with a tracker", "give it alone"))
    track += ("tensorboard",) if tensorboard and "tensorboard" not in track else ()
    tracked = () if track == ("none",) else track or None
    loaded = _with_training(loaded, max_steps=max_steps, max_hours=max_hours, track=tracked, guard=guard)
    if grow and not resume:
        raise ConfigError(Problem("--grow", "given", "is for a run that is resumed", "add --resume, or leave it out"))
    loaded = with_compilation(loaded, compilation)
    start_training(loaded, data, out, resume=resume, replan=replan, shards=shards, quiet=quiet, grow=grow)


def _with_training(config: RunConfig, **changes: Any) -> RunConfig:
    """``config`` with other values in ``[train]``, of those that are not None. Raises ConfigError."""
    data = config.model_dump(exclude_none=True)
    data["train"] |= {name: value for name, value in changes.items() if value is not None}
    return RunConfig.parse(data)


def with_compilation(config: RunConfig, words: str | None) -> RunConfig:
    """``config`` with what --compile says. Raises ConfigError when that is none of its choices, or cannot be run."""
    if words is None:
        return config
    name, colon, steps = words.partition(":")
    later = name == "later" and steps.isascii() and steps.isdecimal() and int(steps) > 0
    if not later and (colon or words not in ("on", "off")):
        remedy = "use on, off, or later:N with the number of eager steps, such as later:200"
        raise ConfigError(Problem("--compile", words, "is not one of the choices", remedy))
    data = config.model_dump(exclude_none=True)
    data["step"]["compile"] = words == "on"
    data["train"].pop("compile_after", None)
    if later:
        data["train"]["compile_after"] = int(steps)
    return RunConfig.parse(data, "--compile")


def _stored(out: Path) -> RunConfig:
    from ..trainer.rundir import RunDirectory

    run = RunDirectory(out)
    if not run.exists:
        rule = "holds no run to resume" if out.is_dir() else "does not exist"
        raise ConfigError(Problem("--out", str(out), rule, "start the run without --resume"))
    return run.stored_config()


def start_training(
    config: RunConfig, data: str | None, out: Path, *, resume: bool, replan: bool | None, shards: Path | None = None,
    quiet: bool = False, to_stderr: bool = False, grow: bool = False,
) -> None:  # fmt: skip
    """Check everything that can be checked, prepare the data, train; raises Stopped when a signal ended the run.

    ``replan`` None says that the command has no such option.
    """
    from ..trainer.start import check_start, open_shards, torch_device
    from ..trainer.trackers import Tracker, Tracking, build_trackers

    collect, trackers = Collector(), list[Tracker]()
    with collect:
        check_start(config, out, resume=resume, data=data)
    with collect:
        trackers = build_trackers(config.train.track)
    collect.finish()
    live = live_gpu() if config.step.device == "cuda" else None
    card = live_card(config)
    fitting = fit_to_free_memory(config, card, replan=replan)

    from ..memory_probe.training import EvidenceOfTraining, spill_check
    from ..report.progress import TrainingView
    from ..trainer.events import Event
    from ..trainer.loop import train as run_training

    card_bytes = live.total_bytes if live else None
    with TrainingView(fitting, quiet=quiet, to_stderr=to_stderr, card_bytes=card_bytes) as view:
        evidence = EvidenceOfTraining(fitting, live, view.note)

        def on_event(event: Event) -> None:
            view(event)
            evidence(event)

        found = open_shards(fitting, out, resume=resume, data=data, folder=shards, on_event=view)
        with Tracking(trackers, fitting, on_event) as tracking:
            result = run_training(
                fitting, found, out, device=torch_device(fitting.step.device, "step.device"), on_event=tracking,
                resume=resume, grow=grow, peak_flops=card.peak_flops(fitting.step.dtype) if card else None,
                spilled=spill_check(fitting, live),
            )  # fmt: skip
    if result.interrupted and result.signal_number is not None:
        raise SystemExit(128 + result.signal_number)


def live_card(config: RunConfig) -> Gpu | None:
    """The catalogue entry of the card at hand, for its peak rate; None on a CPU or for an unknown card."""
    from ..memory_probe.probe import card_of

    return with_evidence(card_of(live_gpu())) if config.step.device == "cuda" else None


def fit_to_free_memory(config: RunConfig, card: Gpu | None, *, replan: bool | None) -> RunConfig:
    """Compare what the run needs for its risk limit with what is free now.

    Returns the configuration, or with ``replan`` the best way to run the same steps that fits. Raises DoesNotFitError,
    saying who holds the memory and which plan would fit.
    """
    from ..report.exports import refitted

    shape, step = config.shape, config.step_config
    free, holders = free_memory(config)
    if free is None:
        return config
    max_risk = config.plan.max_risk or DEFAULT_MAX_RISK
    need = math.ceil(needed_for(estimate(shape, step, card), max_risk))
    words = f"The plan needs at least {gib_needed(need)} free, but only {gib(free)} is free now{holders}."
    try:
        plans = refit(shape, step, card, free, max_risk)
    except DoesNotFitError as error:
        raise DoesNotFitError(f"{words}\n{error}") from None
    if plans is None:
        return config
    best = plans.plans[0]
    better = (
        f"batch_size={best.step.batch_size} x grad_accum={best.step.grad_accum}, {best.step.loss} loss, "
        f"checkpointing={best.step.checkpointing} needs at least {gib_needed(best.needs_bytes)}"
    )
    if not replan:
        way = "Take it with --replan" if replan is not None else f"Plan with --vram {gib(free)}"
        raise DoesNotFitError(f"{words}\nThe best plan that fits: {better}. {way}, or free memory.")
    click.echo(f"{words}\nReplanned: {better}; tokens per step stay {config.tokens_per_step:,}.", err=True)
    return refitted(config, plans)


def free_memory(config: RunConfig) -> tuple[int | None, str]:
    """Bytes free for the run now, and words for who holds the rest; None when nothing can tell."""
    if config.step.device == "cpu":
        host = host_memory()
        return host.available_bytes, f" of {gib(host.total_bytes)} host memory"
    live = live_gpu()
    if live is None:
        return None, ""
    held = ", ".join(f"{p.name} (pid {p.pid})" for p in live.processes)
    return live.free_bytes, f" on the {live.name}" + (f"; held by {held}" if held else "")


@click.command()
@click.argument("run", type=FilePath())
@click.option("--prompt", default="", help="Text to continue. [default: the start of a document]")
@click.option("--max-new-tokens", type=click.IntRange(1), default=100, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True, help="0 takes the likeliest.")
@click.option("--top-k", type=click.IntRange(1), default=200, show_default=True)
@click.option("--top-p", type=float, help="Of these the likeliest that together have this probability, such as 0.9.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. Can be given several times.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=1337, show_default=True)
@click.option(
    "--num-samples", type=click.IntRange(1), default=1, show_default=True, help="Texts; each has the next seed."
)
@click.option("--best", is_flag=True, help="Use the checkpoint with the lowest validation loss, not the newest.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def sample(run: Path, prompt: str, best: bool, device: str, **options: Any) -> None:
    """Write text with the newest checkpoint of a run. The same seed writes the same text."""
    refused().finish()
    import torch

    from ..trainer.sample import Sampling, stream
    from ..trainer.start import torch_device

    kind: Any = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    how = Sampling(**options)
    texts = stream(run, prompt, how, device=torch_device(kind, "--device"), best=best)
    for number, pieces in enumerate(texts):
        if how.num_samples > 1:
            click.echo(f"--- {number + 1} of {how.num_samples}, seed {how.seed + number} ---")
        click.echo(prompt, nl=False)
        for piece in pieces:
            click.echo(piece, nl=False)
        click.echo()
