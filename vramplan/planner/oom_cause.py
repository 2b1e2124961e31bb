"""Why memory ran out, judged from the figures of the message.

Let R be what was asked for, T the card's total, F what its driver had free, S what torch's allocator had reserved, U
what of that was not in use, and O what others hold:

* **limit**: a limit was set (a memory fraction, a cgroup, a batch system), and either the driver had R free all the
  same, or S + R is beyond the limit while U is smaller than R;
* **fragmentation**: U >= R > F, so that the request would have fitted had the free pieces been one. It does not count
  where U is below a twentieth of the card and R below a hundredth: so much lies idle in any allocator, and one of the
  next requests would have failed;
* **other_process**: F < R <= F + O, so that it would have fitted without the others, and O is at least a hundredth of
  the card. O is what the message lists; else T - F less this process; else, where neither is said, T - F - S less what
  a CUDA context and its libraries may take, and then it must be a fifth of the card;
* **exhausted**: none of these, and what this process holds is what fills the card, or R is larger than the card;
* **unknown**: the message does not say enough, or contradicts itself.

Where both U and O would have been enough, the larger of them is named. A host's message says that memory was refused,
not how much there was: it counts as exhausted where an allocator or the kernel says so, as a limit where a group's
limit is named, as unknown where a process was merely killed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..units import GIB, gib
from .allocator import OWN_SEGMENT_FROM, ROUND_LARGE, SMALL_LIMIT, SMALL_SEGMENT
from .allocator_settings import LARGE_SEGMENT
from .oom_fields import ABSURD_BYTES, Figures
from .oom_report import Event

Cause = Literal["exhausted", "fragmentation", "other_process", "limit", "unknown"]

TRIVIAL_SHARE, SMALL_REQUEST = 20, 100
"""Idle reserved memory below this part (1/20) of the card is no fragmentation worth the name, for a request below that
part (1/100) of it."""

OTHERS_SHARE, GUESSED_SHARE = 100, 5
"""Others that hold less than this part of the card are not why it is full: 1/100, or 1/5 where nothing says that it is
others, and not this process outside torch's allocator, who hold it."""

FULL_SHARE = 0.8
"""Of a card that torch holds: then it is what fills it, whatever was asked for."""

LARGEST_CONTEXT_BYTES = 1 * GIB
"""Of a process outside torch's allocator, at most: CUDA context (0.1 to 0.5 GiB), cuBLAS, cuDNN, NCCL. On a small card
at most a tenth of it."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A cause, and a sentence with the figures behind it."""

    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class Holders:
    """Who holds the card, in bytes: torch's allocator of this process (``reserved``, of which ``idle`` is not in use),
    the whole process, and others (None: not to be told). ``derived`` is set where the others are what is left over, and
    ``share`` is the least part of the card (one so-manieth) from which on they matter."""

    reserved: int | None
    idle: int | None
    process: int | None
    others: int | None
    derived: bool = False
    share: int = OTHERS_SHARE


def judge(event: Event) -> Judgement:
    """The cause of one failure."""
    if event.kind == "host_oom":
        return _host(event)
    return _card(own_process(event.figures))


