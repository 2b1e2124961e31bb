"""What to make of a run's losses: the first, those that are no numbers, spikes, the course of the curves, the gap."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from ..trainer.watch import LEAST_COUNT, LEVEL
from .advice import Advice, Verdict
from .forecast import WINDOW, curve_noise
from .health_figures import Figures, smoothed
from .run_record import Record, finite

FIRST_LOSS_TOLERANCE = 0.10
"""How far (fraction) the first loss may be from ln(vocabulary) before the run is called broken.

Freshly drawn logits have a variance v, and the expected loss is about ln(V) + v/2. With GPT-2's initial weights (0.02)
and normalised activations v is 0.0004 h: 0.08 nats at h=384, 0.32 at h=1600, which is 3 % of ln(50304) and 8 % of the
ln(65) of a character set. What breaks a first loss moves it by more: weights of standard deviation 1 multiply it,
a division by the accumulation that is forgotten or made twice is a factor of 8 to 64, bits instead of nats 44 %, and
leaked targets or trained weights take away a third or all of it.
"""
WIDE_GAP = 0.05
"""Validation over training loss, as a fraction of it: beyond what two samples of text differ by in most corpora."""
DIVERGED = 0.10
"""A loss this far (fraction) above the lowest it had, and well above its noise, is on its way up."""

GROSS = 1.5
"""Times the first loss, which is that of an untrained model: no noise reaches that far."""


def first_loss(record: Record, f: Figures) -> Iterator[Advice]:
    """The loss before the first update against ln(vocabulary); silent for weights that were not new."""
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


def not_numbers(record: Record, f: Figures) -> Iterator[Advice]:
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


def spikes(record: Record, f: Figures) -> Iterator[Advice]:
    """How often loss or gradient norm jumped, by our trainer's rule: one in 10,000 steps is no more than a note."""
    judged = len(finite(record.losses))
    every = f"every {record.spikes_resolution:,} steps" if record.spikes_resolution > 1 else "every step"
    if not record.spikes:
        if judged and (record.program == "vramplan" or judged > LEVEL + LEAST_COUNT):
            yield Advice("ok", "spikes", "No spikes of the loss.", f"seen {every}")
        elif gross := _gross(record):
            step, loss = gross
            yield Advice(
                "warning", "spikes", "A loss is far above that of an untrained model.", f"{loss:.4g} at step {step:,}",
                "look at the data and the learning rate around that step",
            )  # fmt: skip
        elif judged:
            numbers = f"{judged} logged; the first {LEVEL + LEAST_COUNT} are not judged"
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


def _gross(record: Record) -> tuple[int, float] | None:
    """The highest loss after the first logged one, where it is GROSS times that; what needs no statistics."""
    points = finite(record.losses)
    if len(points) < 2:
        return None
    highest = max(points[1:], key=lambda point: point[1])
    return highest if highest[1] > GROSS * points[0][1] else None


def course(record: Record, f: Figures) -> Iterator[Advice]:
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


def gap(record: Record, f: Figures) -> Iterator[Advice]:
    """Validation less training loss at the last evaluation."""
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
