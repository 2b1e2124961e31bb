"""What of a tensor table torch's dispatcher sees: not what kernels and cuBLAS take for themselves."""

from __future__ import annotations

import numpy as np

from vramplan.planner.tape import Unrolled


def seen_by_the_dispatcher(table: Unrolled) -> tuple[int, str, dict[str, int]]:
    """The peak in bytes, its phase, and the peaks of all phases."""
    seen = np.array(["(kernel)" not in row.name and row.category != "workspace" for row in table.rows])[table.row]
    live = np.cumsum(np.where(table.alloc, table.sizes, -table.sizes) * seen)
    phases = {phase: int(live[table.within(phase)].max(initial=0)) for phase in table.phases}
    return int(live.max()), table.phases[int(table.phase[int(np.argmax(live))])], phases
