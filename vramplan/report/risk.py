"""The OOM-risk report's data: what a plan or run needs, when, how surely it fits, and what each change would do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..planner.card_memory import Held, Part, card_memory
from ..planner.evidence import Residual
from ..planner.gpu import Gpu
from ..planner.levers import Lever, largest_batch, levers, rough_levers
from ..planner.memory import Estimate, TensorBytes, estimate
from ..planner.repair import Repair, smallest_repair
from ..planner.risk import OomRisk, mode_of, needed_for, risk_of
from ..planner.shape import Shape
from ..planner.speed import matmul_dtype, mfu, tokens_per_second
from ..planner.step import StepConfig
from ..planner.timeline import GROUPS, Stretch, step_timeline
from ..planner.ways import Way, ways
from ..units import gib
from .plans import between, percent

TOP_TENSORS = 10
"""Of those alive at the peak, how many are listed."""

BESIDE_A_STEP = ("first step", "evaluation", "checkpoint save", "resume", "sampling")
"""Phases that are no part of every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskReport:
    """All data of the report in one place; text, JSON and HTML are read from it.

    ``largest_batch``, ``repair`` and ``ways`` are left empty in a quick report, whose ``levers`` are rough.
    ``evidence`` are the measurements of this workload and mode on the card's architecture. ``measured`` holds what a
    run recorded (:mod:`..cli.subject`).
    """

    title: str
    shape: Shape
    step: StepConfig
    gpu: Gpu | None
    budget_bytes: int
    max_risk: float
    estimate: Estimate
    risk: OomRisk
    needs_bytes: int
    tokens_per_second: float | None
    mfu: float | None
    card: tuple[Part, ...]
    timeline: tuple[Stretch, ...]
    evidence: tuple[Residual, ...]
    levers: tuple[Lever, ...]
    largest_batch: int | None
    repair: Repair | None
    ways: tuple[Way, ...]
    measured: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the risk is within the limit."""
        return self.needs_bytes <= self.budget_bytes

    @property
    def headroom_bytes(self) -> int:
        """What the budget has beyond the need; negative where it lacks something."""
        return self.budget_bytes - self.estimate.process_bytes

    @property
    def drawn_peak_bytes(self) -> int:
        """The most that the tensors of the timeline take at once."""
        return max(sum(stretch.top) for stretch in self.timeline)

    @property
    def beside_the_step(self) -> list[tuple[str, int]]:
        """What is allocated at most where it is not a usual step that runs."""
        peaks = self.estimate.every_peak
        return [(name, peaks[name]) for name in BESIDE_A_STEP if name in peaks]

    @property
    def beside_the_tensors(self) -> str:
        """What is allocated at the peak beyond the tensors of the timeline, in words; empty where nothing is."""
        tuning = self.estimate.first_step_bytes
        rest = self.estimate.peak_allocated_bytes - self.drawn_peak_bytes - tuning
        parts = [
            f"{gib(size)} {what}"
            for size, what in (
                (tuning, "for tuning kernels in the first step"),
                (rest, "in blocks not worth splitting"),
            )
            if size > 0
        ]
        return " and ".join(parts)

    @property
    def run_sentence(self) -> str:
        """What a run measured, beside what was expected of it; empty where there is no run or it measured nothing."""
        allocated, reserved = (self.measured.get(f"peak_{name}_bytes") for name in ("allocated", "reserved"))
        guard = self.measured.get("guard") or []
        words = []
        if allocated and reserved:
            error = self.estimate.peak_reserved_bytes / reserved - 1
            words.append(
                f"The run itself reserved {gib(reserved)} at the most, {gib(allocated)} of it allocated; "
                f"{gib(self.estimate.peak_reserved_bytes)} reserved was expected ({error:+.2%})."
            )
        if guard:
            last = guard[-1]
            words.append(
                f"Memory did not suffice: since step {last['step']:,} it runs as {last['batch_size']} x "
                f"{last['grad_accum']}. What follows is of the configuration that it began with."
            )
        return " ".join(words)

    @property
    def top_tensors(self) -> tuple[TensorBytes, ...]:
        """The largest tensors alive at the peak."""
        return self.estimate.alive_at_peak[:TOP_TENSORS]

    @property
    def verdict(self) -> str:
        """Will it fit, how sure is that, and on what evidence; one sentence."""
        verb = "fits" if self.fits else "does not fit"
        need = f"{gib(self.estimate.process_bytes)} expected of {gib(self.budget_bytes)}"
        odds = f"the risk of running out is {percent(self.risk.probability)}{between(self.risk)}"
        n = self.risk.measurements
        known = (
            f"by {n} measured configuration{'s' * (n > 1)}" if n else "by a stated margin: nothing measured here yet"
        )
        return f"It {verb}: {need}; {odds} (limit {percent(self.max_risk)}), {known}."

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "title": self.title,
            "verdict": self.verdict,
            "fits": self.fits,
            "gpu": self.gpu.name if self.gpu else None,
            "budget_bytes": self.budget_bytes,
            "headroom_bytes": self.headroom_bytes,
            "max_risk": self.max_risk,
            **self.risk.as_dict(),
            "needs_bytes": self.needs_bytes,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "largest_batch": self.largest_batch,
            "estimate": self.estimate.as_dict(),
            "top_tensors": [{"name": t.name, "category": t.category, "bytes": t.n_bytes} for t in self.top_tensors],
            "card": [part.as_dict() for part in self.card],
            "timeline": {
                "groups": [name for name, _ in GROUPS],
                "phases": [{"phase": s.phase, "moments": [list(m) for m in s.moments]} for s in self.timeline],
            },
            "evidence": [_residual_dict(residual) for residual in self.evidence],
            "repair": None if self.repair is None else self.repair.as_dict(),
            "levers": [_lever_dict(lever) for lever in self.levers],
            "ways": [way.as_dict() for way in self.ways],
            "measured": dict(self.measured),
            "run_sentence": self.run_sentence,
            "notes": list(self.notes),
        }


def measured_bytes(residual: Residual) -> int:
    """What a measured process needed; at least that, where it ran out."""
    return round(residual.expected_bytes * (1 + residual.error))


def _residual_dict(residual: Residual) -> dict[str, Any]:
    return {
        "expected_bytes": residual.expected_bytes, "measured_bytes": measured_bytes(residual),
        "error": residual.error, "at_least": residual.at_least,
    }  # fmt: skip


def _lever_dict(lever: Lever) -> dict[str, Any]:
    names = ("name", "process_bytes", "saved_bytes", "speed_ratio", "largest_batch", "changes_result")
    return {name: getattr(lever, name) for name in names}


def build_report(
    title: str, shape: Shape, step: StepConfig, gpu: Gpu | None, budget_bytes: int, max_risk: float,
    measured: Mapping[str, Any] | None = None, *, total_bytes: int | None = None, held: Sequence[Held] = (),
    quick: bool = False, notes: Sequence[str] = (),
) -> RiskReport:  # fmt: skip
    """Compute everything the report shows.

    ``total_bytes`` is what there is before something is kept back (the budget unless given), ``held`` the other
    processes of the live card. A ``quick`` report has no ways and no repair, and rough levers.
    """
    full = estimate(shape, step, gpu)
    needs = math.ceil(needed_for(full, max_risk))
    rate = float(tokens_per_second(shape, step, gpu)) if gpu is not None else None
    return RiskReport(
        title=title,
        shape=shape,
        step=step,
        gpu=gpu,
        budget_bytes=budget_bytes,
        max_risk=max_risk,
        estimate=full,
        risk=risk_of(full, budget_bytes),
        needs_bytes=needs,
        tokens_per_second=rate,
        mfu=float(mfu(shape, rate, gpu, matmul_dtype(step, gpu))) if gpu is not None and rate else None,
        card=card_memory(gpu, max(total_bytes or 0, budget_bytes), budget_bytes, full, held),
        timeline=step_timeline(full),
        evidence=gpu.evidence.of(step.workload, mode_of(step)) if gpu else (),
        levers=tuple(rough_levers(full, gpu) if quick else levers(full, gpu, budget_bytes, max_risk)),
        largest_batch=None if quick else largest_batch(shape, step, gpu, budget_bytes, max_risk),
        repair=None if quick or needs <= budget_bytes else smallest_repair(shape, step, gpu, budget_bytes, max_risk),
        ways=() if quick else ways(full, gpu, budget_bytes, max_risk),
        measured=measured or {},
        notes=tuple(notes),
    )
