"""The replayed allocator keeps its books, and follows torch's documented rules."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.planner.allocator import Block, CachingAllocator, replay
from vramplan.planner.memory import estimate
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.planner.tape import Tape, peak, unroll
from vramplan.units import KIB, MIB

SIZES = st.one_of(
    st.integers(1, 3000),
    st.integers(MIB - 1000, MIB + 1000),
    st.integers(1, 12 * MIB),
    st.integers(10 * MIB - 600, 10 * MIB + 600),
    st.integers(10 * MIB, 70 * MIB),
)
PROGRAMS = st.lists(st.one_of(SIZES, st.integers(-60, -1)), min_size=1, max_size=60)
"""A positive number is a request in bytes; -n releases the n-th oldest living block, if there are so many."""


class Watched:
    """An allocator whose segments are followed from outside, by the links between blocks."""

    def __init__(self) -> None:
        self.allocator = CachingAllocator()
        self.living: list[Block] = []
        self.heads: dict[int, Block] = {}  # first block of each segment: never replaced by splits and merges

    def malloc(self, n_bytes: int) -> Block:
        block = self.allocator.malloc(n_bytes)
        self.living.append(block)
        head = block
        while head.before is not None:
            head = head.before
        self.heads[head.address] = head
        return block

    def release(self, index: int) -> None:
        self.allocator.release(self.living.pop(index))

    def run(self, program: list[int]) -> None:
        for entry in program:
            if entry > 0:
                self.malloc(entry)
            elif -entry <= len(self.living):
                self.release(-entry - 1)

    def segments(self) -> list[list[Block]]:
        found = []
        for head in self.heads.values():
            blocks, at = [], head
            while at is not None:
                blocks.append(at)
                at = at.after  # type: ignore[assignment]
            found.append(blocks)
        return found

    def free_sizes(self, small: bool) -> list[int]:
        return sorted(b.size for blocks in self.segments() for b in blocks if b.free and b.small is small)

    def check(self) -> None:
        segments = self.segments()
        blocks = [b for segment in segments for b in segment]
        used = sorted((b for b in blocks if not b.free), key=lambda b: b.address)
        assert {id(b) for b in used} == {id(b) for b in self.living}
        for one, two in pairwise(used):
            assert one.address + one.size <= two.address
        for segment in segments:
            assert segment[0].before is None
            for one, two in pairwise(segment):
                assert two.before is one
                assert one.address + one.size == two.address
                assert not (one.free and two.free), "neighbours that are both free must have merged"
        a = self.allocator
        assert sum(b.size for b in used) == a.allocated_bytes
        assert sum(b.size for b in blocks) == a.reserved_bytes
        assert a.allocated_bytes <= a.reserved_bytes <= a.peak_reserved_bytes


@settings(max_examples=250, deadline=None)
@given(program=PROGRAMS)
def test_blocks_never_overlap_and_bytes_are_conserved(program: list[int]) -> None:
    watched = Watched()
    for entry in program:
        watched.run([entry])
        watched.check()


@settings(max_examples=150, deadline=None)
@given(program=PROGRAMS, order=st.randoms(use_true_random=False))
def test_releasing_everything_leaves_one_block_per_segment(program: list[int], order: Any) -> None:
    watched = Watched()
    watched.run(program)
    reserved = watched.allocator.reserved_bytes
    while watched.living:
        watched.release(order.randrange(len(watched.living)))
    watched.check()
    assert watched.allocator.allocated_bytes == 0
    assert watched.allocator.reserved_bytes == reserved, "cached segments are kept"
    assert all(len(segment) == 1 and segment[0].free for segment in watched.segments())


@settings(max_examples=250, deadline=None)
@given(program=PROGRAMS, request=SIZES)
def test_a_request_takes_the_best_fitting_block_or_a_new_segment(program: list[int], request: int) -> None:
    watched = Watched()
    watched.run(program)
    rounded = -(-request // 512) * 512
    small = rounded <= MIB
    fitting = [size for size in watched.free_sizes(small) if size >= rounded]
    before = watched.allocator.reserved_bytes
    block = watched.malloc(request)
    watched.check()
    grown = watched.allocator.reserved_bytes - before
    if fitting:
        assert grown == 0
        taken = min(fitting)
    else:
        taken = 2 * MIB if small else 20 * MIB if rounded < 10 * MIB else -(-rounded // (2 * MIB)) * 2 * MIB
        assert grown == taken
    splits = taken - rounded >= 512 if small else taken - rounded > MIB
    assert block.size == (rounded if splits else taken)
    assert block.small is small


@pytest.mark.parametrize(
    ("request_bytes", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_size_of_a_new_segment(request_bytes: int, segment: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(request_bytes)
    assert allocator.reserved_bytes == segment


def test_a_large_block_is_split_only_when_more_than_one_mib_is_left() -> None:
    allocator = CachingAllocator()
    assert allocator.malloc(33 * MIB).size == 34 * MIB  # exactly 1 MiB left: kept whole
    assert allocator.malloc(33 * MIB - 512).size == 33 * MIB - 512
    assert allocator.reserved_bytes == 68 * MIB


def test_a_small_block_is_split_down_to_512_bytes() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.malloc(1) for _ in range(4096)]
    assert {b.size for b in blocks} == {512}
    assert allocator.reserved_bytes == 2 * MIB
    allocator.malloc(1)
    assert allocator.reserved_bytes == 4 * MIB


def test_small_and_large_requests_never_share_a_segment() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.malloc(20 * MIB))
    allocator.malloc(KIB)
    assert allocator.reserved_bytes == 22 * MIB


def test_a_freed_segment_serves_smaller_requests_again() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.malloc(64 * MIB))
    one, two = allocator.malloc(30 * MIB), allocator.malloc(30 * MIB)
    assert allocator.reserved_bytes == 64 * MIB
    allocator.release(one)
    allocator.release(two)
    assert allocator.malloc(64 * MIB).address == 0
    assert allocator.reserved_bytes == 64 * MIB


def test_replay_fragments_when_a_hole_is_too_small() -> None:
    tape = Tape(512)
    holes = [tape.new("hole", "temporaries", 12 * MIB) for _ in range(2)]
    tape.free(*holes)
    tape.new("too big for either", "activations", 24 * MIB)
    result = replay(unroll(tape))
    assert peak(tape) == 24 * MIB
    assert result.peak_reserved_bytes == 48 * MIB
    assert result.allocated_bytes == 24 * MIB


def test_replay_of_nothing_reserves_nothing() -> None:
    tape = Tape(512)
    tape.new("empty", "activations", 0)
    assert replay(unroll(tape)).peak_reserved_bytes == 0


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_replayed_steps_reserve_a_little_more_than_they_allocate(compile: bool, batch_size: int) -> None:
    """Public runs show reserved / allocated from 1.002 to 1.49."""
    shape = Shape(n_layer=12, n_head=12, n_embd=768)
    e = estimate(shape, StepConfig(batch_size=batch_size, grad_accum=8, compile=compile))
    assert 1.0 < e.peak_reserved_bytes / e.peak_allocated_bytes < 1.49
    again = replay(e.changes)
    left = sum(int(c.row.size) if c.alloc else -int(c.row.size) for c in e.changes)
    # unsplit remainders of up to 1 MiB count as allocated in blocks, not in torch's requested sizes
    assert left <= again.allocated_bytes <= left + MIB * len(e.changes)
