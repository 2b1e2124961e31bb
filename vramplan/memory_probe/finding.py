"""What an examination says about one topic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Verdict = Literal["ok", "unknown", "warning", "problem"]
"""From good to bad. ``unknown``: there is nothing here to judge, or it could not be asked."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One topic: the verdict, a sentence that says why, what to do about it, and the facts it rests on (bytes, names).

    ``text`` and ``remedy`` are for a person, ``facts`` for a program.
    """

    topic: str
    verdict: Verdict
    text: str
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of several verdicts; ``ok`` when there are none."""
    order = get_args(Verdict)
    return max(verdicts, key=order.index, default="ok")
