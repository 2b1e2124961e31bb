"""What a real allocator did, event by event, beside what the replay does with the same requests.

The events are those of ``torch.cuda.memory._snapshot()["device_traces"]``, as (action, bytes, address). Requests and
releases are given to :class:`~vramplan.planner.allocator.CachingAllocator`; segments are what it is compared by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .allocator import Block, CachingAllocator
from .allocator_settings import AllocatorSettings

TraceEvent = tuple[str, int, int]
"""Action, bytes, address."""

UNKNOWN = ("segment_map", "segment_unmap")
"""Of expandable segments, whose ranges are mapped and unmapped piece by piece."""


@dataclass(frozen=True, slots=True)
class TraceReplay:
    """How a recorded trace and its replay compare. Sizes in bytes.

    ``compared`` requests were looked at, each once it had been answered; ``different`` of them found another number of
    reserved bytes, the first at ``first_difference`` in the trace. ``skipped`` events speak of what was there before
    the recording began.
    """

    compared: int
    different: int
    first_difference: int | None
    skipped: int
    recorded_peak_bytes: int
    replayed_peak_bytes: int


def replay_trace(events: Sequence[TraceEvent], settings: AllocatorSettings | None = None) -> TraceReplay:
    """Replay a recorded trace from where everything in it is known.

    Reserved bytes are compared after each request: a segment is obtained before the request that needs it is answered.
    Where segments are freed the cache is emptied, as torch does when it is told to or has no memory left. Raises
    ValueError for a block that is taken twice, and for expandable segments, which are not compared.
    """
    expandable = settings is not None and settings.expandable_segments
    if expandable or any(action in UNKNOWN for action, _, _ in events):
        raise ValueError("expandable segments are not compared")
    start = 0
    while (unknown := _first_unknown(events, start)) is not None:
        start = unknown + 1
    allocator = CachingAllocator(settings)
    living: dict[int, Block] = {}
    reserved = peak = compared = different = 0
    first: int | None = None
    emptied = False
    for at in range(start, len(events)):
        action, n_bytes, address = events[at]
        if action == "segment_free" and not emptied:
            allocator.empty_cache()
        emptied = action == "segment_free"
        if action == "segment_alloc":
            reserved += n_bytes
            peak = max(peak, reserved)
        elif action == "segment_free":
            reserved -= n_bytes
        elif action == "free_completed":
            allocator.release(living.pop(address))
        elif action == "alloc":
            if address in living:
                raise ValueError(f"event {at} allocates {address:#x}, which is taken")
            living[address] = allocator.malloc(n_bytes)
            compared += 1
            if allocator.reserved_bytes != reserved:
                different += 1
                first = at if first is None else first
    return TraceReplay(compared, different, first, start, peak, allocator.peak_reserved_bytes)


def _first_unknown(events: Sequence[TraceEvent], start: int) -> int | None:
    """The first event from ``start`` on that speaks of a block or a segment that was there before; None for none."""
    blocks: set[int] = set()
    segments: dict[int, int] = {}
    for at in range(start, len(events)):
        action, n_bytes, address = events[at]
        if action == "segment_alloc":
            segments[address] = n_bytes
        elif action == "segment_free":
            if segments.pop(address, None) is None:
                return at
        elif action == "alloc":
            if not any(begin <= address < begin + size for begin, size in segments.items()):
                return at
            blocks.add(address)
        elif action == "free_completed":
            if address not in blocks:
                return at
            blocks.remove(address)
    return None
