"""The numbers of a run's health: what a record says, set against the card, the size asked for, and the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from ..errors import ConfigError
from ..planner.gpu import Gpu
from ..planner.speed import matmul_dtype, tokens_per_second
from .run_log import A100_FLOPS
from .run_record import Curve, Record, finite

SLOW = 0.85
"""A stretch below this fraction of the run's own usual throughput is a drop."""
STRETCH = 5
"""Logged intervals that a drop must last: a single slow one is an evaluation or somebody opening a browser."""
USUAL = 0.75
"""Quantile of the throughput that is called usual: also a run that was slowed for more than half has its own pace."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Throughput below the usual from one step to another, at its median ``times`` the usual; ``last``: to the end."""

    first_step: int
    last_step: int
    times: float
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Every number, None where it is not known. Losses in nats per token, rates of all processes together.

    ``mfu`` is by the median step time; ``mfu_printed_here`` the log's own MFU with this card's peak in place of an
    A100's. ``mfu_unknown`` says why there is none. ``expected_tokens_per_second`` is the plan's, or the planner's for
    this card. ``gap`` is validation less training loss at the last evaluation, ``train_loss`` what it was taken from.
    """

    parameters: int | None
    parameters_without_positions: int | None
    asked_parameters: int | None
    steps_done: int
    total_steps: int | None
    tokens_per_step: int | None
    tokens_seen: int | None
    tokens_per_parameter: float | None
    unique_tokens: int | None
    epochs: float | None
    vocab_size: int | None
    first_loss: float | None
    first_loss_expected: float | None
    train_loss: float | None
    validation_loss: float | None
    best_validation_loss: float | None
    best_validation_step: int | None
    gap: float | None
    step_seconds: float | None
    tokens_per_second: float | None
    expected_tokens_per_second: float | None
    processes: int
    gpu: str | None
    peak_flops: float | None
    mfu: float | None
    mfu_printed: float | None
    mfu_printed_here: float | None
    mfu_unknown: str
    learning_rate: float | None
    drops: tuple[Drop, ...]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        found = {name: getattr(self, name) for name in self.__slots__ if name != "drops"}
        return found | {"drops": [{name: getattr(drop, name) for name in drop.__slots__} for drop in self.drops]}


def figures_of(record: Record, gpu: Gpu | None, asked: int | None, unique_tokens: int | None) -> Figures:
    """Work everything out. ``asked`` and ``unique_tokens`` are the user's words and win over the record's."""
    seconds = median(s for _, s in record.step_seconds) if record.step_seconds else None
    rate = record.tokens_per_step / seconds if record.tokens_per_step and seconds else None
    processes = record.processes or 1
    peak, unknown = _peak(record, gpu)
    flops, seen = record.flops_per_token, record.tokens_seen
    unique = unique_tokens or record.unique_tokens
    validation = finite(record.validation)
    train = _train_loss(record)
    best = min(validation, key=lambda point: point[1], default=None)
    counted = record.parameters or record.parameters_without_positions
    if not unknown and (flops is None or rate is None):
        unknown = "the model's shape is not known" if flops is None else "no step times were logged"
    return Figures(
        parameters=record.parameters,
        parameters_without_positions=record.parameters_without_positions,
        asked_parameters=asked or record.planned.parameters,
        steps_done=record.steps_done,
        total_steps=record.total_steps,
        tokens_per_step=record.tokens_per_step,
        tokens_seen=seen,
        tokens_per_parameter=seen / counted if seen is not None and counted else None,
        unique_tokens=unique,
        epochs=seen / unique if seen is not None and unique else None,
        vocab_size=record.vocab_size,
        first_loss=record.first_loss,
        first_loss_expected=math.log(record.vocab_size) if record.vocab_size else None,
        train_loss=train,
        validation_loss=validation[-1][1] if validation else None,
        best_validation_loss=best[1] if best else None,
        best_validation_step=best[0] if best else None,
        gap=validation[-1][1] - train if validation and train is not None else None,
        step_seconds=seconds,
        tokens_per_second=rate,
        expected_tokens_per_second=_expected(record, gpu, processes),
        processes=processes,
        gpu=gpu.name if gpu else None,
        peak_flops=peak,
        mfu=flops * rate / processes / peak if flops and rate and peak else None,
        mfu_printed=record.printed_mfu,
        mfu_printed_here=record.printed_mfu * A100_FLOPS / peak if record.printed_mfu and peak else None,
        mfu_unknown=unknown,
        learning_rate=record.rates.at(max(0, record.steps_done - 1)) if record.rates else None,
        drops=drops(throughput(record)),
    )


def as_asked(asked: int) -> str:
    """``125M``: as people ask for it."""
    return f"{asked / 1e6:g}M" if asked >= 10**6 else f"{asked:,}"


def throughput(record: Record) -> tuple[tuple[int, float], ...]:
    """(step, tokens per second), without evaluations where the record can tell them apart."""
    if record.tokens_per_step is None:
        return ()
    return tuple((step, record.tokens_per_step / seconds) for step, seconds in record.step_seconds)


def _peak(record: Record, gpu: Gpu | None) -> tuple[float | None, str]:
    """The card's peak FLOP/s in what the products run in, or why it is not known."""
    if record.step is not None and record.step.device == "cpu":
        return None, "the run is on a CPU"
    if gpu is None:
        return None, "the card is not known: name it with --gpu"
    if record.step is None:
        return None, "the dtype is not known"
    try:
        return gpu.peak_flops(matmul_dtype(record.step, gpu)), ""
    except ConfigError as error:
        return None, str(error)


