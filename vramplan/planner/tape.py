"""The tensor table's row format and its evaluator.

A :class:`Tape` lists the tensors of one training step in the order in which they are allocated and freed. A block's
rows are written once, inside :meth:`Tape.repeat`; sizes are integers or numpy arrays. One tape is read in two ways:

* :func:`peak` is the closed form: it folds every repetition (whose net effect is the same each time) and so evaluates
  any number of candidates and layers at once;
* :func:`unroll` enumerates the individual allocations of one candidate, for the breakdown, the timeline and a replay.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

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
        return self.size * self.times


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

    def row(self, name: str, category: Category, n_bytes: Ints, times: int = 1) -> Row:
        """Declare a tensor of ``n_bytes`` without allocating it yet."""
        g = self.granularity
        row = Row(len(self.rows), name, category, (n_bytes + (g - 1)) & -g if g > 1 else n_bytes, times)
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


def unroll(tape: Tape) -> list[Change]:
    """Every single allocation and release of a scalar tape, in order."""
    changes: list[Change] = []
    living: list[list[int]] = [[] for _ in tape.rows]
    fresh = itertools.count()
    append, new = changes.append, tuple.__new__

    def prepared(events: list[Event | Repeat]) -> list[Any]:
        """What one repetition needs of each event, looked up once."""
        entries: list[Any] = []
        for e in events:
            if isinstance(e, Repeat):
                entries.append((prepared(e.events), int(e.count), None, "", False))
            else:
                entries += [(living[e.row.index], e.kind, e.row, e.phase, e.joins)] * e.row.times
        return entries

    def walk(entries: list[Any]) -> None:
        for stack, kind, row, phase, joins in entries:
            if row is None:
                for _ in range(kind):
                    walk(stack)
            elif kind == 1:
                block = next(fresh)
                stack.append(block)
                append(new(Change, (True, row, block, phase, joins)))
            else:
                append(new(Change, (False, row, stack.pop() if kind == -1 else stack.pop(0), phase, joins)))

    walk(prepared(tape.events))
    return changes
