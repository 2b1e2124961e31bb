"""The figures in one allocator's message, whichever torch printed it.

A message is read without its white space: where a terminal, a mail or a table broke its lines no longer matters, not
even within a word or between a number and its unit. Each figure is looked for by the words around it, so that a message
that was cut off still gives those that are left. The wordings are those of torch's CUDACachingAllocator.cpp (1.0 to
2.15), of its CUDAMallocAsyncAllocator.cpp, and of both as translated for ROCm.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

_UNITS = {
    "b": 1, "byte": 1, "bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "pib": 2**50, "eib": 2**60,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
SIZE = r"(-?\d[\d.,]{0,30})(bytes?|[KMGTPE]iB|[KMGT]?B)"

ABSURD_BYTES = 2**60
"""No card, host or tensor is as large. 17179869184.00 GiB is 2**64 bytes: a negative number, or "not available"."""

_PREFIX = re.compile(
    r"(?:[\s>|│]|//|#|\*\*|<\w{1,6}>|\[(?:default|rank)? ?\d+\]:?|\(\w+ (?:rank=\d+ )?pid=\d+[^)\n]{0,40}\)"
    r"|\d{4}-\d\d-\d\d[T ]?|\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?|std(?:err|out) [FP] "
    r"|(?:DEBUG|INFO|WARNING|ERROR|CRITICAL|FATAL)\b[: ]|[IWEF]\d{3,4} )*+"
)
"""What quotes, tables, launchers, containers and loggers put before each line."""

_MARKUP = re.compile(r"[\s`\u200b\ufeff]+|\*\*|\\[nr]|<br ?/?>|\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True, slots=True)
class Process:
    """A process that the message names: its id, its name where it says one, and the bytes it holds on the card."""

    pid: int
    n_bytes: int
    name: str | None = None

    def as_dict(self) -> dict[str, object]:
        """As ``explain --json`` prints it."""
        return {"pid": self.pid, "name": self.name, "bytes": self.n_bytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a message says, in bytes; None is what it does not say.

    ``cached_bytes`` is what torch before 1.4 called cached: held by its allocator and not in use. ``beyond_bounds`` is
    set where a size is refused outright ("more than 1EB").
    """

    requested_bytes: int | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    process_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    cached_bytes: int | None = None
    reserved_unallocated_bytes: int | None = None
    private_pool_bytes: int | None = None
    limit_bytes: int | None = None
    gpu_index: int | None = None
    processes: tuple[Process, ...] = ()
    beyond_bounds: bool = False

    @property
    def said(self) -> int:
        """How many sizes the message gives."""
        sizes = (
            self.requested_bytes, self.total_bytes, self.free_bytes, self.process_bytes, self.allocated_bytes,
            self.reserved_bytes, self.cached_bytes, self.reserved_unallocated_bytes, self.limit_bytes,
        )  # fmt: skip
        return sum(size is not None for size in sizes)


_PATTERNS = {
    "requested_bytes": (r"Triedtoallocate(?:about)?", "Requested:", ""),
    "total_bytes": (r"totalcapaci?ty(?:of)?", r"Devicelimit:", ""),
    "free_bytes": (r"ofwhich", r"Free\(accordingto\w+\):", ""),
    "process_bytes": (r"thisprocesshas", "", ""),
    "allocated_bytes": (r"Oftheallocatedmemory", r"Currentlyallocated:", ""),
    "private_pool_bytes": ("with", "", "allocatedinprivatepools"),
    "limit_bytes": (r"PyTorchlimit\(setbyuser-suppliedmemoryfraction\):", "", ""),
}
_BEFORE = {
    name: re.compile("(?:" + "|".join(filter(None, (first, second))) + ")" + SIZE + after, re.IGNORECASE)
    for name, (first, second, after) in _PATTERNS.items()
}
"""Figures that follow their words."""
_AFTER = {
    "total_bytes": re.compile(SIZE + r"totalcapac", re.IGNORECASE),
    "free_bytes": re.compile(SIZE + r"(?:free[;)]|isfree|(?:is)?fr?e?e?$)", re.IGNORECASE),
    "allocated_bytes": re.compile(SIZE + r"(?:alreadyalloc|isallocatedby)", re.IGNORECASE),
    "reserved_bytes": re.compile(SIZE + r"reservedint", re.IGNORECASE),
    "cached_bytes": re.compile(SIZE + r"cached\b", re.IGNORECASE),
    "reserved_unallocated_bytes": re.compile(SIZE + r"isreservedbyPyTorch(?:b|$)", re.IGNORECASE),
    "limit_bytes": re.compile(SIZE + "allowed;", re.IGNORECASE),
}
"""Figures that come before their words."""

_GPU = re.compile(r"GPU(\d+)(?:;|has)|Allocationondevice(\d+)", re.IGNORECASE)
_PROCESS = re.compile(r"Process(\d+)(?:\(([^()]{1,80})\))?has" + SIZE + "memoryinuse", re.IGNORECASE)
_WARNED = re.compile(r"OOMondevice(\d+)whiletryingtoallocate(\d+)bytes(?:\(?free:(\d+),total:(\d+))?", re.IGNORECASE)


def plain(text: str) -> str:
    """A text without white space, line prefixes and mark-up."""
    lines = html.unescape(text).splitlines() if "&" in text else text.splitlines()
    return _MARKUP.sub("", "".join(line[_end_of_prefix(line) :] for line in lines))


def without_prefix(line: str) -> str:
    """A line without what loggers, launchers and quotes put before it."""
    return line[_end_of_prefix(line) :]


def _end_of_prefix(line: str) -> int:
    found = _PREFIX.match(line)
    return found.end() if found else 0


def size(number: str, unit: str) -> int | None:
    """``("2.00", "GiB")`` in bytes; None for what is not a number."""
    number = number.rstrip(".,")
    if "," in number:
        thousands = re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", number)
        number = number.replace(",", "" if thousands else ".")
    try:
        return round(float(number) * _UNITS[unit.lower()])
    except ValueError:
        return None


def figures_in(message: str) -> Figures:
    """The figures in one message of torch's allocator, with whatever stands around it."""
    text = plain(message)
    if found := _WARNED.search(text):
        device, requested, free, total = found.groups()
        return Figures(
            requested_bytes=int(requested), free_bytes=int(free) if free else None,
            total_bytes=int(total) if total else None, gpu_index=int(device),
        )  # fmt: skip
    said: dict[str, int | None] = {}
    for patterns in (_AFTER, _BEFORE):
        for name, pattern in patterns.items():
            if found := pattern.search(text):
                said[name] = size(found[1], found[2])
    gpu = _GPU.search(text)
    named = tuple(
        Process(int(pid), held, name or None)
        for pid, name, number, unit in _PROCESS.findall(text)
        if (held := size(number, unit)) is not None
    )
    return Figures(
        **said, gpu_index=int(next(filter(None, gpu.groups()))) if gpu else None, processes=named,
        beyond_bounds="morethan1EB" in text,
    )  # fmt: skip
