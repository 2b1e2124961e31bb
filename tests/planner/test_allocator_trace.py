"""Recorded traces of a real allocator against the replay; and that a difference would be seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vramplan.planner.allocator_settings import AllocatorSettings
from vramplan.planner.allocator_trace import TraceEvent, replay_trace
from vramplan.units import MIB

RECORDED = sorted((Path(__file__).parents[1] / "data/traces").glob("*.json"))

SMALL, LARGE, OWN = 0x10_000_000, 0x20_000_000, 0x40_000_000
BY_HAND: list[TraceEvent] = [
    # requests up to 1 MiB share segments of 2 MiB, those below 10 MiB segments of 20 MiB; larger ones get their own
    ("segment_alloc", 2 * MIB, SMALL), ("alloc", 1000, SMALL),
    ("segment_alloc", 20 * MIB, LARGE), ("alloc", 5 * MIB, LARGE), ("alloc", 6 * MIB, LARGE + 5 * MIB),
    ("segment_alloc", 32 * MIB, OWN), ("alloc", 31 * MIB, OWN),
    ("free_requested", 5 * MIB, LARGE), ("free_completed", 5 * MIB, LARGE),
    ("alloc", 2 * MIB, LARGE), ("alloc", 512, SMALL + 1024),
    ("free_requested", 31 * MIB, OWN), ("free_completed", 31 * MIB, OWN), ("alloc", 12 * MIB, OWN),
    ("alloc", 11 * MIB, OWN + 12 * MIB),
]  # fmt: skip


def test_a_trace_by_hand() -> None:
    found = replay_trace(BY_HAND)
    assert (found.compared, found.different, found.first_difference, found.skipped) == (8, 0, None, 0)
    assert found.recorded_peak_bytes == found.replayed_peak_bytes == 54 * MIB


def test_what_was_there_before_the_recording_is_skipped() -> None:
    before: list[TraceEvent] = [
        ("alloc", 512, 0x5000), ("segment_alloc", 2 * MIB, SMALL), ("alloc", 512, SMALL),
        ("free_completed", 512, 0x5000), ("segment_free", 20 * MIB, 0x90_000_000),
        ("free_completed", 512, SMALL), ("segment_free", 2 * MIB, SMALL), ("snapshot", 0, 0),
    ]  # fmt: skip
    found = replay_trace([*before, *BY_HAND])
    assert found.skipped == 7
    assert (found.compared, found.different) == (8, 0)


@pytest.mark.parametrize(
    ("at", "event"),
    [(2, ("segment_alloc", 22 * MIB, LARGE)), (5, ("segment_alloc", 31 * MIB, OWN)), (9, ("alloc", 30 * MIB, LARGE))],
)
def test_a_difference_is_seen(at: int, event: TraceEvent) -> None:
    wrong = [*BY_HAND]
    wrong[at] = event
    found = replay_trace(wrong)
    assert found.different > 0
    assert found.first_difference in (at, at + 1)


def test_other_settings_are_another_allocator() -> None:
    assert replay_trace(BY_HAND, AllocatorSettings(large_segment_bytes=64 * MIB)).different > 0


def test_an_emptied_cache_is_followed() -> None:
    freed: list[TraceEvent] = [
        ("free_completed", 12 * MIB, OWN), ("free_completed", 11 * MIB, OWN + 12 * MIB),
        ("segment_free", 32 * MIB, OWN),
    ]  # fmt: skip
    found = replay_trace([*BY_HAND, *freed, ("segment_alloc", 40 * MIB, OWN), ("alloc", 40 * MIB, OWN)])
    assert (found.compared, found.different) == (9, 0)
    assert found.recorded_peak_bytes == found.replayed_peak_bytes == 62 * MIB


def test_expandable_segments_are_refused() -> None:
    with pytest.raises(ValueError, match="not compared"):
        replay_trace([*BY_HAND, ("segment_map", 2 * MIB, 0x70_000_000)])


def test_a_block_that_is_taken_twice_is_no_trace() -> None:
    with pytest.raises(ValueError, match="which is taken"):
        replay_trace([*BY_HAND, ("alloc", 512, SMALL)])


@pytest.mark.skipif(not RECORDED, reason="no allocator trace of a card has been recorded yet (card_campaign.py)")
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_traces(path: Path) -> None:
    found = replay_trace([tuple(event) for event in json.loads(path.read_text(encoding="utf-8"))["events"]])
    assert found.compared > 1000
    assert found.different == 0, found
    assert found.recorded_peak_bytes == found.replayed_peak_bytes
