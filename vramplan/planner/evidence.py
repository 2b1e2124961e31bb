"""What was measured before, as far as the planner needs it: by how much estimates were wrong on one architecture."""

from __future__ import annotations

from dataclasses import dataclass, field

NEAR = 4.0
"""Measurements speak for estimates up to so many times the largest of them; beyond, they are passed over."""


@dataclass(frozen=True, slots=True)
class Residual:
    """One measured configuration: ``error`` is measured over expected less 1, ``expected_bytes`` what was expected.

    ``mode`` is ``eager`` or ``compiled``.
    """

    workload: str
    mode: str
    error: float
    expected_bytes: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """A residual for each configuration that was measured on one architecture."""

    residuals: tuple[Residual, ...] = ()
    _known: dict[tuple[str, str], tuple[list[float], int]] = field(default_factory=dict, compare=False, repr=False)

    def of(self, workload: str, mode: str) -> tuple[list[float], int]:
        """The errors of a workload and mode, ascending, and up to which expected bytes they speak."""
        key = workload, mode
        if key not in self._known:
            own = [r for r in self.residuals if (r.workload, r.mode) == key]
            reach = int(NEAR * max((r.expected_bytes for r in own), default=0))
            self._known[key] = sorted(r.error for r in own), reach
        return self._known[key]


NO_EVIDENCE = Evidence()
