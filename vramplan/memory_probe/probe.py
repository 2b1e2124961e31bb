"""Probe a configuration: real optimizer steps in a child process, and the estimate beside what they needed.

The parent never imports torch: it stays small, and whatever a step does to a process is done to the child.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..device import LiveGpu, host_memory, live_gpu
from ..errors import ConfigError, Problem, VramplanError
from ..planner.allocator_settings import AllocatorSettings
from ..planner.gpu import Gpu, find_gpu
from ..planner.memory import estimate
from ..planner.shape import Shape
from ..planner.speed import tokens_per_second
from ..planner.step import StepConfig, check
from ..runconfig import ModelSection, StepSection
from ..units import MIB
from .child import ChildEnd, Limits, python_child, run_child
from .machine import is_wsl
from .measurement import Measurement
from .outcome import Ending, ending, spilled

WORKER = "vramplan.memory_probe.worker"
FEWEST_STEPS = 3
"""The first makes optimizer states (and compiles), the second is the first that finds them, the third is timed."""

EAGER_SECONDS, COMPILED_SECONDS = 600.0, 1800.0
"""How long a probe may take unless it is told."""

HOST_RESERVE = 512 * MIB
"""Host memory that a child must leave to the rest of the machine."""

FIGURES = (
    "method", "device", "architecture", "torch", "total_bytes", "allocated_bytes", "reserved_bytes", "process_bytes",
    "context_bytes", "retries", "phase_peaks", "step_seconds", "tokens_per_second", "first_step_seconds",
    "first_step_peak_bytes", "loss", "reference_ratio",
)  # fmt: skip
"""What a child may report."""

INTERRUPTED = "stopped by Ctrl-C"

Doing = Callable[[str], None]


def probe(
    shape: Shape,
    step: StepConfig,
    *,
    steps: int = 5,
    cap_bytes: int | None = None,
    everything: bool = False,
    seconds: float | None = None,
    host_bytes: int | None = None,
    alloc_conf: str = "",
    timed_seconds: float = 0.0,
    doing: Doing = lambda what: None,
    argv: Sequence[str] | None = None,
) -> Measurement:
    """Run ``steps`` real optimizer steps of this configuration in a child; every end is a measurement.

    ``cap_bytes`` makes the card behave like a smaller one, on a CPU it limits the child's memory. ``everything`` also
    measures evaluation, saving and resuming. ``seconds`` and ``host_bytes`` (resident) limit the child; by default ten
    minutes, half an hour when it compiles, and what host memory is free. ``alloc_conf`` is PYTORCH_ALLOC_CONF.
    ``timed_seconds``: go on until so much has been timed. ``argv`` is another worker, for tests.

    Raises ConfigError for what no child could run.
    """
    _check(shape, step, steps)
    settings = AllocatorSettings.parse(alloc_conf)
    live = live_gpu() if step.device == "cuda" else None
    host = _host_limit(host_bytes)
    request = {
        "shape": asdict(shape), "step": asdict(step), "steps": steps, "cap_bytes": cap_bytes, "everything": everything,
        "timed_seconds": timed_seconds,
        "host_bytes": cap_bytes if step.device == "cpu" else None,
    }  # fmt: skip
    limits = Limits(seconds or (COMPILED_SECONDS if step.compile else EAGER_SECONDS), host)
    try:
        end = run_child(
            argv or python_child(WORKER), request, limits, env=_environment(alloc_conf),
            on_report=lambda report: doing(str(report.get("doing"))) if report.get("kind") == "doing" else None,
        )  # fmt: skip
        how = ending(end)
        how = replace(how, reason=_shown(how.reason))
    except KeyboardInterrupt:
        end, how = None, Ending("killed", INTERRUPTED)
    figures = _figures(end)
    common = identity(shape, step, live, settings, alloc_conf) | {
        "limit_bytes": _limit(live, cap_bytes), "cap_bytes": cap_bytes, "wall_seconds": end.seconds if end else 0.0,
    }  # fmt: skip
    total = figures.pop("total_bytes", None) if isinstance(figures.get("total_bytes"), int) else None
    figures.pop("total_bytes", None)
    try:
        found = Measurement.model_validate(common | figures | {"outcome": how.outcome, "reason": how.reason})
    except ValueError:  # a child that was not our worker, or one gone mad: its figures are worth nothing
        how = Ending("not_memory", "it reported figures that make no sense")
        found = Measurement.model_validate(common | {"outcome": how.outcome, "reason": how.reason})
    if found.outcome == "fits" and (why := _spilled(found, total)):
        found = found.model_copy(update={"outcome": "spilled", "reason": why})
    return found


def identity(
    shape: Shape, step: StepConfig, live: LiveGpu | None, settings: AllocatorSettings, alloc_conf: str = ""
) -> dict[str, Any]:
    """What a :class:`Measurement` says besides how it ended and what it needed: what was run, where, and what was
    expected of it.
    """
    card = card_of(live)
    full = estimate(shape, step, card, settings)
    return {
        "id": uuid.uuid4().hex, "when": datetime.now(UTC).isoformat(timespec="seconds"), "version": __version__,
        "model": _section(ModelSection, shape), "step": _section(StepSection, step),
        "driver": live.driver if live else None, "alloc_conf": alloc_conf,
        "device": live.name if live else "", "architecture": architecture_of(live, step),
        "expected_allocated_bytes": full.peak_allocated_bytes, "expected_reserved_bytes": full.peak_reserved_bytes,
        "expected_process_bytes": full.process_bytes,
        "expected_tokens_per_second": float(tokens_per_second(shape, step, card)) if card is not None else None,
    }  # fmt: skip


def card_of(live: LiveGpu | None) -> Gpu | None:
    """The catalogue entry of the card at hand, or None."""
    if live is None:
        return None
    try:
        return find_gpu(live.name, total_bytes=live.total_bytes)
    except ConfigError:
        return None


def architecture_of(live: LiveGpu | None, step: StepConfig) -> str:
    """Under which name evidence of this device is kept."""
    if step.device == "cpu":
        return "cpu"
    return ".".join(map(str, live.capability)) if live is not None and live.capability else "unknown"


def spills_silently(platform: str | None = None, proc: Path = Path("/proc")) -> bool:
    """Whether this system moves what does not fit a card to host memory without an exception: Windows, and WSL2."""
    return (platform or sys.platform) == "win32" or is_wsl(proc)


def _check(shape: Shape, step: StepConfig, steps: int) -> None:
    problems = check(shape, step)
    if steps < FEWEST_STEPS:
        problems.append(Problem("steps", steps, f"must be at least {FEWEST_STEPS}: the first two are not timed"))
    if step.device == "cpu" and step.workload != "vramplan":
        rule = "is another script's memory: on a CPU our trainer's is measured"
        problems.append(Problem("workload", step.workload, rule, "use workload=vramplan"))
    if problems:
        raise ConfigError(problems)


def _host_limit(given: int | None) -> int | None:
    try:
        free = max(0, host_memory().available_bytes - HOST_RESERVE)
    except VramplanError:
        return given
    return free if given is None else min(given, free)


def _limit(live: LiveGpu | None, cap_bytes: int | None) -> int | None:
    """What a process on the card may take: the cap, or what is free."""
    known = [n for n in (cap_bytes, live.free_bytes if live else None) if n is not None]
    return min(known, default=None) if live is not None else None


def _environment(alloc_conf: str) -> dict[str, str]:
    """The child's: ours, with the allocator's settings under both of the names that torch has used."""
    found = dict(os.environ)
    if alloc_conf:
        found |= {"PYTORCH_ALLOC_CONF": alloc_conf, "PYTORCH_CUDA_ALLOC_CONF": alloc_conf}
    return found


def _figures(end: ChildEnd | None) -> dict[str, Any]:
    """What the child measured, also in part, if it says so: figures only, nothing that its parent knows better."""
    if end is None:
        return {}
    told = [r for r in end.reports if r.get("kind") in ("measured", "partly")][-1:]
    values = {name: _shown(r[name]) for r in told for name in FIGURES if name in r}
    if isinstance(values.get("step_seconds"), list):
        values["step_seconds"] = tuple(values["step_seconds"])
    return values


def _shown(value: Any) -> Any:
    """Text as it can be stored: halves of characters, from paths that are no UTF-8, are replaced."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _section(kind: Any, value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in kind.model_fields}


def _spilled(found: Measurement, total: int | None) -> str:
    return spilled(
        spills=spills_silently(),
        process_bytes=found.process_bytes,
        total_bytes=total,
        tokens_per_second=found.tokens_per_second,
        expected_tokens_per_second=found.expected_tokens_per_second,
    )
