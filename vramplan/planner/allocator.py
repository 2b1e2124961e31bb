"""Replay of allocations through a model of the CUDA caching allocator: what it reserves, beyond what is allocated.

The rules are those of torch's c10/cuda/CUDACachingAllocator.cpp on a single stream:

* sizes round up to 512 B; requests up to 1 MiB come from 2 MiB segments, those below 10 MiB from 20 MiB segments,
  larger ones from segments of their own, rounded up to 2 MiB;
* the best fitting free block is taken, and split when enough is left; freed neighbours merge;
* when the driver has no more, first cached oversize blocks are given back (with ``max_split_size_mb``), then every
  segment that is free as a whole, and the request is tried again, which counts as a retry;
* with ``expandable_segments`` a pool is one stretch of addresses into which pages of 2 or 20 MiB are mapped where they
  are needed, at the lowest address first.

Allocated bytes are those of the blocks handed out, as ``torch.cuda.memory_allocated`` counts them: a block that was
not worth splitting counts as a whole.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import CapExceededError
from ..units import MIB
from .allocator_settings import UNLIMITED, AllocatorSettings
from .tape import Change

EDITION = 1
"""Of these rules; one more with every change. A compiled replay of another edition is not used."""

MIN_BLOCK = 512
SMALL_LIMIT = 1 * MIB
SMALL_SEGMENT = 2 * MIB
OWN_SEGMENT_FROM = 10 * MIB
ROUND_LARGE = 2 * MIB
UNSPLIT_SLACK = 20 * MIB
"""How much larger than the request an oversize block may be (``max_non_split_rounding_mb``)."""

Program = list[tuple[int, int]]
"""Allocations as (bytes, block) and releases as (0, block), where a block is any number of its own."""


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of one segment: in use, free, or (expandable segments) not mapped. Neighbours are linked."""

    address: int
    size: int
    pool: Pool
    free: bool = True
    mapped: bool = True
    before: Block | None = None
    after: Block | None = None
    listed_at: int = 0

    @property
    def is_split(self) -> bool:
        """Whether it is only a part of its segment."""
        return self.before is not None or self.after is not None


@dataclass(slots=True, eq=False)
class Pool:
    """The free blocks for small or for large requests, by size and address; with the unmapped ones by address."""

    small: bool
    page: int
    least_rest: int
    blocks: list[tuple[int, int, Block]] = field(default_factory=list)
    unmapped: list[tuple[int, Block]] = field(default_factory=list)
    searches: int = 0

    def add(self, block: Block) -> None:
        """List a free block."""
        block.listed_at = self.searches
        insort(self.blocks, (block.size, block.address, block))

    def remove(self, block: Block) -> None:
        """Unlist a free block."""
        del self.blocks[bisect_left(self.blocks, (block.size, block.address))]

    def add_unmapped(self, block: Block) -> None:
        """List a stretch of addresses without memory."""
        insort(self.unmapped, (block.address, block))

    def remove_unmapped(self, block: Block) -> None:
        """Unlist it."""
        del self.unmapped[bisect_left(self.unmapped, (block.address,))]


