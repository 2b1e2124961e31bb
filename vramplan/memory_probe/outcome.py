"""How a probed step ended, from everything its process left behind."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..planner.failures import failure_of, last_failure
from ..units import gib
from .child import ChildEnd
from .measurement import Outcome

COLLAPSE = 0.25
"""Below this share of the predicted tokens/s, with a full card, memory is being swapped out over the bus: a card that
spilled ran at a hundredth, one that is merely slower than predicted at more than half."""
FULL = 0.97
"""Share of a card's memory from which on it counts as full."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The outcome and why it is that one, in a sentence."""

    outcome: Outcome
    reason: str


def ending(end: ChildEnd) -> Ending:
    """Classify the end of a probe's child; ``fits`` means that it delivered its figures."""
    if end.stopped_by == "timeout":
        return Ending("timed_out", f"no end within {end.seconds:.0f} s{_while(end)}")
    if end.stopped_by == "host memory":
        return Ending("out_of_memory", f"host memory: it held {gib(end.resident_bytes)}, more than it was allowed")
    failed = next((r for r in end.reports if r.get("kind") == "failed"), None)
    if failed is not None:
        return _raised(str(failed.get("text", "")), _words(failed.get("types")), end)
    if end.returncode == 0 and any(r.get("kind") == "measured" for r in end.reports):
        return Ending("fits", "ran to its end")
    return _died(end)


def _raised(text: str, kinds: Sequence[str], end: ChildEnd) -> Ending:
    if "KeyboardInterrupt" in kinds:
        return Ending("killed", f"stopped from outside (SIGINT){_while(end)}")
    failure = failure_of(text, kinds)
    return Ending(failure.kind, failure.reason)


def _died(end: ChildEnd) -> Ending:
    """It left no result and no exception: a signal, a crash of the interpreter, or an exit without a word."""
    name = _signal_name(-end.returncode) if end.returncode < 0 else ""
    if name == "SIGKILL" and end.oom_killed:
        return Ending("out_of_memory", f"the kernel killed it for want of host memory{_while(end)}")
    if name in ("SIGKILL", "SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        return Ending("killed", f"killed from outside ({name}){_while(end)}")
    said = last_failure(end.output)
    if said is not None and said.kind == "out_of_memory" and name in ("", "SIGABRT"):
        return Ending("out_of_memory", said.reason)
    if name:
        return Ending("not_memory", f"it crashed ({name}){_while(end)}")
    lines = [line.strip() for line in end.output.splitlines() if line.strip()]
    words = f": {said.reason if said else lines[-1]}" if lines else ""
    return Ending("not_memory", f"it ended with code {end.returncode} and no result{words}")


def _while(end: ChildEnd) -> str:
    doing = [str(r.get("doing")) for r in end.reports if r.get("kind") == "doing"][-1:]
    return f" while {doing[0]}" if doing else " before it had begun"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _words(value: Any) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list) else []


def spilled(
    *,
    spills: bool,
    process_bytes: int | None,
    total_bytes: int | None,
    tokens_per_second: float | None,
    expected_tokens_per_second: float | None,
) -> str:
    """Why a step that raised nothing did not fit, or an empty string.

    ``spills``: under Windows (WDDM) and WSL2 the driver moves what does not fit to host memory without a word.
    """
    if not spills or process_bytes is None or total_bytes is None:
        return ""
    if process_bytes > total_bytes:
        return f"it took {gib(process_bytes)} of a card with {gib(total_bytes)}: the rest went to host memory"
    slow = (
        tokens_per_second is not None
        and expected_tokens_per_second is not None
        and tokens_per_second < COLLAPSE * expected_tokens_per_second
    )
    if slow and process_bytes >= FULL * total_bytes:
        share = (tokens_per_second or 0) / (expected_tokens_per_second or 1)
        return f"the card is full and it ran at {share:.0%} of the predicted speed: memory is being swapped"
    return ""
