"""The tensor table's row format and its evaluator.

A :class:`Tape` lists the tensors of one training step in the order in which they are allocated and freed. A block's
rows are written once, inside :meth:`Tape.repeat`; sizes are integers or numpy arrays. One tape is read in two ways:

* :func:`peak` is the closed form: it folds every repetition (whose net effect is the same each time) and so evaluates
  any number of candidates and layers at once;
* :func:`unroll` enumerates the individual allocations of one candidate, for the breakdown, the timeline and a replay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .shape import Ints

Category = Literal[
    "weights", "gradients", "optimizer", "activations", "logits_and_loss", "temporaries", "inputs", "workspace"
]
CATEGORIES: tuple[Category, ...] = (
    "weights", "gradients", "optimizer", "activations", "logits_and_loss", "temporaries", "inputs", "workspace",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One tensor of the step: ``size`` in bytes as the allocator hands it out, ``times`` for that many equals."""

    index: int
    name: str
    category: Category
    size: Ints
    times: int = 1

    @property
    def total(self) -> Ints:
        """Bytes of all its equals together."""
        return self.size if self.times == 1 else self.size * self.times


@dataclass(frozen=True, slots=True)
class Event:
    """An allocation (+1), a release of the newest (-1) or of the oldest (-2) living instance of ``row``.

    ``joins``: the release of a gradient that has been added to the one of an earlier micro-step.
    """

    kind: int
    row: Row
    phase: str
    joins: bool = False


@dataclass(slots=True)
class Repeat:
    """``count`` repetitions of the same events, each with the same net effect."""

    count: Ints
    events: list[Event | Repeat] = field(default_factory=list)


class Tape:
    """Records allocations and releases. The allocator rounds each request up to ``granularity`` bytes, a power of 2."""

    def __init__(self, granularity: int = 1) -> None:
        self.granularity = granularity
        self.rows: list[Row] = []
        self.events: list[Event | Repeat] = []
        self.phase = ""
        self.closed = False
        self._open = [self.events]
        self._living: dict[int, list[int]] = {}

    def rounded(self, n_bytes: Ints) -> Ints:
        """As many bytes as the allocator hands out."""
        g = self.granularity
        return (n_bytes + (g - 1)) & -g if g > 1 else n_bytes

    def row(self, name: str, category: Category, n_bytes: Ints, times: int = 1) -> Row:
        """Declare a tensor of ``n_bytes`` without allocating it yet."""
        return self._declare(name, category, self.rounded(n_bytes), times)

    def keep(self, name: str, category: Category, size: Ints) -> None:
        """Declare and allocate a tensor whose ``size`` is :meth:`rounded` already."""
        self.alloc(self._declare(name, category, size, 1))

    def _declare(self, name: str, category: Category, size: Ints, times: int) -> Row:
        row = Row(len(self.rows), name, category, size, times)
        self.rows.append(row)
        return row

    def new(self, name: str, category: Category, n_bytes: Ints, times: int = 1) -> Row:
        """Declare a tensor and allocate it."""
        row = self.row(name, category, n_bytes, times)
        self.alloc(row)
        return row

    def alloc(self, *rows: Row) -> None:
        """Allocate one instance of each row."""
        self._open[-1].extend(Event(1, row, self.phase) for row in rows)

    def free(self, *rows: Row | None) -> None:
        """Release the newest living instance of each row; ``None`` stands for a tensor this configuration lacks."""
        self._open[-1].extend(Event(-1, row, self.phase) for row in rows if row is not None)

    def begin(self, row: Row, owner: object) -> None:
        """Allocate an instance of ``row`` that belongs to ``owner``."""
        self.alloc(row)
        self._living.setdefault(row.index, []).append(id(owner))

    def end(self, row: Row, owner: object, *, joins: bool = False) -> None:
        """Release the instance that belongs to ``owner``: the newest one, or else the oldest.

        ``joins``: it is a gradient that was added to ``.grad``; in the first micro-step it becomes that instead.
        """
        if self.closed:
            return
        living = self._living[row.index]
        kind = -1 if living[-1] == id(owner) else -2
        living.remove(id(owner))
        self._open[-1].append(Event(kind, row, self.phase, joins))

    def close(self) -> None:
        """Record nothing from here on: what is alive stays alive."""
        self.closed = True

    @contextmanager
    def repeat(self, count: Ints) -> Iterator[None]:
        """Record the events inside once, to happen ``count`` times (at least once)."""
        if isinstance(count, int) and count == 1:
            yield
            return
        body = Repeat(count)
        self._open[-1].append(body)
        self._open.append(body.events)
        try:
            yield
        finally:
            self._open.pop()


def peak(tape: Tape) -> Ints:
    """Largest number of bytes alive at any time: an int, or an array over all candidates."""
    return _scan(tape.events)[1]


def kept_by_a_repetition(tape: Tape, phase: str) -> Ints:
    """Bytes that each repetition of the first repeated events in ``phase`` leaves alive; 0 where nothing repeats."""
    for event in tape.events:
        if isinstance(event, Repeat) and isinstance(event.events[0], Event) and event.events[0].phase == phase:
            return _scan(event.events)[0]
    return 0


