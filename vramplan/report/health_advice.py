"""What to make of a run's figures: a verdict on each topic, the numbers behind it, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Literal, get_args

from ..planner.plan import FAR_FROM_TARGET
from ..trainer.watch import LEAST_COUNT, LEVEL
from ..units import count, gib
from .forecast import WINDOW, Forecast, curve_noise
from .health_figures import Figures, smoothed
from .run_record import Record, finite

Verdict = Literal["ok", "note", "warning", "problem"]
"""From good to bad. A ``note`` is worth knowing and nothing is wrong; a ``problem`` spoils the run."""

FIRST_LOSS_TOLERANCE = 0.10
"""How far (fraction) the first loss may be from ln(vocabulary) before the run is called broken.

Freshly drawn logits have a variance v, and the expected loss is about ln(V) + v/2. With GPT-2's initial weights (0.02)
and normalised activations v is 0.0004 h: 0.08 nats at h=384, 0.32 at h=1600, which is 3 % of ln(50304) and 8 % of the
ln(65) of a character set. What breaks a first loss moves it by more: weights of standard deviation 1 multiply it,
a division by the accumulation that is forgotten or made twice is a factor of 8 to 64, bits instead of nats 44 %, and
leaked targets or trained weights take away a third or all of it.
"""
TOKENS_PER_PARAMETER = 20
"""Compute-optimal tokens per parameter (Hoffmann et al. 2022); the planner's default budget."""
EPOCHS_AS_NEW = 4
"""Up to about four epochs repeated text is worth nearly as much as new text (Muennighoff et al. 2023)."""
WIDE_GAP = 0.05
"""Validation over training loss, as a fraction of it: beyond what two samples of text differ by in most corpora."""
DIVERGED = 0.10
"""A loss this far (fraction) above the lowest it had, and well above its noise, is on its way up."""
SLOWER_THAN_EXPECTED = 0.7
"""Of the expected throughput: the planner's own error is far smaller (README)."""
PEAK_ABOVE_PLAN = 1.05
STILL_HIGH = 0.5
"""A last learning rate above this fraction of the peak has its decay still to come."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One judgement: ``text`` is the sentence, ``evidence`` the numbers, ``remedy`` what to do ("" if nothing)."""

    verdict: Verdict
    topic: str
    text: str
    evidence: str = ""
    remedy: str = ""


def worst(advice: Iterable[Advice]) -> Verdict:
    """The worst verdict; ``ok`` when there is none."""
    order = get_args(Verdict)
    return max((piece.verdict for piece in advice), key=order.index, default="ok")


def advise(record: Record, f: Figures, found: Forecast | None, steps: tuple[int, ...]) -> tuple[Advice, ...]:
    """Every judgement, in the order of a run: size, data, losses, learning rate, speed, memory, what is next."""
    parts = (_size, _budget, _data, _first_loss, _numbers, _spikes, _course, _gap, _schedule, _speed, _drops, _memory)
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
        remedy = f"vramplan plan --params {_words(asked)} finds shapes of that size"
        yield Advice(
            "warning", "size", f"{label} {count(has)} parameters, not the {_words(asked)} asked for.", numbers, remedy
        )
    else:
        yield Advice("ok", "size", f"{label} {count(has)} parameters, as asked for.", numbers)


def _words(asked: int) -> str:
    """``125M``: as people ask for it."""
    return f"{asked / 1e6:g}M" if asked >= 10**6 else f"{asked:,}"


def _budget(record: Record, f: Figures) -> Iterator[Advice]:
    per = f.tokens_per_parameter
    if per is None or f.tokens_seen is None:
        return
    numbers = f"{count(f.tokens_seen)} tokens, {per:.1f} per parameter; {TOKENS_PER_PARAMETER} are compute-optimal"
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


def _first_loss(record: Record, f: Figures) -> Iterator[Advice]:
    if f.first_loss is None or f.first_loss_expected is None or record.from_scratch is False:
        return
    off = f.first_loss / f.first_loss_expected - 1
    numbers = f"{f.first_loss:.3f}, ln({f.vocab_size:,}) = {f.first_loss_expected:.3f}: {off:+.1%}"
    if abs(off) <= FIRST_LOSS_TOLERANCE:
        yield Advice("ok", "first loss", "The first loss is that of an untrained model.", numbers)
        return
    verdict: Verdict = "problem" if record.from_scratch else "warning"
    cause = (
        "targets that the model can see, weights that are not new, or a loss that is scaled"
        if off < 0
        else "the initial weights' size, the loss's unit, or another vocabulary"
    )
    text = "The first loss is not that of an untrained model with this vocabulary."
    yield Advice(verdict, "first loss", text, numbers, f"look at {cause}")


