"""Replay of a step's allocations through the CUDA caching allocator: what it reserves, beyond what is allocated.

The rules are those of torch's c10/cuda/CUDACachingAllocator.cpp with default settings: sizes round up to 512 B;
requests up to 1 MiB come from 2 MiB segments; up to 10 MiB from 20 MiB segments; larger ones from segments of their
own, rounded up to 2 MiB. The best fitting free block is taken; it is split when enough is left; freed neighbours merge.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..units import MIB
from .tape import Change

MIN_BLOCK = 512
SMALL_LIMIT = 1 * MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT_FROM = 10 * MIB
ROUND_LARGE = 2 * MIB


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of one segment, free or in use; neighbours are linked."""

    address: int
    size: int
    small: bool
    free: bool = True
    before: Block | None = None
    after: Block | None = None


@dataclass(slots=True)
class CachingAllocator:
    """The allocator's state. Addresses are virtual and never reused between segments."""

    reserved_bytes: int = 0
    allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    _next_address: int = 0
    _pools: dict[bool, list[tuple[int, int, Block]]] = field(default_factory=lambda: {True: [], False: []})

    def malloc(self, n_bytes: int) -> Block:
        """Hand out a block of at least ``n_bytes`` (> 0)."""
        size = max(MIN_BLOCK, -(-n_bytes // MIN_BLOCK) * MIN_BLOCK)
        small = size <= SMALL_LIMIT
        block = self._best_fit(size, small) or self._new_segment(size, small)
        left = block.size - size
        if left >= MIN_BLOCK if small else left > SMALL_LIMIT:
            self._split(block, size)
        block.free = False
        self.allocated_bytes += block.size
        return block

    def release(self, block: Block) -> None:
        """Take a block back and merge it with free neighbours."""
        self.allocated_bytes -= block.size
        block.free = True
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._unlist(other)
                first, second = (other, block) if other is block.before else (block, other)
                first.size += second.size
                first.after = second.after
                if second.after is not None:
                    second.after.before = first
                block = first
        self._list(block)

    def _best_fit(self, size: int, small: bool) -> Block | None:
        pool = self._pools[small]
        i = bisect_left(pool, (size, -1))
        if i == len(pool):
            return None
        return pool.pop(i)[2]

    def _new_segment(self, size: int, small: bool) -> Block:
        if small:
            segment = SMALL_SEGMENT
        elif size < OWN_SEGMENT_FROM:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // ROUND_LARGE) * ROUND_LARGE
        self.reserved_bytes += segment
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        block = Block(self._next_address, segment, small)
        self._next_address += segment
        return block

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.small, True, block, block.after)
        if block.after is not None:
            block.after.before = rest
        block.size, block.after = size, rest
        self._list(rest)

    def _list(self, block: Block) -> None:
        insort(self._pools[block.small], (block.size, block.address, block))

    def _unlist(self, block: Block) -> None:
        pool = self._pools[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]


def replay(changes: Iterable[Change]) -> CachingAllocator:
    """Run a step's allocations and releases; read ``peak_reserved_bytes`` off the result."""
    allocator = CachingAllocator()
    living: dict[int, Block] = {}
    for change in changes:
        if change.alloc:
            if change.row.size > 0:
                living[change.block] = allocator.malloc(int(change.row.size))
        elif change.block in living:
            allocator.release(living.pop(change.block))
    return allocator
