"""What the CPU allocator itself hands out during real steps: the only witness of a compiled step without a card.

Inside a compiled graph no operation passes the dispatcher, so the tensor meter is blind; torch's profiler records every
allocation and release. Kernels' own scratch is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

_WATCHED = "vramplan: watched"


def allocator_peak(begin: Callable[[], Callable[[], object]]) -> int:
    """Most bytes handed out at once during a call of what ``begin()`` returns, counted from before ``begin``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        watched = begin()
        with record_function(_WATCHED):
            watched()
    found: list[tuple[int, int, bool]] = []

    def walk(event: Any, inside: bool) -> None:
        inside = inside or event.name == _WATCHED
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size, inside))
        for child in event.children:
            walk(child, inside)

    for root in profiler.profiler.kineto_results.experimental_event_tree():
        walk(root, False)
    level, peak = 0, 0
    for _, size, inside in sorted(found, key=lambda event: event[0]):
        level += size
        peak = max(peak, level) if inside else peak
    return peak
