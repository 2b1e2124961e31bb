"""``train`` and ``sample``."""

from __future__ import annotations

import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from ..device import host_memory, live_gpu
from ..errors import ConfigError, DoesNotFitError, Problem
from ..planner.gpu import Budget, Gpu, find_gpu
from ..planner.memory import estimate
from ..planner.plan import make_plan
from ..planner.search import Grid
from ..runconfig import RunConfig
from ..units import gib

if TYPE_CHECKING:
    import torch


@click.command()
@click.argument("config", required=False, metavar="[CONFIG|RUN]", type=click.Path(path_type=Path))
@click.option("--data", metavar="FILE|DIR|GLOB", help="Parquet files with a text column.")
@click.option("--out", type=click.Path(path_type=Path), help="The run directory.")
@click.option("--resume", is_flag=True, help="Continue the run in --out (or: vramplan train --resume RUN).")
@click.option(
    "--replan", is_flag=True, help="If the plan no longer fits the free memory, train the best one that does."
)
@click.option("--shards", type=click.Path(path_type=Path), help="Where the tokens go. [default: beside the run]")
@click.option("--max-steps", type=click.IntRange(1), help="Stop after so many optimizer steps.")
@click.option("--quiet", is_flag=True, help="Print only problems and the end.")
def train(
    config: Path | None, data: str | None, out: Path | None, resume: bool, replan: bool, shards: Path | None,
    max_steps: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Train from Parquet files: tokenise once, train, evaluate, save; Ctrl-C saves and says how to resume.

    \b
    vramplan train run.toml --data fineweb.parquet --out runs/first
    vramplan train --resume runs/first
    """
    if resume and out is None and config is not None and config.is_dir():
        out, config = config, None
    if out is None:
        raise ConfigError(Problem("--out", "missing", "is required", "name the run directory"))
    if resume and config is None:
        loaded = _stored(out)
    elif config is None:
        raise ConfigError(Problem("CONFIG", "missing", "is required", "write one with `vramplan apply`"))
    else:
        loaded = RunConfig.load(config)
    if max_steps is not None:
        train_section = loaded.train.model_copy(update={"max_steps": max_steps})
        loaded = loaded.model_copy(update={"train": train_section})
    start_training(loaded, data, out, resume=resume, replan=replan, shards=shards, quiet=quiet)


def _stored(out: Path) -> RunConfig:
    from ..trainer.rundir import RunDirectory

    run = RunDirectory(out)
    if not run.config.exists():
        rule = "holds no run to resume" if out.is_dir() else "does not exist"
        raise ConfigError(Problem("--out", str(out), rule, "start the run without --resume"))
    return run.stored_config()


def start_training(
    config: RunConfig, data: str | None, out: Path, *, resume: bool, replan: bool, shards: Path | None = None,
    quiet: bool = False,
) -> None:  # fmt: skip
    """Check free memory, prepare the data, train; exits with 128 + the signal's number when interrupted."""
    if config.step.workload != "vramplan":
        rule = "is another script's memory, not this trainer's"
        raise ConfigError(Problem("step.workload", config.step.workload, rule, 'use workload = "vramplan"'))
    card = live_card(config)
    fitting = fit_to_free_memory(config, card, replan=replan and not resume)

    from ..report.progress import TrainingView
    from ..trainer.data import prepare
    from ..trainer.loop import train as run_training
    from ..trainer.shards import ShardSet
    from ..trainer.tokenizer import load_tokenizer

    view = TrainingView(fitting, quiet=quiet)
    with view:
        if data is None:
            found = ShardSet.open(_known_shards(out, resume))
        else:
            tokenizer = load_tokenizer()
            directory = shards or _default_shards(data, out, fitting)
            found = prepare(
                data, directory, tokenizer, fitting.data, fitting.model.vocab_size,
                block_size=fitting.model.block_size, on_event=view,
            )  # fmt: skip
        result = run_training(
            fitting, found, out, device=_device(fitting), on_event=view, resume=resume,
            peak_flops=card.peak_flops(fitting.step.dtype) if card else None,
        )  # fmt: skip
    if result.interrupted and result.signal_number is not None:
        sys.exit(128 + result.signal_number)


def _default_shards(data: str, out: Path, config: RunConfig) -> Path:
    """Beside the run, so that its neighbours share them: one folder for each source and way of cutting it."""
    identity = f"{Path(data).absolute()} {config.data.model_dump_json()}"
    name = Path(data).stem.replace("*", "all") or "all"
    return out.parent / "shards" / f"{name}-{zlib.crc32(identity.encode()):08x}"


def _known_shards(out: Path, resume: bool) -> Path:
    from ..trainer.rundir import RunDirectory

    sessions = RunDirectory(out).sessions() if resume else []
    if not sessions:
        raise ConfigError(Problem("--data", "missing", "is required", "name the Parquet files"))
    return Path(str(sessions[-1]["data_manifest"])).parent


def _device(config: RunConfig) -> torch.device:
    import torch

    if config.step.device == "cuda" and not torch.cuda.is_available():
        remedy = "plan for this machine with --gpu cpu, or install a CUDA build of torch"
        raise ConfigError(Problem("step.device", "cuda", "is not available to this torch", remedy))
    return torch.device(config.step.device)


def live_card(config: RunConfig) -> Gpu | None:
    """The catalogue entry of the card at hand, for its peak rate; None on a CPU or for an unknown card."""
    live = live_gpu() if config.step.device == "cuda" else None
    if live is None:
        return None
    try:
        return find_gpu(live.name, total_bytes=live.total_bytes)
    except ConfigError:
        return None


def fit_to_free_memory(config: RunConfig, card: Gpu | None, *, replan: bool) -> RunConfig:
    """Compare what the run needs with what is free now.

    Returns the configuration, or with ``replan`` the best one that fits. Raises DoesNotFitError, saying who holds the
    memory and which plan would fit.
    """
    shape, step = config.shape, config.step_config
    free, holders = free_memory(config)
    if free is None:
        return config
    need = estimate(shape, step, card).process_bytes
    if need <= free:
        return config
    budget = Budget(total_bytes=free, reserve_bytes=0)
    grid = Grid(
        shapes=(shape,), tokens_per_step=config.tokens_per_step, dtypes=(step.dtype,),
        compiles=(step.compile,), optimizers=(step.optimizer,), device=step.device,
    )  # fmt: skip
    found = make_plan(grid, card, budget, max_risk=config.plan.max_risk or 0.01, top=1).plans[0]
    words = f"The plan needs {gib(need)}, but only {gib(free)} is free now{holders}."
    better = (
        f"batch_size={found.step.batch_size} x grad_accum={found.step.grad_accum}, {found.step.loss} loss, "
        f"checkpointing={found.step.checkpointing} needs {gib(found.estimate.process_bytes)}"
    )
    if not replan:
        raise DoesNotFitError(f"{words}\nThe best plan that fits: {better}. Take it with --replan, or free memory.")
    click.echo(f"{words}\nReplanned: {better}; tokens per step stay {config.tokens_per_step:,}.")
    plan = config.plan.model_copy(update={"process_bytes": found.estimate.process_bytes, "budget_bytes": free})
    return RunConfig.build(
        shape, replace(found.step), train=config.train.model_dump(exclude_none=True), data=config.data.model_dump(),
        plan=plan.model_dump(exclude_none=True),
    )  # fmt: skip


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
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="Text to continue. [default: the start of a document]")
@click.option("--max-new-tokens", type=click.IntRange(1), default=100, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True, help="0 takes the likeliest.")
@click.option("--top-k", type=click.IntRange(1), default=200, show_default=True)
@click.option("--seed", type=int, default=1337, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def sample(run: Path, device: str, **options: Any) -> None:
    """Write text with the newest checkpoint of a run."""
    import torch

    from ..trainer.sample import stream

    chosen = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    click.echo(options["prompt"], nl=False)
    for piece in stream(run, device=torch.device(chosen), **options):
        click.echo(piece, nl=False)
    click.echo()
