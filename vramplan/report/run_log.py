"""Whatever a user names as his run, as a :class:`Record`: a run directory, or a log of nanoGPT's train.py."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import ConfigError, Problem
from ..planner.nanogpt_config import NanoGPTConfig, read_nanogpt
from ..planner.shape import Shape
from ..runconfig import RunConfig
from ..trainer.watch import SpikeWatch
from .nanogpt_log import NanoGPTLog, read_log
from .run_directory import from_config, metrics_beside, read_run
from .run_record import Planned, Rates, Record, SpikeLine

STANDARD_INPUT = "-"
A100_FLOPS = 312e12
"""What nanoGPT's estimate_mfu divides by, whatever the card."""
_SHAPE_WORDS = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "bias")
WHOLE_PROCESSES = 0.2
"""How far (fraction) printed and recomputed MFU may be apart for their ratio to count the processes: the printed one
is a moving average that evaluations pull down."""

Config = NanoGPTConfig | RunConfig


def read_config(given: str, near: Path | None = None) -> Config:
    """Our TOML, nanoGPT's configuration file, or a command line of nanoGPT's. Raises ConfigError."""
    if given.strip().lower().endswith(".toml") and "--" not in given:
        return RunConfig.load(given.strip())
    return read_nanogpt(given, near=near)


def read_record(source: str, config: str | None = None) -> Record:
    """The record of a run directory, of a log file, or of standard input (``-``).

    ``config`` is what ``--config`` says. Raises ConfigError for what cannot be read or is neither.
    """
    path = Path(source)
    directory = path if path.is_dir() else metrics_beside(path)
    if source == STANDARD_INPUT:
        found = None if config is None else read_config(config)
        return record_of_log(read_log(sys.stdin.buffer, "standard input"), "standard input", found)
    if directory is not None:
        return _directory(directory, config)
    found = None if config is None else read_config(config, path.parent)
    try:
        with path.open("rb") as file:
            return record_of_log(read_log(file, source), source, found)
    except FileNotFoundError:
        remedy = "name a run directory, or the log of nanoGPT's train.py"
        raise ConfigError(Problem("run", source, "does not exist", remedy)) from None
    except OSError as error:
        raise ConfigError(Problem("run", source, f"cannot be read ({error.strerror or error})")) from None


def _directory(path: Path, config: str | None) -> Record:
    if config is None:
        return read_run(path)
    if (path / "config.toml").exists():
        rule = "means nothing: the run has its own configuration"
        raise ConfigError(Problem("--config", config, rule, "leave it out"))
    found = read_config(config)
    if not isinstance(found, RunConfig):
        raise ConfigError(Problem("--config", config, "is nanoGPT's, and the run is ours", "give the run's TOML"))
    return read_run(path, found)


def record_of_log(log: NanoGPTLog, title: str, config: Config | None) -> Record:
    """What a log says, with what its configuration adds. Where they differ, the log is right: it was there."""
    known, notes = _configured(log, config)
    seconds, clean = _step_seconds(log, known.pop("eval_interval", None))
    if seconds and not clean:
        notes.append("Every iteration that is logged also evaluates: the step times include evaluations.")
    printed = [mfu for _, mfu in log.times.values() if mfu is not None]
    record = Record(
        title=title,
        program="nanogpt",
        **known,
        printed_parameters=log.parameters,
        steps_done=log.steps_done,
        first_loss=_first_loss(log),
        losses=tuple(sorted(log.losses.items())),
        train_evaluations=log.curve(0),
        validation=log.curve(1),
        step_seconds=seconds,
        printed_mfu=median(printed) / 100 if printed else None,
        spikes=_spikes(log),
        spikes_resolution=_resolution(log),
        notes=(*_log_notes(log), *notes),
    )
    return _with_processes(record)


def _first_loss(log: NanoGPTLog) -> float | None:
    return log.evaluations[0][1] if 0 in log.evaluations else log.losses.get(0)


# -------------------------------------------------------------------- configuration


def _configured(log: NanoGPTLog, config: Config | None) -> tuple[dict[str, Any], list[str]]:
    """The fields of a Record that configuration and log decide together, and what is to be said of that."""
    if isinstance(config, RunConfig):
        shape = _with_vocabulary(config.shape, log.vocab_size)
        return from_config(config) | {
            "shape": shape, "vocab_size": int(shape.vocab_size), "processes": 1, "from_scratch": log.scratch,
            "tokens_per_step": log.tokens_per_step or config.tokens_per_step,
        }, []  # fmt: skip
    stated = {**(config.stated if config else {}), **log.stated}
    notes = list(config.notes) if config else []
    notes += _contradictions(config.stated if config else {}, log.stated)
    found = NanoGPTConfig(stated, config.world_size if config else 1)
    try:
        found.check("the configuration that the log repeats")
    except ConfigError as error:
        return _unknown(log), [*notes, f"{error}."]
    shape = _with_vocabulary(found.shape, log.vocab_size)
    if config is None and not _tells_its_shape(log, shape):
        return _unknown(log), notes
    settings = found.settings
    return {
        "shape": shape,
        "step": found.step,
        "vocab_size": int(shape.vocab_size),
        "tokens_per_step": log.tokens_per_step or _tokens_per_step(settings),
        "processes": config.world_size if config and config.world_size > 1 else None,
        "total_steps": settings["max_iters"],
        "from_scratch": log.scratch if log.scratch is not None else settings["init_from"] == "scratch",
        "rates": _rates(settings),
        "planned": Planned(),
        "eval_interval": settings["eval_interval"],
    }, notes


