"""One judgement about a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Verdict = Literal["ok", "note", "warning", "problem"]
"""From good to bad. A ``note`` is worth knowing and nothing is wrong; a ``problem`` spoils the run."""


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