class CachingAllocator:
    """The allocator's state and statistics, in bytes. Addresses are virtual and never reused between segments."""

    def __init__(self, settings: AllocatorSettings | None = None) -> None:
        self.settings = s = settings or AllocatorSettings()
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.retries = 0
        self._next_address = 0
        least_rest = MIN_BLOCK if s.expandable_segments else SMALL_LIMIT + 1
        self._small = Pool(True, SMALL_SEGMENT, MIN_BLOCK)
        self._large = Pool(False, s.large_segment_bytes, least_rest)
        self._collects = s.garbage_collection_threshold > 0 and s.cap_bytes < UNLIMITED
        self._expandable = s.expandable_segments
        self._max_split = s.max_split_bytes
        self._plain = not s.expandable_segments and s.max_split_bytes == UNLIMITED
        self._divides = s.roundup_power2_divisions > 1

    # ---------------------------------------------------------------- what a program calls

    def malloc(self, n_bytes: int) -> Block:
        """Hand out a block of at least ``n_bytes`` (> 0). Raises CapExceededError when the cap does not allow it."""
        size = self._divided(n_bytes) if self._divides else (n_bytes + MIN_BLOCK - 1) // MIN_BLOCK * MIN_BLOCK
        pool = self._small if size <= SMALL_LIMIT else self._large
        pool.searches += 1
        blocks = pool.blocks
        i = bisect_left(blocks, (size,))
        if i == len(blocks):
            block = self._obtain(size, pool)
        elif self._plain:
            block = blocks.pop(i)[2]
        else:
            block = self._choose(size, pool, i) or self._obtain(size, pool)
        left = block.size - size
        if left >= pool.least_rest and (size < self._max_split or self._expandable):
            rest = Block(block.address + size, left, pool, True, True, block, block.after, pool.searches)
            if block.after is not None:
                block.after.before = rest
            block.size, block.after = size, rest
            insort(blocks, (left, rest.address, rest))
        block.free = False
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return block

    def release(self, block: Block) -> None:
        """Take a block back and merge it with free neighbours."""
        self.allocated_bytes -= block.size
        block.free = True
        block.pool.add(self._merged(block))

    def play(self, program: Program, living: dict[int, Block]) -> None:
        """Run a program whose blocks are looked up in ``living``; releases of others are passed over."""
        malloc, release = self.malloc, self.release
        for size, block in program:
            if size:
                living[block] = malloc(size)
            elif block in living:
                release(living.pop(block))

    def empty_cache(self) -> None:
        """Give back every segment, or page of an expandable one, that is free as a whole."""
        for pool in (self._large, self._small):
            for _, _, block in list(pool.blocks):
                if self.settings.expandable_segments:
                    self._unmap(block)
                elif not block.is_split:
                    self._give_back(block)

    @property
    def largest_free_bytes(self) -> int:
        """The largest cached block."""
        return max((pool.blocks[-1][0] for pool in (self._small, self._large) if pool.blocks), default=0)

    @property
    def fragmentation_bytes(self) -> int:
        """Reserved but not handed out now."""
        return self.reserved_bytes - self.allocated_bytes

    # ---------------------------------------------------------------- finding a block

    def _divided(self, n_bytes: int) -> int:
        divisions = self.settings.roundup_power2_divisions
        step = MIN_BLOCK
        if n_bytes > MIN_BLOCK * divisions:
            step = (1 << (n_bytes.bit_length() - 1)) // divisions
        return -(-n_bytes // step) * step

    def _choose(self, size: int, pool: Pool, i: int) -> Block | None:
        """The best fit, from the i-th free block on, where settings say more about it than its size does."""
        blocks = pool.blocks
        if self._expandable:
            # a block at the mapped end counts with what it could grow to: smaller ones are better fits
            while i + 1 < len(blocks) and _potential(blocks[i + 1][2]) < _potential(blocks[i][2]):
                i += 1
        found = blocks[i][2]
        limit = self._max_split
        if found.size >= limit:
            oversize = size >= limit
            if not oversize or found.size >= size + UNSPLIT_SLACK:
                return None
        del blocks[i]
        return found

    def _obtain(self, size: int, pool: Pool) -> Block:
        """New memory from the driver, after giving back what is cached if need be."""
        if self._collects:
            self._collect_garbage()
        block = self._new(size, pool)
        if block is None and self._give_back_oversize(size, pool):
            block = self._new(size, pool)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._new(size, pool)
        if block is None:
            raise CapExceededError(size, self.allocated_bytes, self.reserved_bytes)
        return block

    def _new(self, size: int, pool: Pool) -> Block | None:
        if pool.small:
            segment = SMALL_SEGMENT
        elif size < OWN_SEGMENT_FROM:
            segment = self.settings.large_segment_bytes
        else:
            segment = -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.reserved_bytes + segment > self.settings.cap_bytes:
            return None
        if self.settings.expandable_segments:
            return self._expand(size, pool)
        self._reserve(segment)
        block = Block(self._next_address, segment, pool)
        self._next_address += segment
        return block

    def _reserve(self, n_bytes: int) -> None:
        self.reserved_bytes += n_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    # ---------------------------------------------------------------- blocks

    def _merged(self, block: Block) -> Block:
        """The block with its free (or, if it is unmapped, unmapped) neighbours."""
        before, after, mapped = block.before, block.after, block.mapped
        if before is not None and before.free and before.mapped is mapped:
            self._unlist(before)
            before.size += block.size
            before.after = after
            if after is not None:
                after.before = before
            block = before
        if after is not None and after.free and after.mapped is mapped:
            self._unlist(after)
            block.size += after.size
            block.after = after.after
            if after.after is not None:
                after.after.before = block
        return block

    def _unlist(self, block: Block) -> None:
        if block.mapped:
            block.pool.remove(block)
        else:
            block.pool.remove_unmapped(block)

    # ---------------------------------------------------------------- giving back

    def _give_back(self, block: Block) -> None:
        block.pool.remove(block)
        self.reserved_bytes -= block.size

    def _give_back_oversize(self, size: int, pool: Pool) -> bool:
        """With ``max_split_size_mb``: one cached oversize block that is large enough, or the largest until it is."""
        limit = self.settings.max_split_bytes
        if limit == UNLIMITED or self.settings.expandable_segments:
            return False
        wanted = max(size, limit)
        i = bisect_left(pool.blocks, (wanted, -1))
        if i < len(pool.blocks):
            self._give_back(pool.blocks[i][2])
            return True
        released = 0
        while pool.blocks and released < wanted and pool.blocks[-1][0] >= limit:
            released += pool.blocks[-1][0]
            self._give_back(pool.blocks[-1][2])
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Above the threshold, give back the whole segments that have lain unused for longer than the average."""
        threshold = int(self.settings.garbage_collection_threshold * self.settings.cap_bytes)
        target = self.reserved_bytes - threshold
        whole = [block for _, _, block in self._large.blocks if not block.is_split]
        ages = {id(block): self._large.searches - block.listed_at for block in whole}
        while target > 0 and whole and not self.settings.expandable_segments:
            limit = sum(ages[id(block)] for block in whole) / len(whole)
            for block in [block for block in whole if ages[id(block)] >= limit]:
                whole.remove(block)
                target -= block.size
                self._give_back(block)

    # ---------------------------------------------------------------- expandable segments

    def _expand(self, size: int, pool: Pool) -> Block | None:
        """A free block of at least ``size`` at the lowest address where unmapped pages can complete one."""
        block = self._room(size, pool)
        if not block.mapped:
            mapped = self._map(block, min(block.size, size))
            if mapped is None:
                return None
            block = mapped
        while block.size < size and block.after is not None:
            mapped = self._map(block.after, min(size - block.size, block.after.size))
            if mapped is None:
                return None
            block = mapped
        pool.remove(block)
        return block

    def _room(self, size: int, pool: Pool) -> Block:
        for _, unmapped in pool.unmapped:
            before = unmapped.before
            start = before if before is not None and before.free else unmapped
            found, at = 0, start if start.free else None
            while at is not None and at.free and found < size:
                found += at.size
                at = at.after
            if found >= size:
                return start
        pages = self.settings.cap_bytes * 9 // 8 // pool.page + 2
        segment = Block(-(-self._next_address // pool.page) * pool.page, pages * pool.page, pool, mapped=False)
        self._next_address = segment.address + segment.size
        pool.add_unmapped(segment)
        return segment

    def _map(self, block: Block, n_bytes: int) -> Block | None:
        """Put pages behind the beginning of an unmapped block; the free block that results, or None at the cap."""
        pool = block.pool
        n_bytes = min(-(-n_bytes // pool.page) * pool.page, block.size)
        if self.reserved_bytes + n_bytes > self.settings.cap_bytes:
            return None
        self._reserve(n_bytes)
        pool.remove_unmapped(block)
        block.mapped = True
        if n_bytes < block.size:
            rest = Block(block.address + n_bytes, block.size - n_bytes, pool, mapped=False, before=block,
                         after=block.after)  # fmt: skip
            if block.after is not None:
                block.after.before = rest
            block.size, block.after = n_bytes, rest
            pool.add_unmapped(rest)
        block = self._merged(block)
        pool.add(block)
        return block

    def _unmap(self, block: Block) -> None:
        """Take the pages away that lie wholly within a free block."""
        pool, page = block.pool, block.pool.page
        start = -(-block.address // page) * page
        end = (block.address + block.size) // page * page
        if start >= end:
            return
        pool.remove(block)
        if start > block.address:
            head = Block(block.address, start - block.address, pool, before=block.before, after=block)
            if block.before is not None:
                block.before.after = head
            block.before = head
            pool.add(head)
        if end < block.address + block.size:
            tail = Block(end, block.address + block.size - end, pool, before=block, after=block.after)
            if block.after is not None:
                block.after.before = tail
            block.after = tail
            pool.add(tail)
        block.address, block.size, block.mapped = start, end - start, False
        self.reserved_bytes -= block.size
        pool.add_unmapped(self._merged(block))


def _potential(block: Block) -> int:
    """Bytes a free block has, with the unmapped ones behind it."""
    after = block.after
    return block.size + (after.size if after is not None and not after.mapped else 0)


def program_of(changes: Iterable[Change]) -> Program:
    """The allocations and releases of unrolled rows; empty tensors are left out."""
    return [(int(row.size) if alloc else 0, block) for alloc, row, block, _, _ in changes if row.size > 0]


def replay(changes: Iterable[Change], settings: AllocatorSettings | None = None) -> CachingAllocator:
    """Run allocations and releases; read peaks, retries and fragmentation off the result. Raises CapExceededError."""
    allocator = CachingAllocator(settings)
    allocator.play(program_of(changes), {})
    return allocator


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes allocated and reserved after one event of a replay."""

    phase: str
    allocated_bytes: int
    reserved_bytes: int


def timeline(changes: Iterable[Change], settings: AllocatorSettings | None = None) -> list[Moment]:
    """The state after each event of :func:`replay`."""
    allocator = CachingAllocator(settings)
    living: dict[int, Block] = {}
    moments = []
    for change in changes:
        if change.alloc and change.row.size > 0:
            living[change.block] = allocator.malloc(int(change.row.size))
        elif not change.alloc and change.block in living:
            allocator.release(living.pop(change.block))
        moments.append(Moment(change.phase, allocator.allocated_bytes, allocator.reserved_bytes))
    return moments