def _numbers(record: Record, f: Figures) -> Iterator[Advice]:
    """Losses that are no numbers, and runs that ended themselves."""
    for happening in record.happenings:
        if happening.kind == "stopped":
            yield Advice(
                "problem", "end", f"The run stopped itself after step {happening.step:,}.", happening.words,
                "start again from an earlier checkpoint or with a lower learning rate",
            )  # fmt: skip
    for name, curve in (("training", record.losses or record.train_evaluations), ("validation", record.validation)):
        broken = [step for step, loss in curve if loss is None]
        if not broken:
            continue
        numbers = f"{len(broken):,} of {len(curve):,} logged, the first at step {broken[0]:,}"
        if curve[-1][1] is None:
            text = f"The {name} loss is no number any more: nothing is learned since."
            yield Advice("problem", "losses", text, numbers, "go back to a checkpoint from before; lower the rate")
        else:
            text = f"The {name} loss was no number for a while."
            yield Advice("warning", "losses", text, numbers, "with float16 look at the loss scale; else try bfloat16")


def _spikes(record: Record, f: Figures) -> Iterator[Advice]:
    judged = len(finite(record.losses))
    every = f"every {record.spikes_resolution:,} steps" if record.spikes_resolution > 1 else "every step"
    if not record.spikes:
        if record.program == "vramplan" or judged > LEVEL + LEAST_COUNT:
            yield Advice("ok", "spikes", "No spikes of the loss.", f"seen {every}")
        elif judged:
            numbers = f"{judged} logged losses; the first {LEVEL + LEAST_COUNT} are not judged"
            yield Advice("note", "spikes", "Too few losses were logged to tell spikes from noise.", numbers)
        return
    high = max(record.spikes, key=lambda spike: spike.value / spike.usual)
    numbers = (
        f"{len(record.spikes)}, seen {every}; the highest at step {high.step:,}: {high.what.replace('_', ' ')} "
        f"{high.value:.3g} where {high.usual:.3g} was usual"
    )
    few = len(record.spikes) <= 1 + record.steps_done // 10_000
    verdict: Verdict = "note" if few else "warning"
    remedy = "" if few else "a lower learning rate, a longer warm-up, or grad_clip 1.0"
    yield Advice(verdict, "spikes", "The loss or the gradient norm jumped.", numbers, remedy)


def _course(record: Record, f: Figures) -> Iterator[Advice]:
    """Whether losses fall, stand or rise."""
    train = record.train_evaluations if len(finite(record.train_evaluations)) > 3 else tuple(smoothed(record.losses))
    late = max(record.rates.warmup_steps if record.rates else 0, WINDOW * record.steps_done)
    for name, points in (("training", finite(train)), ("validation", finite(record.validation))):
        points = [point for point in points if point[0] >= late]
        if len(points) < 4:
            continue
        noise = curve_noise(points)
        lowest = min(points[:-1], key=lambda point: point[1])
        last = min(loss for _, loss in points[-2:])
        if (
            last > (1 + DIVERGED) * lowest[1]
            and last > lowest[1] + 5 * noise
            and (name == "training" or not _falls(train))
        ):
            yield Advice(
                "problem", "course", f"The {name} loss has risen far above its lowest value.",
                f"{last:.3f} at the end, {lowest[1]:.3f} at step {lowest[0]:,}",
                "go back to a checkpoint from before it rose; lower the learning rate",
            )  # fmt: skip
        elif name == "validation" and last > lowest[1] + 3 * noise and _falls(train):
            yield Advice(
                "warning", "course", "The validation loss rises while the training loss falls: the run overfits.",
                f"{last:.3f} at the end, {lowest[1]:.3f} at step {lowest[0]:,}",
                f"stop at step {lowest[0]:,}, add data, or add dropout",
            )  # fmt: skip
        elif name == "validation":
            yield _plateau(points, noise)


def _plateau(points: list[tuple[int, float]], noise: float) -> Advice:
    """The last third of the evaluations against the third before."""
    third = max(2, len(points) // 3)
    before, after = points[-2 * third : -third], points[-third:]
    fell = median(loss for _, loss in before) - median(loss for _, loss in after)
    numbers = f"by {fell:.3f} from the evaluations around step {before[len(before) // 2][0]:,} to the last {third}"
    if fell > 2 * noise / math.sqrt(third):
        return Advice("ok", "course", "The validation loss still falls.", f"{numbers}; noise {noise:.3f}")
    return Advice("note", "course", "The validation loss stands.", f"{numbers}; noise {noise:.3f}")


def _falls(curve: tuple[tuple[int, float | None], ...]) -> bool:
    points = finite(curve)
    half = len(points) // 2
    return half > 1 and median(y for _, y in points[half:]) < median(y for _, y in points[:half])


def _gap(record: Record, f: Figures) -> Iterator[Advice]:
    if f.gap is None or f.validation_loss is None:
        return
    numbers = f"validation {f.validation_loss:.4f}, training {f.train_loss:.4f}: {f.gap:+.4f}"
    if f.gap > WIDE_GAP * f.validation_loss:
        text = "Validation is well above training: the run overfits, or the two texts differ in kind."
        yield Advice(
            "warning", "gap", text, numbers, "compare both at an early step: a gap from the start is the text's"
        )
    else:
        yield Advice("ok", "gap", "Training and validation agree.", numbers)


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
            f"{record.alloc_retries:,} retries", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or a smaller batch",
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
        yield Advice("note", "next", "Look at what it writes.", "", f"vramplan sample {record.title}")