def driver_request(n_bytes: int) -> int:
    """Bytes that torch asks of the driver for a tensor of ``n_bytes``, where its cache has no place for it."""
    if n_bytes <= SMALL_LIMIT:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if n_bytes < OWN_SEGMENT_FROM else -(-n_bytes // ROUND_LARGE) * ROUND_LARGE


def own_process(figures: Figures) -> Figures:
    """Where one process is listed and none is marked, it is this one if the figures leave no other place for it.

    Within a container torch cannot tell its own process id in the driver's list. Then the listed one is this process if
    it holds at least what torch's allocator does, and what nobody is listed for is less than that.
    """
    f, reserved = figures, _reserved(figures)
    if f.process_bytes is not None or len(f.processes) != 1 or f.total_bytes is None or f.free_bytes is None:
        return f
    (listed,) = f.processes
    unlisted = f.total_bytes - f.free_bytes - listed.n_bytes
    inside = listed.n_bytes + _rounding(f.total_bytes) >= (reserved or 0)
    if inside and unlisted < max(reserved or 0, _rounding(f.total_bytes)):
        return replace(f, process_bytes=listed.n_bytes, processes=())
    return f


def holders(figures: Figures) -> Holders:
    """Who holds what, as far as it can be told."""
    f, reserved = figures, _reserved(figures)
    idle = f.reserved_unallocated_bytes
    if idle is None and f.cached_bytes is not None:
        idle = f.cached_bytes
    elif idle is None and reserved is not None and f.allocated_bytes is not None and f.reserved_bytes is not None:
        idle = max(0, reserved - f.allocated_bytes)
    process = f.process_bytes if f.process_bytes is not None and f.process_bytes < ABSURD_BYTES else None
    listed = [p.n_bytes for p in f.processes if p.n_bytes < ABSURD_BYTES]
    if listed and f.process_bytes is not None:
        return Holders(reserved, idle, process, sum(listed))
    if f.total_bytes is None or f.free_bytes is None:
        return Holders(reserved, idle, process, None)
    used = f.total_bytes - f.free_bytes
    own = [n for n in listed if reserved is not None and n >= reserved]
    if own:  # the smallest that can hold what torch does
        return Holders(reserved, idle, process, max(0, used - min(own)))
    if process is not None:
        return Holders(reserved, idle, process, max(0, used - process), derived=True)
    if reserved is None:
        return Holders(reserved, idle, process, None)
    context = min(LARGEST_CONTEXT_BYTES, f.total_bytes // 10)
    return Holders(reserved, idle, process, max(0, used - reserved - context), True, GUESSED_SHARE)


def _card(f: Figures) -> Judgement:
    asked, total, free = f.requested_bytes, f.total_bytes, f.free_bytes
    if f.beyond_bounds or (asked is not None and not 0 <= asked < ABSURD_BYTES):
        return Judgement(
            "unknown",
            "the size asked for is nonsense: a negative or overflowed number of bytes, from a corrupted shape or index "
            "or a driver in a bad state",
        )
    held = holders(f)
    if asked is None:
        return _full(f, held) or Judgement("unknown", "the text does not say how much was asked for")
    found = _by_limit(f, held)
    if found is None and total is not None and asked > total:
        found = Judgement("exhausted", f"{gib(asked)} is more than the whole card ({gib(total)})")
    return found or _by_pieces_or_others(asked, f, held) or _by_own(asked, total, free, f, held)


def _by_limit(f: Figures, held: Holders) -> Judgement | None:
    limit, asked = f.limit_bytes, f.requested_bytes or 0
    if limit is None or limit >= ABSURD_BYTES:
        return None
    own = held.reserved if held.reserved is not None else held.process
    had_room = f.free_bytes is not None and f.free_bytes >= asked
    beyond = own is not None and own + asked > limit - _rounding(limit) and (held.idle or 0) < asked
    if not (had_room or beyond):
        return None
    words = f"; the driver had {gib(f.free_bytes)} free" if f.free_bytes is not None else ""
    return Judgement("limit", f"this process may take {gib(limit)} (a memory fraction was set){words}")


def _by_pieces_or_others(asked: int, f: Figures, held: Holders) -> Judgement | None:
    total, free = f.total_bytes, f.free_bytes or 0
    size = total if total is not None else held.reserved or 0
    pieces = held.idle if held.idle is not None and held.idle >= asked else 0
    if pieces < size // TRIVIAL_SHARE and asked < size // SMALL_REQUEST:
        pieces = 0
    others = held.others or 0
    if total is None or others < total // held.share or free + others < asked:
        others = 0
    if _had_room(f, asked):
        return None
    if pieces and pieces >= others:
        return Judgement(
            "fragmentation",
            f"{gib(pieces)} was reserved and not in use, more than the {gib(asked)} asked for, but not in one piece",
        )
    if others:
        who = "are neither free nor this process's" if held.derived else "are held by other processes"
        return Judgement(
            "other_process", f"{gib(others)} {who}; with them the {gib(asked)} asked for would have fitted"
        )
    return None


def _by_own(asked: int, total: int | None, free: int | None, f: Figures, held: Holders) -> Judgement:
    own = max((n for n in (held.reserved, held.process, f.allocated_bytes) if n is not None), default=None)
    if own is None or total is None:
        return Judgement("unknown", "the text does not say what was held, and by whom")
    if free is not None and _had_room(f, asked):
        return Judgement(
            "unknown",
            f"the driver had {gib(free)} free, more than the {gib(asked)} asked for; another process may have freed it "
            "since, or a limit of the system stood in the way",
        )
    fills = own + asked > total or own * 2 >= total or (held.others is not None and held.others < total // held.share)
    if not fills:
        return Judgement(
            "unknown", f"this process holds {gib(own)} of {gib(total)}; the text does not say who has the rest"
        )
    torchs = held.reserved if held.reserved is not None else f.allocated_bytes
    if torchs is not None and held.process is not None and held.process - torchs > max(torchs, total // 4):
        return Judgement(
            "exhausted",
            f"this process holds {gib(held.process)} of {gib(total)}, of that only {gib(torchs)} in torch's allocator",
        )
    idle = ""
    if held.idle is not None and held.idle * 2 >= asked and held.idle >= total // TRIVIAL_SHARE:
        idle = f"; {gib(held.idle)} of that was reserved and not in use, too little or too scattered"
    return Judgement(
        "exhausted", f"this process holds {gib(own)} of {gib(total)}, and asked for {gib(asked)} more{idle}"
    )


def _had_room(f: Figures, asked: int) -> bool:
    """Whether the driver had what was asked of it; torch before 1.4 printed the tensor's size, not the segment's."""
    return f.free_bytes is not None and f.free_bytes >= (asked if f.cached_bytes is None else driver_request(asked))


def _full(f: Figures, held: Holders) -> Judgement | None:
    """Where the request itself was cut off: whether torch fills the card all the same."""
    if held.reserved is None or f.total_bytes is None or f.free_bytes is None:
        return None
    if held.reserved < FULL_SHARE * f.total_bytes or f.free_bytes > (1 - FULL_SHARE) * f.total_bytes:
        return None
    return Judgement("exhausted", f"torch holds {gib(held.reserved)} of {gib(f.total_bytes)}")


def _host(event: Event) -> Judgement:
    if event.limited:
        return Judgement("limit", event.says)
    if event.final:
        return Judgement("exhausted", event.says)
    if event.weight == "killed":
        return Judgement("unknown", f"{event.says}: host memory is the usual reason, and the text does not say so")
    return Judgement("unknown", f"{event.says}; the text does not say how much there was")


def _reserved(f: Figures) -> int | None:
    """What torch's allocator held in all; None where only a part is said."""
    if f.reserved_bytes is not None:
        return f.reserved_bytes
    if f.allocated_bytes is None:
        return None
    idle = f.reserved_unallocated_bytes if f.reserved_unallocated_bytes is not None else f.cached_bytes
    return None if idle is None else f.allocated_bytes + idle


def _rounding(n_bytes: int) -> int:
    """Two printed decimals of a size like this one may hide so many bytes."""
    return GIB // 100 if n_bytes >= GIB else 2**20 // 100
