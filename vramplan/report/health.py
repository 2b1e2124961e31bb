"""Run health: what a training run did, what is wrong with it, and where its loss is heading. Pure data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..planner.gpu import Gpu, find_gpu
from ..units import count, gib
from .advice import Advice, worst
from .charts import thinned
from .forecast import Forecast, forecast
from .health_advice import advise
from .health_figures import Figures, as_asked, figures_of, smoothed, throughput
from .run_directory import read_run
from .run_record import Curve, Record

NOT_KNOWN = "n/a"
MOST_SHOWN = 2000


@dataclass(frozen=True, slots=True)
class Fact:
    """One line about a run: the topic, its value in words ("n/a" where it is not known), and what goes with it."""

    topic: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHealth:
    """Everything the report shows.

    ``train`` and ``validation`` are (step, loss), None for a loss that was no number; ``train`` are single steps where
    the run logged them; of each curve at most MOST_SHOWN points, evenly taken. ``forecast_steps`` are the steps whose
    forecast is told; ``forecast_refused`` says why there is no forecast, ``forecast_caveat`` what it does not know of.
    ``notes`` say how the record was read, ``missing`` what would have to be given for more.
    """

    title: str
    program: str
    figures: Figures
    facts: tuple[Fact, ...]
    train: Curve
    validation: Curve
    tokens_per_second: tuple[tuple[int, float], ...]
    forecast: Forecast | None
    forecast_refused: str
    forecast_caveat: str
    forecast_steps: tuple[int, ...]
    advice: tuple[Advice, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The worst verdict of all advice."""
        return worst(self.advice)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "title": self.title,
            "program": self.program,
            "verdict": self.verdict,
            "figures": self.figures.as_dict(),
            "facts": [asdict(fact) for fact in self.facts],
            "advice": [asdict(piece) for piece in self.advice],
            "forecast": self.forecast.as_dict(self.forecast_steps) if self.forecast else None,
            "forecast_refused": self.forecast_refused or None,
            "forecast_caveat": self.forecast_caveat or None,
            "train": [list(point) for point in self.train],
            "validation": [list(point) for point in self.validation],
            "tokens_per_second": [list(point) for point in self.tokens_per_second],
            "missing": list(self.missing),
            "notes": list(self.notes),
        }


def health_of_run(path: Path, gpu: Gpu | None = None) -> RunHealth:
    """The health of the run in a directory of our trainer; of its own card unless another is given.

    Raises ConfigError when there is no run, or what is there cannot be read.
    """
    return build_health(read_run(path), gpu)


def card_of(record: Record) -> Gpu | None:
    """The card that a run says it was on, or else was planned for; None when neither is in the catalogue."""
    if record.step is not None and record.step.device == "cpu":
        return None
    device = record.device.partition("(")[2].rstrip(")")
    for name in (device, record.planned.gpu):
        if name:
            try:
                return find_gpu(name)
            except ConfigError:
                continue
    return None


def build_health(
    record: Record,
    gpu: Gpu | None = None,
    *,
    asked: int | None = None,
    unique_tokens: int | None = None,
    forecast_steps: tuple[int, ...] = (),
) -> RunHealth:
    """Judge a record. ``asked`` parameters, ``unique_tokens`` and ``gpu`` win over what the record says of them."""
    gpu = gpu or card_of(record)
    figures = figures_of(record, gpu, asked, unique_tokens)
    fitted = _forecast(record)
    found = fitted if isinstance(fitted, Forecast) else None
    steps = forecast_steps or _targets(record)
    return RunHealth(
        title=record.title,
        program=record.program,
        figures=figures,
        facts=tuple(_facts(record, figures, found, steps)),
        train=thinned(record.losses or record.train_evaluations, MOST_SHOWN),
        validation=thinned(record.validation, MOST_SHOWN),
        tokens_per_second=thinned(throughput(record), MOST_SHOWN),
        forecast=found,
        forecast_refused="" if isinstance(fitted, Forecast) else fitted,
        forecast_caveat=_caveat(record, figures) if found else "",
        forecast_steps=tuple(steps) if found else (),
        advice=advise(record, figures, found, tuple(steps)),
        missing=record.missing,
        notes=record.notes,
    )


def _forecast(record: Record) -> Forecast | str:
    warmup = record.rates.warmup_steps if record.rates else 0
    if record.validation:
        return forecast(record.validation, "validation loss", warmup)
    if record.train_evaluations:
        return forecast(record.train_evaluations, "evaluated training loss", warmup)
    return forecast(tuple(smoothed(record.losses)), "training loss, averaged over neighbouring steps", warmup)


def _caveat(record: Record, f: Figures) -> str:
    """What the learning rate will do that a fit to the past cannot show."""
    rates = record.rates
    if rates is None or f.learning_rate is None:
        return "The learning rate is not known: the forecast takes it that it goes on as it did."
    if rates.schedule != "constant" and f.steps_done >= rates.total_steps:
        return (
            f"The learning rate was down at step {rates.total_steps:,}, and the end of the curve has the benefit: "
            "going on at the lowest rate is slower than this, and a new schedule starts with a rise."
        )
    if rates.schedule != "constant" and f.learning_rate > 0.5 * rates.peak:
        return "The fall that comes with the decay of the learning rate is still ahead, and not in the forecast."
    return ""


def _targets(record: Record) -> tuple[int, ...]:
    """The end of the run, if it is still ahead, and two and three times the steps done."""
    done, end = record.steps_done, record.total_steps or 0
    return tuple(sorted({*([end] if end > done else []), 2 * done, 3 * done}))