def _unknown(log: NanoGPTLog) -> dict[str, Any]:
    """Without a configuration: what the log alone says, and what is missing."""
    missing = "the model's shape, batch and schedule: give nanoGPT's config file or command line with --config"
    return {
        "tokens_per_step": log.tokens_per_step, "vocab_size": log.vocab_size, "processes": None,
        "from_scratch": log.scratch, "missing": (missing,),
    }  # fmt: skip


def _tells_its_shape(log: NanoGPTLog, shape: Shape) -> bool:
    """Whether a log without a configuration beside it has the shape: by the parameters that it prints.

    nanoGPT prints whatever is not its default. Without the count, the shape must be stated in so many words.
    """
    if log.parameters is None:
        return {"n_layer", "n_head", "n_embd"} <= log.stated.keys()
    counted = int(shape.parameters - shape.position_parameters)
    return abs(counted - log.parameters) <= 10_000


def _with_vocabulary(shape: Shape, vocab_size: int | None) -> Shape:
    return shape if vocab_size in (None, shape.vocab_size) else replace(shape, vocab_size=vocab_size)


def _tokens_per_step(settings: Mapping[str, Any]) -> int:
    """batch_size x accumulation x block_size; the accumulation is that of all processes together."""
    return int(settings["batch_size"] * settings["gradient_accumulation_steps"] * settings["block_size"])


def _rates(settings: Mapping[str, Any]) -> Rates | None:
    values = [settings[name] for name in ("learning_rate", "min_lr")]
    if not all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in values):
        return None
    decays = settings["decay_lr"] is not False
    return Rates(
        schedule="cosine" if decays else "constant", peak=float(values[0]), minimum=float(values[1]),
        warmup_steps=settings["warmup_iters"] if decays else 0, total_steps=settings["lr_decay_iters"],
    )  # fmt: skip


def _contradictions(given: Mapping[str, Any], log: Mapping[str, Any]) -> list[str]:
    differing = [name for name in given if name in log and given[name] != log[name]]
    return [f"{name} is {log[name]} by the log and {given[name]} by --config: the log is believed."
            for name in differing]  # fmt: skip


# -------------------------------------------------------------------- times, processes, spikes


def _step_seconds(log: NanoGPTLog, eval_interval: int | None) -> tuple[tuple[tuple[int, float], ...], bool]:
    """Seconds of iterations without evaluation and not the first of a process; whether such were found.

    If there are none, those of all but the first.
    """

    def evaluates(step: int) -> bool:
        return step in log.evaluations or (eval_interval is not None and step % eval_interval == 0)

    later = {step: ms / 1000 for step, (ms, _) in log.times.items() if step not in log.first_of_process}
    clean = {step: seconds for step, seconds in later.items() if not evaluates(step)}
    return tuple(sorted((clean or later).items())), bool(clean)


def _with_processes(record: Record) -> Record:
    """Count the data-parallel processes where nobody said: nanoGPT's MFU is that of one, its tokens are of all."""
    if record.processes is not None or record.shape is None:
        return record
    flops, tokens, printed = record.flops_per_token, record.tokens_per_step, record.printed_mfu
    if not (flops and tokens and printed and record.step_seconds):
        return replace(record, processes=1)
    seconds = median(seconds for _, seconds in record.step_seconds)
    ratio = flops * tokens / seconds / A100_FLOPS / printed
    whole = max(1, round(ratio))
    if whole == 1 or abs(ratio / whole - 1) > WHOLE_PROCESSES:
        return replace(record, processes=1)
    note = f"{whole} processes, by the MFU that is printed for each and the tokens of all ({ratio:.2f} times as many)."
    return replace(record, processes=whole, notes=(*record.notes, note))


def _spikes(log: NanoGPTLog) -> tuple[SpikeLine, ...]:
    """Our trainer's rule on the losses that were logged."""
    watch, found = SpikeWatch("loss"), []
    for step, loss in sorted(log.losses.items()):
        spike = watch.see(loss) if loss is not None else None
        if spike is not None:
            found.append(SpikeLine(step, spike.what, spike.value, spike.usual))
    return tuple(found)


def _resolution(log: NanoGPTLog) -> int:
    """Steps between logged losses."""
    steps = sorted(log.losses)
    gaps = [after - before for before, after in pairwise(steps)]
    return max(1, int(median(gaps))) if gaps else 1


def _log_notes(log: NanoGPTLog) -> list[str]:
    notes = []
    if log.returns:
        began = sum(to == 0 for _, to in log.returns)
        last = [f"from step {at:,} to {to:,}" for at, to in log.returns[-3:]]
        what = "a run that was resumed, or several in one file" if began else "a run that was resumed"
        notes.append(
            f"The log goes back {len(log.returns)} time{'s' * (len(log.returns) > 1)} ({what}; "
            f"{'last ' if len(log.returns) > 3 else ''}{', '.join(last)}): the later lines of a step count; what "
            "lay beyond is left out."
        )
    if log.cut_off:
        notes.append("The last line is cut off in a number and left out.")
    return notes