def _scan(events: list[Event | Repeat]) -> tuple[Ints, Ints]:
    """Net change of these events, and the highest point they reach above where they began."""
    level: Ints = 0
    high: Ints = 0
    rising = False
    for event in events:
        if isinstance(event, Repeat):
            step, top = _scan(event.events)
            climb = np.maximum(step, 0) * (event.count - 1)
            high = np.maximum(high, level + climb + top)
            level = level + step * event.count
            rising = False
        elif event.kind > 0:
            level = level + event.row.total
            rising = True
        else:
            if rising:
                high = np.maximum(high, level)
                rising = False
            level = level - event.row.total
    return level, np.maximum(high, level) if rising else high


class Change(NamedTuple):
    """One allocation or release of one instance: ``block`` numbers the instance; ``joins`` as in :class:`Event`."""

    alloc: bool
    row: Row
    block: int
    phase: str
    joins: bool = False


LARGEST_SUM = 1 << 60
Numbers = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Unrolled:
    """Every single allocation and release of a scalar tape, in order: arrays of one element each.

    ``row`` and ``phase`` count in ``rows`` and ``phases``; ``block`` and ``joins`` are those of :class:`Change`.
    """

    rows: Sequence[Row]
    phases: Sequence[str]
    alloc: Mask
    row: Numbers
    block: Numbers
    phase: Numbers
    joins: Mask

    def __len__(self) -> int:
        return len(self.row)

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    def within(self, *phases: str) -> Mask:
        """Which of them happen in these phases."""
        return np.isin(self.phase, [i for i, phase in enumerate(self.phases) if phase in phases])

    def of(self, *categories: Category) -> Mask:
        """Which of them are of tensors of these categories."""
        return np.array([row.category in categories for row in self.rows], dtype=np.bool_)[self.row]

    @cached_property
    def sizes(self) -> Numbers:
        """Bytes that each allocates or releases; Python's integers where 64 bits could not hold their sums."""
        sizes = [int(row.size) for row in self.rows]
        narrow = max(sizes, default=0) * len(self) < LARGEST_SUM
        return np.array(sizes, dtype=np.int64 if narrow else object)[self.row]

    @cached_property
    def live_bytes(self) -> Numbers:
        """Bytes alive after each of them."""
        return np.cumsum(np.where(self.alloc, self.sizes, -self.sizes))

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """The same, one object each."""
        rows = [self.rows[i] for i in self.row.tolist()]
        phases = [self.phases[i] for i in self.phase.tolist()]
        columns = (self.alloc.tolist(), rows, self.block.tolist(), phases, self.joins.tolist())
        new = tuple.__new__  # a third of the time that Change(...) takes
        return tuple([new(Change, fields) for fields in zip(*columns, strict=True)])


def unroll(tape: Tape) -> Unrolled:
    """Every single allocation and release of a scalar tape. Blocks are numbered in the order of their allocation.

    Raises IndexError for a release of what is not alive.
    """
    distinct: list[Event] = []

    def repeated(events: list[Event | Repeat]) -> Numbers:
        """Numbers of the events, one for each time that they happen."""
        parts, begin = [], len(distinct)
        for event in events:
            if isinstance(event, Repeat):
                parts.append(np.arange(begin, len(distinct)))
                parts.append(np.tile(repeated(event.events), int(event.count)))
                begin = len(distinct)
            else:
                distinct.append(event)
        return np.concatenate([*parts, np.arange(begin, len(distinct))])

    which = repeated(tape.events)
    which = np.repeat(which, np.array([event.row.times for event in distinct], dtype=np.int64)[which])
    phases = list(dict.fromkeys(event.phase for event in distinct))
    row = np.array([event.row.index for event in distinct], dtype=np.int64)[which]
    kind = np.array([event.kind for event in distinct], dtype=np.int64)[which]
    phase = np.array([phases.index(event.phase) for event in distinct], dtype=np.int64)[which]
    joins = np.array([event.joins for event in distinct], dtype=np.bool_)[which]
    return Unrolled(tape.rows, phases, kind > 0, row, _blocks(row, kind), phase, joins)


def _blocks(row: Numbers, kind: Numbers) -> Numbers:
    """Which block each event allocates or releases: of its row, the newest living one (-1) or the oldest (-2)."""
    alloc = kind > 0
    block = np.cumsum(alloc) - 1
    by_row = np.argsort(row, kind="stable")
    level = np.cumsum(np.where(alloc[by_row], 1, -1))
    starts = np.flatnonzero(np.diff(row[by_row], prepend=-1))
    before = np.concatenate([[0], level])[starts]
    level -= np.repeat(before, np.diff(starts, append=len(row)))
    if level.min(initial=0) < 0:
        raise IndexError("the tape releases a tensor that is not alive")
    # as many instances are alive after an allocation as before the release of the same: what is next to it at its level
    level += ~alloc[by_row]
    paired = by_row[np.lexsort((level, row[by_row]))]
    releases = np.flatnonzero(~alloc[paired])
    block[paired[releases]] = block[paired[releases - 1]]
    for number in np.unique(row[kind == -2]).tolist():
        living: list[int] = []
        for at in np.flatnonzero(row == number).tolist():
            if alloc[at]:
                living.append(int(block[at]))
            else:
                block[at] = living.pop(0 if kind[at] == -2 else -1)
    return block