def _expected(record: Record, gpu: Gpu | None, processes: int) -> float | None:
    """Tokens per second that the planner expects of this card, or did when it planned the run."""
    if record.planned.tokens_per_second is not None and (gpu is None or gpu.name == record.planned.gpu):
        return record.planned.tokens_per_second
    if gpu is None or record.shape is None or record.step is None or record.step.device == "cpu":
        return None
    try:
        return float(tokens_per_second(record.shape, record.step, gpu)) * processes
    except ConfigError:
        return None


def _train_loss(record: Record) -> float | None:
    """The training loss beside the last evaluation: evaluated too, or the mean of the steps since the one before.

    At most the last tenth of the run, over which the loss itself falls little.
    """
    evaluated = finite(record.train_evaluations)
    if evaluated:
        return evaluated[-1][1]
    steps = [step for step, loss in record.validation if loss is not None]
    end = steps[-1] if steps else record.steps_done
    start = max(steps[-2] if len(steps) > 1 else 0, 0.9 * end)
    near = [loss for step, loss in finite(record.losses) if start < step <= end]
    return mean(near) if near else None


def drops(rates: Sequence[tuple[int, float]]) -> tuple[Drop, ...]:
    """Stretches of at least STRETCH logged rates below SLOW times the usual one."""
    if len(rates) < 3 * STRETCH:
        return ()
    usual = sorted(rate for _, rate in rates)[int(USUAL * (len(rates) - 1))]
    found: list[Drop] = []
    slow: list[tuple[int, float]] = []
    for position, (step, rate) in enumerate([*rates, (-1, math.inf)]):
        if rate < SLOW * usual:
            slow.append((step, rate))
            continue
        if len(slow) >= STRETCH:
            times = median(rate for _, rate in slow) / usual
            found.append(Drop(slow[0][0], slow[-1][0], times, position == len(rates)))
        slow = []
    return tuple(found)


def smoothed(curve: Curve, groups: int = 40) -> list[tuple[int, float]]:
    """Means of about equally many neighbouring values, at their last step."""
    points = finite(curve)
    size = max(1, -(-len(points) // groups))
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [(part[-1][0], mean(loss for _, loss in part)) for part in parts]
