"""What to make of a run's figures: a verdict on each topic, the numbers behind it, and what to do."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import command
from ..planner.plan import FAR_FROM_TARGET
from ..planner.shape import TOKENS_PER_PARAMETER
from ..units import count, gib
from . import health_losses as losses
from .advice import Advice, worst
from .forecast import Forecast
from .health_figures import Figures, as_asked
from .run_record import Record

EPOCHS_AS_NEW = 4
"""Up to about four epochs repeated text is worth nearly as much as new text (Muennighoff et al. 2023)."""
SLOWER_THAN_EXPECTED = 0.7
"""Of the expected throughput: the planner's own error is far smaller (README)."""
PEAK_ABOVE_PLAN = 1.05
STILL_HIGH = 0.5
"""A last learning rate above this fraction of the peak has its decay still to come."""


def advise(record: Record, f: Figures, found: Forecast | None, steps: tuple[int, ...]) -> tuple[Advice, ...]:
    """Every judgement, in the order of a run: size, data, losses, learning rate, speed, memory, what is next."""
    parts = (
        _size, _budget, _data, losses.first_loss, losses.not_numbers, losses.spikes, losses.course, losses.gap,
        _schedule, _length, _speed, _drops, _memory,
    )  # fmt: skip
    told = [piece for part in parts for piece in part(record, f)]
    return (*told, *_next(record, f, found, steps, told))


def _size(record: Record, f: Figures) -> Iterator[Advice]:
    asked, has = f.asked_parameters, f.parameters or f.parameters_without_positions
    if not record.shape_confirmed and record.shape is not None and f.parameters_without_positions is not None:
        counted = int(record.shape.parameters - record.shape.position_parameters)
        yield Advice(
            "warning", "size", "The configuration is not that of this log, or the model was changed.",
            f"{count(f.parameters_without_positions)} parameters without positions in the log, {count(counted)} by the "
            f"configuration ({record.shape.label})",
            "give the configuration of this run with --config",
        )  # fmt: skip
    if asked is None or has is None:
        return
    numbers = f"{has:,} of {asked:,}: {has / asked - 1:+.0%}"
    label = f"{record.shape.label} has" if record.shape else "The model has"
    if abs(has / asked - 1) > FAR_FROM_TARGET:
        remedy = f"vramplan plan --params {as_asked(asked)} finds shapes of that size"
        yield Advice(
            "warning", "size", f"{label} {count(has)} parameters, not the {as_asked(asked)} asked for.", numbers, remedy
        )
    else:
        yield Advice("ok", "size", f"{label} {count(has)} parameters, as asked for.", numbers)


def _budget(record: Record, f: Figures) -> Iterator[Advice]:
    per = f.tokens_per_parameter
    if per is None or f.tokens_seen is None:
        return
    numbers = f"{count(f.tokens_seen)} tokens, {per:.3g} per parameter; {TOKENS_PER_PARAMETER} are compute-optimal"
    if per < TOKENS_PER_PARAMETER:
        text = "For its compute the model has seen few tokens: more of them gain more than more parameters would."
        yield Advice("note", "tokens", text, numbers)
    elif per > 2 * TOKENS_PER_PARAMETER:
        text = (
            "For its compute the model is small: a larger one would have reached a lower loss with the same FLOPs. "
            "Training on still lowers this one's, ever more slowly."
        )
        yield Advice("note", "tokens", text, f"{numbers} (Hoffmann et al. 2022)")
    else:
        yield Advice("ok", "tokens", "Tokens and parameters are in the usual proportion.", numbers)


def _data(record: Record, f: Figures) -> Iterator[Advice]:
    if f.epochs is None or f.unique_tokens is None:
        return
    numbers = f"{f.epochs:.2f} epochs of {count(f.unique_tokens)} unique tokens"
    if f.epochs > EPOCHS_AS_NEW:
        text = f"The data is repeated more than {EPOCHS_AS_NEW} times: each further pass teaches less."
        yield Advice("warning", "data", text, f"{numbers} (Muennighoff et al. 2023)", "add data")
    elif f.epochs > 1:
        yield Advice("note", "data", "The data is read more than once.", numbers)
    else:
        yield Advice("ok", "data", "No token was read twice.", numbers)


def _schedule(record: Record, f: Figures) -> Iterator[Advice]:
    rates, rate = record.rates, f.learning_rate
    if rates is None or rate is None or not record.steps_done:
        return
    done, end = record.steps_done, record.total_steps
    numbers = (
        f"{rate:.3g} after step {done:,}; peak {rates.peak:.3g}, lowest {rates.minimum:.3g} at {rates.total_steps:,}"
    )
    if done < rates.warmup_steps:
        yield Advice(
            "note", "learning rate", "The run is still warming up.", f"{numbers}; warm-up {rates.warmup_steps:,}"
        )
    elif rates.schedule == "constant":
        text = "The learning rate never comes down: a decay at the end would lower the loss further."
        yield Advice("note", "learning rate", text, f"{rate:.3g} throughout")
    elif end is not None and rates.total_steps > 1.05 * end:
        text = "The schedule is longer than the run: the learning rate will not have come down at its end."
        remedy = f"set the decay to end with the run, at {end:,} steps (nanoGPT: lr_decay_iters={end})"
        yield Advice("warning", "learning rate", text, f"{numbers}; the run has {end:,} steps", remedy)
    elif done >= rates.total_steps or rate <= rates.minimum * 1.05:
        text = (
            "The learning rate has come down. Going on at the lowest rate gains little; a longer run needs a new decay."
        )
        yield Advice("ok", "learning rate", text, numbers)
    elif rate > STILL_HIGH * rates.peak:
        text = "The learning rate is still high: part of the fall comes only with its decay."
        yield Advice("note", "learning rate", text, numbers, f"let the run go on to step {rates.total_steps:,}")
    else:
        yield Advice("note", "learning rate", "The learning rate is coming down.", numbers)


