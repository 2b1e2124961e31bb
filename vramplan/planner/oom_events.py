"""Where a text says that memory ran out, and where it says that something else failed.

Torch's own messages are told by their figures, wherever they stand; shorter reports are those of :mod:`oom_phrases`.
Whatever the length of the text, only telling places are looked at, and of each kind the last ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .oom_fields import figures_in, plain
from .oom_phrases import PHRASES
from .oom_report import OTHERS, Event, Other, framework_of
from .oom_talk import CODE, line_of, literal, mentioned, taught

MOST_MENTIONS = 400
"""Of each telling phrase, the last ones: a log that repeats a failure more often says nothing new before them."""

LONGEST_LINE = 4000
"""Characters of a line that are read on either side of a telling phrase."""

MESSAGE = 2600
"""Characters within which an allocator's message ends, hard-wrapped and quoted."""

MOST_LINES, MOST_CHARACTERS = 4000, 400_000
"""Of a text's end, in which another failure is looked for."""

LOOSE_HEAD = 700
"""Characters before the first words of a message that a line's end did not break."""

HEAD = 260
"""Characters before its first figure."""


_HEADER = re.compile(r"(CUDA|HIP|XPU|NPU|MPS|MUSA|GCU|MLU|HPU)(?i:backend|driver)?(?i:error:)?(?i:outofmemory)")


_CUT_OFF = re.compile(r"(?i)ocate\d|outofmemory|ifreserved|oftheallocatedmemory|GPU\d*;\d")
"""Of a message without its first words: what no log of a healthy run says beside the same figures."""


def memory_events(text: str) -> list[Event]:
    """Every report that memory ran out, in the text's order; of the same phrase the last MOST_MENTIONS."""
    lower = lowered(text)
    found: dict[int, Event] = {}
    taken: list[tuple[int, int]] = []
    for message in _with_figures(text, lower):
        found[message.start] = message
        taken.append((message.start, message.end))
    for needle, pattern, read in PHRASES:
        for at in last_places(needle, lower):
            if any(start <= at < end for start, end in taken):
                continue
            first, last = line_at(text, at, at + len(needle))
            match = pattern.search(lower, first, min(last + 200, len(lower)))
            if match is None or match.start() > last or first in found:
                continue
            event = read(text, first, max(last, match.end()), match)
            if event is not None:
                found[first] = event
    return sorted(found.values(), key=lambda event: event.start)


def other_failures(text: str, first: int = 0) -> Iterator[Other]:
    """Lines from ``first`` on that say that something else failed, the last one first; only of the text's end."""
    end = len(text)
    first = max(first, end - MOST_CHARACTERS)
    for _ in range(MOST_LINES):
        if end <= first:
            return
        start = max(text.rfind("\n", first, end - 1) + 1, first, end - LONGEST_LINE)
        line = text[start:end]
        for pattern, reason in OTHERS:
            if found := pattern.search(line):
                if "n_embd %" in line or not mentioned(line, found.start()):
                    yield Other(start, reason, line.strip())
                break
        end = start


def lowered(text: str) -> str:
    """Lower case of the same length: only one letter's is longer."""
    return text.replace("\u0130", "I").lower()


def last_places(needle: str, lower: str) -> list[int]:
    """Where the last MOST_MENTIONS occurrences of a phrase begin, the last one first."""
    places: list[int] = []
    at = lower.rfind(needle)
    while at >= 0 and len(places) < MOST_MENTIONS:
        places.append(at)
        at = lower.rfind(needle, 0, at)
    return places


def line_at(text: str, start: int, end: int) -> tuple[int, int]:
    """The line (or lines) of text[start:end], as far as they are read."""
    bottom, top = max(0, start - LONGEST_LINE), min(len(text), end + LONGEST_LINE)
    first = max(text.rfind("\n", bottom, start) + 1, bottom)
    last = text.find("\n", end, top)
    return first, top if last < 0 else last


def _with_figures(text: str, lower: str) -> Iterator[Event]:
    """Messages of torch's allocators: each from its head to the next one's."""
    heads = [at for needle, pattern in _HEADS for at in last_places(needle, lower) if pattern.match(lower, at)]
    tails = sorted(at for needle in _TAILS for at in last_places(needle, lower))
    for at in tails:  # whose first words were cut off, or broken by the end of a line
        if not any(head - HEAD <= at <= head + MESSAGE for head in heads):
            heads.append(max(at - LOOSE_HEAD, 0))
    heads.sort()
    for i, at in enumerate(heads):
        following = heads[i + 1] if i + 1 < len(heads) else len(text) + HEAD
        end = min(at + MESSAGE, max(at + 40, following - HEAD // 2), len(text))
        if (other := lower.find("traceback (most recent", at, end)) > 0:
            end = other
        event = _allocator_event(text, at, end, [tail for tail in tails if at <= tail < end])
        if event is not None:
            yield event


def _allocator_event(text: str, at: int, end: int, tails: list[int]) -> Event | None:
    """The message whose first figure is at ``at``; None where it is another device's, or none at all."""
    figures = figures_in(text[at:end])
    before = text[max(0, at - HEAD) : at]
    headers = list(_HEADER.finditer(plain(before + text[at : min(end, at + 400)])))
    device = headers[-1][1].upper() if headers else None
    first, last = line_at(text, at, max([at, *tails]))
    line = text[first:last]
    if device not in (None, "CUDA", "HIP") or (device is None and framework_of(line) is not None):
        return None
    asked = figures.requested_bytes is not None or figures.beyond_bounds
    if not (asked and device) and figures.said < 2:
        return None
    if not (asked or device) and not _CUT_OFF.search(plain(before + text[at:end])):
        return None
    if (CODE.match(line_of(text, first, last)) and figures.said < 3) or literal(text, first, last):
        return None
    if figures.said < 3 and taught(text, first, last):
        return None
    return Event(
        start=max(first, at - HEAD), end=last, weight="figures", line=line.strip()[:LONGEST_LINE], figures=figures,
        kind="hip_oom" if device == "HIP" or (device is None and "HIPCaching" in line) else "cuda_oom",
        says="torch's allocator could not get what was asked for",
        warning="while trying" in text[at : at + 60],
    )  # fmt: skip


_HEADS = (
    ("tried to", re.compile(r"tried\s+to\s+allocate\s+(?:about\s+)?(?:-?\d|more\s+than\s+1\s*eb)")),
    ("allocation on device", re.compile(r"allocation\s+on\s+device\s+\d*\s*would\s+exceed")),
    ("oom on device", re.compile(r"oom\s+on\s+device\s+\d+\s+while\s+trying")),
)
_TAILS = (
    "total capa", "already alloc", "reserved in total", "allocated by pytorch", "reserved by pytorch but",
    "non-pytorch memory, this", "memory fraction", "according to", "capaci", "unalloc", "is free", "memory in use",
    "is reserved", "torch, and",
)  # fmt: skip
