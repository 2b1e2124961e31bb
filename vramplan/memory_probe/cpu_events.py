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
    """Most bytes handed out at once during a call of what ``begin()`` returns, counted from before ``begin``.

    What was handed out earlier does not count, nor does its release, which may come at any time.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        watched = begin()
        with record_function(_WATCHED):
            watched()
    found: list[tuple[int, int, int, bool]] = []

    def walk(event: Any, inside: bool) -> None:
        inside = inside or event.name == _WATCHED
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.alloc_size, fields.ptr, inside))
        for child in event.children:
            walk(child, inside)

    for root in profiler.profiler.kineto_results.experimental_event_tree():
        walk(root, False)
    level, peak = 0, 0
    ours: set[int] = set()
    for _, size, address, inside in sorted(found, key=lambda event: event[0]):
        if size > 0:
            ours.add(address)
        elif address not in ours:
            continue
        else:
            ours.remove(address)
        level += size
        peak = max(peak, level) if inside else peak
    return peak
