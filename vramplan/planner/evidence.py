"""What was measured before, as far as the planner needs it: by how much estimates were wrong on one architecture, and
what releases of torch were traced to keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .partitions import Traced  # which needs numpy, and the catalogue of cards does not

NEAR = 4.0
"""A measurement speaks for estimates up to so many times its own; for larger ones it is passed over."""


@dataclass(frozen=True, slots=True)
class Residual:
    """One measured configuration: ``error`` is measured over expected less 1, ``expected_bytes`` what was expected.

    ``mode`` is ``eager`` or ``compiled``. ``at_least``: it ran out of memory that should have sufficed, so that its
    error is this or more.
    """

    workload: str
    mode: str
    error: float
    expected_bytes: int
    at_least: bool = False


@dataclass(frozen=True, slots=True)
class Evidence:
    """A residual for each configuration that was measured on one architecture, and what was traced on this machine."""

    residuals: tuple[Residual, ...] = ()
    traced: Traced = field(default_factory=dict, compare=False, repr=False)
    _known: dict[tuple[str, str], tuple[Residual, ...]] = field(default_factory=dict, compare=False, repr=False)

    def of(self, workload: str, mode: str) -> tuple[Residual, ...]:
        """Those of a workload and mode, by the largest estimate that they speak for, ascending."""
        key = workload, mode
        if key not in self._known:
            own = [r for r in self.residuals if (r.workload, r.mode) == key]
            self._known[key] = tuple(sorted(own, key=lambda r: r.expected_bytes))
        return self._known[key]


NO_EVIDENCE: Evidence = Evidence()