def _facts(record: Record, f: Figures, found: Forecast | None, steps: tuple[int, ...]) -> list[Fact]:
    return [
        _size(record, f),
        _tokens(f),
        _data(f),
        _first(f),
        _losses(f),
        _ahead(found, steps),
        _rate(record, f),
        _speed(f),
        _utilisation(f),
        _memory(record),
    ]


def _size(record: Record, f: Figures) -> Fact:
    if f.parameters_without_positions is None:
        return Fact("parameters", NOT_KNOWN)
    bare = f"{count(f.parameters_without_positions)} without positions"
    value = bare if f.parameters is None else f"{count(f.parameters)}, {bare}"
    asked = f"{as_asked(f.asked_parameters)} asked for" if f.asked_parameters else "--params says how many were wanted"
    return Fact("parameters", f"{record.shape.label}: {value}" if record.shape else value, asked)


def _tokens(f: Figures) -> Fact:
    steps = f"{f.steps_done:,}" + (f" of {f.total_steps:,}" if f.total_steps else "") + " steps"
    if f.tokens_seen is None:
        return Fact("tokens seen", NOT_KNOWN, steps)
    per = f"; {f.tokens_per_parameter:.3g} per parameter" if f.tokens_per_parameter is not None else ""
    return Fact("tokens seen", f"{count(f.tokens_seen)}{per}", f"{steps} of {f.tokens_per_step:,} tokens")


def _data(f: Figures) -> Fact:
    if f.unique_tokens is None:
        return Fact("unique tokens", NOT_KNOWN, "--data-tokens says how many the data has")
    epochs = f"{f.epochs:.2f} epochs" if f.epochs is not None else ""
    return Fact("unique tokens", count(f.unique_tokens), epochs)


def _first(f: Figures) -> Fact:
    expected = f"ln({f.vocab_size:,}) = {f.first_loss_expected:.2f} expected" if f.first_loss_expected else ""
    return Fact("first loss", NOT_KNOWN if f.first_loss is None else f"{f.first_loss:.2f}", expected)


def _losses(f: Figures) -> Fact:
    parts = [
        f"{name} {value:.4f}"
        for name, value in (("training", f.train_loss), ("validation", f.validation_loss))
        if value is not None
    ]
    notes = []
    if f.gap is not None:
        notes.append(f"gap {f.gap:+.3f}")
    if f.validation_loss is not None and f.validation_loss < 100:
        notes.append(f"perplexity {math.exp(f.validation_loss):.1f}")
    if f.best_validation_loss is not None and f.best_validation_loss != f.validation_loss:
        notes.append(f"best validation {f.best_validation_loss:.4f} at step {f.best_validation_step:,}")
    return Fact("loss", ", ".join(parts) or NOT_KNOWN, ", ".join(notes))


def _ahead(found: Forecast | None, steps: tuple[int, ...]) -> Fact:
    if found is None:
        return Fact("forecast", NOT_KNOWN)
    told = [
        f"{middle:.2f} ({low:.2f} to {high:.2f}) at step {step:,}" for step, middle, low, high in found.curve(steps)
    ]
    return Fact("forecast", "; ".join(told) or NOT_KNOWN, found.what)


def _rate(record: Record, f: Figures) -> Fact:
    if record.rates is None or f.learning_rate is None:
        return Fact("learning rate", NOT_KNOWN)
    rates = record.rates
    shape = f"{rates.schedule}, peak {rates.peak:.3g}"
    if rates.schedule != "constant":
        shape += f", {rates.minimum:.3g} at step {rates.total_steps:,}"
    return Fact("learning rate", f"{f.learning_rate:.3g} at the last step", f"{shape}, warm-up {rates.warmup_steps:,}")


def _speed(f: Figures) -> Fact:
    if f.step_seconds is None:
        return Fact("speed", NOT_KNOWN)
    step = f"{f.step_seconds * 1000:,.0f} ms a step"
    if f.tokens_per_second is None:
        return Fact("speed", step)
    expected = f.expected_tokens_per_second
    return Fact(
        "speed", f"{f.tokens_per_second:,.0f} tokens/s, {step}", f"{expected:,.0f} expected" if expected else ""
    )


def _utilisation(f: Figures) -> Fact:
    printed = f"{f.mfu_printed:.1%} printed, of an A100's 312 TFLOPS" if f.mfu_printed is not None else ""
    if f.mfu is None:
        return Fact("MFU", NOT_KNOWN, "; ".join(part for part in (f.mfu_unknown, printed) if part))
    if f.mfu_printed_here is not None:
        printed += f": that is {f.mfu_printed_here:.0%} of this card"
    many = f", of each of {f.processes}" if f.processes > 1 else ""
    peak = f"{(f.peak_flops or 0) / 1e12:.1f} TFLOPS"
    return Fact("MFU", f"{f.mfu:.0%} of the {f.gpu}'s {peak}{many}", printed)


def _memory(record: Record) -> Fact:
    if record.peak_allocated_bytes is None:
        return Fact("peak memory", NOT_KNOWN)
    value = f"{gib(record.peak_allocated_bytes)} allocated"
    if record.peak_reserved_bytes is not None:
        value += f", {gib(record.peak_reserved_bytes)} reserved"
    planned = record.planned.peak_allocated_bytes
    return Fact("peak memory", value, f"{gib(planned)} allocated by the plan" if planned else "")