def _length(record: Record, f: Figures) -> Iterator[Advice]:
    if f.total_steps is None or f.steps_done >= f.total_steps or not f.steps_done:
        return
    numbers = f"{f.steps_done:,} of {f.total_steps:,} steps, {f.steps_done / f.total_steps:.0%}"
    ours = command("vramplan", "train", "--resume", record.title) if record.program == "vramplan" else ""
    yield Advice("note", "length", "The run is not at its end.", numbers, ours)


def _speed(record: Record, f: Figures) -> Iterator[Advice]:
    if f.tokens_per_second is None:
        return
    numbers = f"{f.tokens_per_second:,.0f} tokens/s" + (f", MFU {f.mfu:.0%} of a {f.gpu}" if f.mfu is not None else "")
    if f.mfu is not None and f.mfu > 1.1:
        text = "More than this card can do: it is another card, or the configuration is not this run's."
        yield Advice("warning", "speed", text, numbers, "check --gpu and --config")
        return
    expected = f.expected_tokens_per_second
    if expected is None:
        if f.mfu is not None:
            yield (
                Advice("ok", "speed", "The card was busy.", numbers)
                if f.mfu > 0.3
                else Advice("note", "speed", "The card was not busy.", numbers)
            )
        return
    numbers += f"; {expected:,.0f} tokens/s expected, {f.tokens_per_second / expected:.0%} of it reached"
    if f.tokens_per_second < SLOWER_THAN_EXPECTED * expected:
        remedy = "vramplan doctor on that machine; vramplan tune measures faster settings of the same step"
        yield Advice("warning", "speed", "The run is slower than this card should be.", numbers, remedy)
    else:
        yield Advice("ok", "speed", "The card was busy: speed is what is expected of it.", numbers)


def _drops(record: Record, f: Figures) -> Iterator[Advice]:
    if not f.drops:
        return
    deep = min(f.drops, key=lambda drop: drop.times)
    stretch = f"steps {deep.first_step:,} to {deep.last_step:,} at {deep.times:.0%} of the usual"
    numbers = f"{len(f.drops)} stretch{'es' * (len(f.drops) > 1)}; the deepest, {stretch}"
    still = any(drop.last for drop in f.drops)
    text = "Throughput is down, and was until the end." if still else "Throughput was down for a while."
    remedy = "look at the card's temperature and power limit, other programs on it, and the data's disk"
    yield Advice("warning" if still else "note", "throughput", text, numbers, remedy)


def _memory(record: Record, f: Figures) -> Iterator[Advice]:
    for happening in record.happenings:
        if happening.kind == "guard":
            yield Advice(
                "warning", "guard", f"The guard had to step in at step {happening.step:,}.", happening.words,
                "free the card, or plan with less: vramplan plan --gpu auto",
            )  # fmt: skip
    if record.alloc_retries:
        yield Advice(
            "warning", "memory", "The allocator ran short and had to give memory back.",
            f"{record.alloc_retries:,} retries", "PYTORCH_ALLOC_CONF=expandable_segments:True, or a smaller batch",
        )  # fmt: skip
    peak, planned = record.peak_allocated_bytes, record.planned.peak_allocated_bytes
    if peak is not None and planned is not None:
        numbers = f"{gib(peak)} allocated, {gib(planned)} planned: {peak / planned - 1:+.1%}"
        if peak > PEAK_ABOVE_PLAN * planned:
            remedy = "vramplan probe measures this configuration beside the estimate"
            yield Advice("warning", "memory", "The peak is above the plan's.", numbers, remedy)
        else:
            yield Advice("ok", "memory", "The peak is what was planned.", numbers)


def _next(
    record: Record, f: Figures, found: Forecast | None, steps: tuple[int, ...], told: list[Advice]
) -> Iterator[Advice]:
    """What to do with the run as it is."""
    if worst(told) == "problem":
        problem = next(piece for piece in told if piece.verdict == "problem")
        yield Advice("note", "next", f"First of all: {problem.topic}.", "", problem.remedy)
        return
    curve = found.curve(steps) if found else []
    if curve and f.validation_loss is not None:
        step, middle, low, high = curve[-1]
        text = f"Training on, the {found.what if found else ''} would be about {middle:.2f} at step {step:,}."
        numbers = f"{low:.2f} to {high:.2f}; {f.validation_loss:.2f} now"
        remedy = ""
        if (
            record.rates is not None
            and record.rates.schedule == "cosine"
            and record.steps_done >= record.rates.total_steps
        ):
            remedy = "the schedule is over: more steps are a new run, or a second decay"
        yield Advice("note", "next", text, numbers, remedy)
    if record.program == "vramplan" and record.steps_done:
        yield Advice("note", "next", "Look at what it writes.", "", command("vramplan", "sample", record.title))
